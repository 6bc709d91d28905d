"""Whole decoder stacks of a transformers module as one native call.

A stack is recognised by the names of its layers' parts, and taken only if it then gives the layers' own logits. Each
layer's place in the module is kept by a small module that notes what the layer is handed; the last one runs them all.

Where nothing but an embedding comes before the layers, and nothing but a norm and the head after them, the module's own
forward is left out too (``DirectForward``): at one row its bookkeeping costs a tenth of a step. This as well is taken
only if it gives the module's logits.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from folo_hf.native import NativeLinear, NativeMlp, shared_matrix
from folo_hf.probe import run
from folo_hf.stack import (
    TRIAL_BLOCK,
    TRIAL_BLOCKS,
    NotRecognisedError,
    RotaryTables,
    check_logits,
    find_layers,
    layers_logits,
    norm_factor,
    optional_factor,
    trial_steps,
)
from folo_kernels.decoder import DecoderStack, LayerWeights, normalise
from folo_kernels.store import BlockStore, LayerShape, PackedStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from folo_hf.attention import AttentionBridge, AttentionCall
    from folo_hf.probe import ModelShape

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest accepted ratio of the difference's norm to the logits' norm; sums in another order are off by about 1e-6."""


class NativeDecoder:
    """The layers of one model, run natively while a store is bound."""

    def __init__(self, owner: nn.Module, name: str, weights: list[LayerWeights], shape: ModelShape) -> None:
        self.owner, self.name = owner, name
        self._layers: nn.ModuleList = getattr(owner, name)
        self._weights = weights
        self._hidden_size = weights[0].input_norm.numel()
        self._places = nn.ModuleList(_Place(self, index) for index in range(len(weights)))
        self.rotary: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Each layer's cosines and sines, ``[num_tokens, size]``, as noted last."""
        self._stack: DecoderStack | None = None
        self.direct: DirectForward | None = None
        """How to run the whole model; None where it is the module's own forward that runs the layers."""
        self.step: PackedStep | None = None
        """The packed batch that the next forward runs."""
        self.shapes = [
            LayerShape(kv_heads=s.num_kv_heads, key_size=s.head_size, value_size=s.v_head_size or s.head_size)
            for s in shape.specs
        ]

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the module's own forward is left."""
        return self.direct is not None

    def bind(self, store: BlockStore | None) -> None:
        """Run natively over this store's blocks; None gives the module its own layers back."""
        self._stack = None if store is None else DecoderStack(self._weights, store, self._hidden_size)
        setattr(self.owner, self.name, self._layers if store is None else self._places)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds spent in each kind of work since a store was bound."""
        if self._stack is None:
            return {}
        head = {} if self.direct is None else {"head": self.direct.head_seconds}
        return self._stack.stage_seconds() | head

    def note(self, index: int, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Note what layer ``index`` is handed; at the last one, run them all."""
        if index == 0:
            self.rotary.clear()
        # Layers of one kind share their tensors, so most of this copies nothing.
        self.rotary.append((rotary[0][0].contiguous(), rotary[1][0].contiguous()))
        return hidden if index + 1 < len(self._weights) else self._run(hidden)

    def run(self, hidden: torch.Tensor, rotary: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Run all layers on ``[num_tokens, hidden]``, which is changed in place.

        Raises:
            RuntimeError: outside a step, or with other tensors than the step's tokens need.
        """
        if self._stack is None or self.step is None:
            raise RuntimeError("a native layer ran outside a step")
        if len(rotary) != len(self._weights) or hidden.shape != (self.step.num_tokens, self._hidden_size):
            raise RuntimeError(
                f"hidden states {tuple(hidden.shape)}: expected the step's {self.step.num_tokens} tokens"
            )
        self._stack.run(hidden, rotary, self.step)
        return hidden

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        # Changed in place: a copy, because an embedding may hand out what is its own.
        return self.run(hidden[0].clone(memory_format=torch.contiguous_format), self.rotary)[None]


class DirectForward:
    """Embedding, native layers, norm and head, without the module's own forward."""

    def __init__(self, model: PreTrainedModel, decoder: NativeDecoder) -> None:
        self._decoder = decoder
        self._embedding: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        owner: Any = decoder.owner
        self._norm, self._epsilon = norm_factor(owner.norm)
        self.head_seconds = 0.0
        """How long the head took, from step to step."""
        self._rotary = RotaryTables(model, (decoder.owner, decoder.name))

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, logits_indices: torch.Tensor) -> torch.Tensor:
        """Logits ``[rows, vocab_size]`` of the packed tokens that ``logits_indices`` names."""
        self._rotary.reach(int(positions.max()))
        turned = [(cos.index_select(0, positions), sin.index_select(0, positions)) for cos, sin in self._rotary.tables]
        hidden = self._decoder.run(self._embedding(input_ids), [turned[index] for index in self._rotary.table_of])
        # In the order asked for: prompt positions follow what is sampled.
        normed = normalise(hidden.index_select(0, logits_indices), self._norm, self._epsilon)
        started = time.perf_counter()
        logits: torch.Tensor = self._head(normed)
        self.head_seconds += time.perf_counter() - started
        return logits


