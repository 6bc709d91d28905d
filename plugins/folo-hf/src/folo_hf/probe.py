"""Learns how a loaded model attends, and checks that running it packed and in chunks gives its own logits.

The model runs a few tokens once in transformers' own way, sequence by sequence, and once as Folo will run it: two
sequences packed end to end, one of them split over two steps. A model that keeps state outside attention (convolution,
recurrence), mixes tokens across sequences, or ignores position ids gives other logits, and is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from folo_core.attention.interface import KVCacheSpec
from folo_core.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from folo_hf.attention import AttentionBridge, AttentionCall

FIRST, SECOND_HEAD, SECOND_TAIL = 5, 4, 3
"""Tokens of the probe: one whole sequence, and one whose last tokens come in a second step."""

STEPS = 2

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.3}
"""Largest accepted ratio of the difference's norm to the logits' norm. Wrong models are off by about 1."""


@attrs.frozen(slots=True, kw_only=True)
class ModelShape:
    """What the probe found out."""

    specs: list[KVCacheSpec]
    layers: dict[int, int]
    """``id(module)`` to the layer's index among the attention layers."""
    calls: list[AttentionCall]
    """What each layer asks for."""
    vocab_size: int
    peaks: list[tuple[float, float]] = attrs.field(factory=list)
    """Largest magnitude of each layer's keys and of its values, of the probe's tokens; empty if they were not asked."""


@attrs.define(slots=True)
class _LayerTrace:
    call: AttentionCall
    spec: KVCacheSpec
    calls: int = 0
    pieces: dict[int, tuple[torch.Tensor, torch.Tensor]] = attrs.field(factory=dict)
    """Keys and values so far of each probe sequence."""

    def peaks(self) -> tuple[float, float]:
        """Largest magnitude of its keys, and of its values."""
        keys, values = zip(*self.pieces.values(), strict=True)
        return float(torch.cat(keys).abs().max()), float(torch.cat(values).abs().max())


class DenseTarget:
    """Plain causal attention that remembers keys, values and what each layer asked for."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, slice]] = []
        """The step's packed batch: sequence number and its rows."""
        self.traces: dict[int, _LayerTrace] = {}

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor:
        """Attend causally within each sequence."""
        trace = self.traces.setdefault(id(module), _LayerTrace(call, _spec(key, value)))
        trace.calls += 1
        output = query.new_empty(*query.shape[:2], value.shape[2])
        for number, rows in self.segments:
            keys, values = key[rows], value[rows]
            if number in trace.pieces:
                old_keys, old_values = trace.pieces[number]
                keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
            trace.pieces[number] = keys, values
            output[rows] = dense_attention(query[rows], keys, values, call)
        return output


def _spec(key: torch.Tensor, value: torch.Tensor) -> KVCacheSpec:
    same = key.shape[2] == value.shape[2]
    return KVCacheSpec(
        num_kv_heads=key.shape[1],
        head_size=key.shape[2],
        dtype=key.dtype,
        v_head_size=None if same else value.shape[2],
    )


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Causal attention of the last ``n`` tokens of one sequence, written out plainly, in float32 or wider.

    Args:
        query: ``[n, heads, size]``.
        key: ``[m, kv_heads, size]`` with ``m >= n``.
        value: ``[m, kv_heads, v_size]``.
        call: scale, sliding window and softcap.

    Returns:
        ``[n, heads, v_size]`` in the query's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (tensor.to(wide).repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query.to(wide), keys) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    n, m = query.shape[0], key.shape[0]
    distance = torch.arange(m - n, m, device=key.device)[:, None] - torch.arange(m, device=key.device)
    hidden = distance < 0
    if call.sliding_window is not None:
        hidden |= distance >= call.sliding_window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).to(query.dtype)


def probe(model: PreTrainedModel, bridge: AttentionBridge) -> ModelShape:
    """Run the probe.

    Raises:
        UnsupportedModelError: some layer never called Folo's attention, asked for what it does not do, or the logits
            differ from the model's own.
    """
    target = bridge.target = DenseTarget()
    try:
        packed = torch.cat(list(packed_logits(model, target)))
        _check_calls(model, target)
        _check_windows(model, target)
        _check_logits(packed, _own_logits(model, bridge))
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        message = f"model: {type(model).__name__} cannot run through paged attention: {text}"
        raise UnsupportedModelError(message) from error
    finally:
        bridge.target = None
    traces = list(target.traces.values())
    return ModelShape(
        specs=[trace.spec for trace in traces],
        layers={key: index for index, key in enumerate(target.traces)},
        calls=[trace.call for trace in traces],
        vocab_size=packed.shape[-1],
        peaks=[trace.peaks() for trace in traces],
    )


def tokens(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fixed sequences of different tokens, within the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(FIRST + SECOND_HEAD + SECOND_TAIL) * 7919 + 11) % size
    ids = ids.to(model.device)
    return ids[:FIRST], ids[FIRST:]


def packed_logits(model: PreTrainedModel, target: DenseTarget) -> Iterator[torch.Tensor]:
    """Logits of all probe tokens, from two packed steps, in the order first sequence, second sequence."""
    first, second = tokens(model)
    both = torch.cat([first, second[:SECOND_HEAD]])
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND_HEAD)]).to(model.device)
    target.segments = [(0, slice(0, FIRST)), (1, slice(FIRST, FIRST + SECOND_HEAD))]
    yield run(model, both, positions)
    target.segments = [(1, slice(0, SECOND_TAIL))]
    yield run(model, second[SECOND_HEAD:], torch.arange(SECOND_HEAD, SECOND_HEAD + SECOND_TAIL, device=model.device))


def _own_logits(model: PreTrainedModel, bridge: AttentionBridge) -> torch.Tensor:
    """Logits of the same tokens from transformers' own attention, one sequence at a time."""
    model.set_attn_implementation("eager")
    try:
        return torch.cat([run(model, ids, torch.arange(len(ids), device=model.device)) for ids in tokens(model)])
    finally:
        model.set_attn_implementation(bridge.name)


@torch.no_grad()
def run(model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` of one packed row without a cache."""
    out = model(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, return_dict=True)
    logits: torch.Tensor = out.logits[0]
    return logits


def _check_calls(model: PreTrainedModel, target: DenseTarget) -> None:
    """Each layer must attend once a step: one that does not keeps its past elsewhere, if it keeps one."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    calls = [trace.calls for trace in target.traces.values()]
    if len(calls) != layers or any(count != STEPS for count in calls):
        raise UnsupportedModelError(
            f"of its {layers} layers, {sum(count == STEPS for count in calls)} call the attention function "
            "once a step; the others keep state that blocks of keys and values do not hold"
        )


def _check_windows(model: PreTrainedModel, target: DenseTarget) -> None:
    """The probe is shorter than most windows, so a layer that forgets to hand its window on must be told apart here."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    windows = [trace.call.sliding_window for trace in target.traces.values()]
    for index, (kind, window) in enumerate(zip(kinds, windows, strict=False)):
        if (kind == "sliding_attention") != (window is not None):
            raise UnsupportedModelError(f"layer {index} is of type {kind!r} but asks for the window {window}")


def _check_logits(packed: torch.Tensor, own: torch.Tensor) -> None:
    tolerance = TOLERANCE.get(own.dtype, TOLERANCE[torch.float32])
    packed, own = packed.double(), own.double()
    error = float((packed - own).norm() / own.norm().clamp_min(1e-12))
    if not error < tolerance:
        raise UnsupportedModelError(
            f"packed and in chunks, its logits differ from its own by {error:.3g} of their size: "
            "it mixes tokens outside attention or ignores position ids"
        )