class _Place(nn.Module):
    """Stands where a layer stood."""

    def __init__(self, decoder: NativeDecoder, index: int) -> None:
        super().__init__()
        self._decoder, self._index = decoder, index

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,  # noqa: ANN401 (masks and caches that attention over blocks does without)
    ) -> torch.Tensor:
        """``[1, tokens, hidden] -> [1, tokens, hidden]``."""
        return self._decoder.note(self._index, hidden_states, position_embeddings)


def native_decoder(
    model: PreTrainedModel, bridge: AttentionBridge, shape: ModelShape, *, tried: bool = False
) -> NativeDecoder | None:
    """Return the model's layers as a native stack, tried against the layers; None if they are not of its kind.

    The linears must have been packed by ``NativeLinears``. ``tried`` says that an earlier start has tried the very same
    model, and found it to run as a ``DirectForward``.
    """
    try:
        owner, name = find_layers(model)
        layers: Any = getattr(owner, name)
        weights = [_weights(layer, call) for layer, call in zip(layers, shape.calls, strict=True)]
        decoder = NativeDecoder(owner, name, weights, shape)
        if tried:
            decoder.direct = DirectForward(model, decoder)
        else:
            _check(model, bridge, decoder)
    except Exception as error:  # noqa: BLE001 (whatever speaks against it, the layers themselves are there to run)
        logger.info("%s runs layer by layer: %s: %s", type(model).__name__, type(error).__name__, error)
        return None
    return decoder


def _weights(layer: Any, call: AttentionCall) -> LayerWeights:  # noqa: ANN401 (a layer of any architecture)
    attention, mlp = layer.self_attn, layer.mlp
    qkv = shared_matrix(attention, ("q_proj", "k_proj", "v_proj"))
    if qkv is None or not isinstance(attention.o_proj, NativeLinear) or not isinstance(mlp, NativeMlp):
        raise NotRecognisedError(f"{type(layer).__name__}: projections or feed-forward of another kind")
    input_norm, epsilon = norm_factor(layer.input_layernorm)
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    feed_norm = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
    return LayerWeights(
        input_norm=input_norm,
        feed_norm=norm_factor(feed_norm)[0],
        qkv=qkv,
        out=attention.o_proj.matrix,
        gate_up=mlp.gate_up,
        down=mlp.down,
        heads=qkv.sizes[0] // attention.head_dim,
        epsilon=epsilon,
        scale=call.scale,
        gate=mlp.gate,
        window=call.sliding_window,
        softcap=call.softcap,
        query_norm=optional_factor(attention, "q_norm"),
        key_norm=optional_factor(attention, "k_norm"),
        attention_norm=norm_factor(layer.post_attention_layernorm)[0] if sandwich else None,
        output_norm=optional_factor(layer, "post_feedforward_layernorm"),
    )


def _check(model: PreTrainedModel, bridge: AttentionBridge, decoder: NativeDecoder) -> None:
    """Compare two packed steps, one continuing a sequence of the other, with the layers' own."""
    expected = layers_logits(model, bridge)
    store = BlockStore(decoder.shapes, num_blocks=TRIAL_BLOCKS, block_size=TRIAL_BLOCK)
    decoder.bind(store)
    try:
        found = _native_logits(model, decoder, store, lambda ids, positions: run(model, ids, positions))
        check_logits(expected, found, TOLERANCE)
        decoder.direct = _try_direct(model, decoder, store, expected)
    finally:
        decoder.bind(None)
        decoder.step = None


def _try_direct(
    model: PreTrainedModel, decoder: NativeDecoder, store: BlockStore, expected: torch.Tensor
) -> DirectForward | None:
    try:
        direct = DirectForward(model, decoder)

        def run_backwards(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return direct(ids, positions, torch.arange(len(ids)).flip(0)).flip(0)

        found = _native_logits(model, decoder, store, run_backwards)
        check_logits(expected, found, TOLERANCE)
    except Exception as error:  # noqa: BLE001 (the module's own forward is there to run)
        logger.info("%s runs its own forward: %s: %s", type(model).__name__, type(error).__name__, error)
        return None
    return direct


def _native_logits(
    model: PreTrainedModel,
    decoder: NativeDecoder,
    store: BlockStore,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Logits of the trial's tokens, step after step."""
    logits = []
    for step in trial_steps(model):
        starts, lengths, tables = (np.array(each) for each in (step.query_start, step.seq_lens, step.block_tables))
        decoder.step = PackedStep(starts, lengths, tables, step.slots, store.group)
        logits.append(forward(step.input_ids, step.positions))
    return torch.cat(logits)
