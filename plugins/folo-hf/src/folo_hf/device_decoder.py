"""A whole llama-like model on a CUDA device: embedding, decoder layers, norm and head in as few kernels as possible.

As on the CPU (``folo_hf.decoder``), a stack is recognised by the names of its layers' parts and taken only if it gives
the layers' own logits. It multiplies by the module's own weights, so nothing is held twice, and nothing in its forward
waits for the device or depends on what a tensor holds: a step may be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import numpy as np
import torch
from torch.nn import functional

from folo_core.attention.interface import AttentionMetadata
from folo_hf.attention import AttentionCall
from folo_hf.device_layers import read_ends, read_layer
from folo_hf.joined_products import JoinedProducts
from folo_hf.low_bit import rows_as_they_are
from folo_hf.probe import dense_attention
from folo_hf.stack import (
    TRIAL_BLOCK,
    TRIAL_BLOCKS,
    NotRecognisedError,
    RotaryTables,
    check_logits,
    find_layers,
    layers_logits,
    trial_steps,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from folo_core.attention.interface import KVCacheSpec
    from folo_hf.attention import AttentionBridge
    from folo_hf.device_layers import DeviceLayer, Ends, Linear
    from folo_hf.probe import ModelShape
    from folo_kernels.gpu.products import Rotation, ScaledRows

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Largest accepted ratio of the difference's norm to the logits' norm. Parts were compared in float32 before."""

ROUNDED_TOLERANCE = 0.1
"""The same with rounded weights, whose products sum in an order of their own; rows are not rounded in the trial."""

THIN_ROWS = 1
"""Rows up to which products are thin ones (see ``folo_kernels.gpu.layers.thin_matmul``): from two on they gain nothing
on an H100, and lose from four on."""


PDL_CAPABILITY = (9, 0)
"""From which compute capability on a kernel can be launched while its predecessor still runs."""


class Blocks(Protocol):
    """Keys and values on the device."""

    keys: list[torch.Tensor]
    """One for each layer: ``[num_blocks, kv_heads, block_size, size]``."""
    values: list[torch.Tensor]
    block_size: int


class DeviceBackend(Protocol):
    """An attention backend that reads blocks which others have written to."""

    blocks: Blocks

    def attend(  # noqa: PLR0913 (a layer's whole call)
        self,
        layer: int,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        pdl: bool = False,
    ) -> torch.Tensor:
        """Attend causally over the blocks, ``[num_tokens, heads, size]`` in and out.

        With ``pdl`` it may start while the kernel before it still runs.
        """


class DeviceDecoder:
    """A whole model over a device backend's blocks.

    Args:
        layers: the decoder layers.
        ends: what is around them.
        rotary: the model's cosines and sines.
        max_positions: how many positions there are at most.
    """

    def __init__(self, layers: Sequence[DeviceLayer], ends: Ends, rotary: RotaryTables, max_positions: int) -> None:
        from folo_kernels.gpu import layers as kernels

        self._kernels = kernels
        self._layers, self._ends = list(layers), ends
        self._calls = [attrs.asdict(layer.call) for layer in layers]
        self._rotary, self._max_positions = rotary, max_positions
        self._adds_plainly = all(layer.adds_plainly for layer in layers)
        self._backend: DeviceBackend | None = None
        self.is_rounded = ends.head.low_bit is not None or any(layer.is_rounded for layer in layers)
        self.thin_rows = 0 if self.is_rounded else THIN_ROWS
        """Rows up to which products are thin ones; 0 for none: rounded weights have products of their own."""
        self.scales: list[tuple[float, float]] = [(1.0, 1.0)] * len(self._layers)
        """Each layer's: what keys and values are divided by as they are written (see ``KVCacheSpec``)."""
        device = ends.embedding.device
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
        """Launch each kernel of a thin step while its predecessor still runs; larger steps gain nothing by it."""
        self.joined: JoinedProducts | None = None
        """Products joined with what surrounds them, for steps of some rows; None for none."""
        if self.pdl and ends.embedding.dtype == torch.bfloat16 and all(layer.joins for layer in layers):
            self.joined = JoinedProducts.make(device, ends.embedding.shape[1])

    @property
    def is_bound(self) -> bool:
        """Whether there are blocks to run over."""
        return self._backend is not None

    def bind(self, backend: object) -> None:
        """Run over this backend's blocks, if it has such; else the module's own forward is to run."""
        fits: Any = backend if hasattr(backend, "attend") and hasattr(backend, "blocks") else None
        self._backend = fits
        if fits is not None:
            self._rotary.reach(self._max_positions - 1)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Logits ``[rows, vocab_size]`` of the packed tokens that ``logits_indices`` names (see ``LoadedModel``)."""
        # New rows, which the layers then add to in place.
        hidden = functional.embedding(input_ids, self._ends.embedding)
        if self._ends.embedding_scale != 1:
            hidden *= self._ends.embedding_scale
        if len(input_ids) <= self.thin_rows and self._adds_plainly:
            normed = self._run_thin(hidden, positions, metadata)
        elif self.joined is not None and self.joined.serves(len(input_ids), is_captured=metadata.is_captured):
            normed = self._run_joined(self.joined, hidden, positions, metadata)
        else:
            normed = self._run(hidden, positions, metadata)
        return self._logits(normed.index_select(0, logits_indices))

    def _run(self, hidden: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """All layers and the last norm, ``[tokens, hidden]``; each norm is computed with the sum before it."""
        kernels, following = self._kernels, self._norms()
        normed: torch.Tensor = kernels.norm(hidden, *following[0])
        for index, layer in enumerate(self._layers):
            pdl = self.pdl and len(hidden) <= self.thin_rows
            query = self._rotate(index, self._product(normed, layer.qkv), positions, metadata, pdl=pdl)
            attended = self._attend(index, query, metadata, pdl=pdl)
            added = self._product(attended, layer.out)
            normed, _ = kernels.add_norm(added, hidden, layer.feed_norm, layer.epsilon, post=layer.attention_norm)
            added = self._product(self._feed(normed, layer), layer.down)
            factor, epsilon = following[index + 1]
            normed, _ = kernels.add_norm(
                added, hidden, factor, epsilon, post=layer.output_norm, post_epsilon=layer.epsilon
            )
        return normed

    def _norms(self) -> list[tuple[torch.Tensor, float]]:
        """Factor and epsilon of the norm before each layer, and of the last one."""
        norms = [(layer.input_norm, layer.epsilon) for layer in self._layers]
        return [*norms, (self._ends.norm, self._ends.epsilon)]

    def _run_joined(
        self, joined: JoinedProducts, hidden: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """As :meth:`_run`, for a model whose layers add plainly: a product measured as faster joined is.

        ``x`` is normed, or ready for a product that divides it.
        """
        norms, joined.pdl = self._norms(), len(hidden) in joined.pdl_rows
        places = [self._rotation(joined, index, positions, metadata) for index in range(len(self._layers))]
        configs = [joined.configs(*each, len(hidden)) for each in zip(self._layers, places, self.scales, strict=True)]
        x: torch.Tensor | ScaledRows = self._kernels.norm(hidden, *norms[0])
        for index, layer in enumerate(self._layers):
            mine, following = configs[index], configs[index + 1] if index + 1 < len(configs) else {}
            if mine["rotated"] is None:
                qkv = joined.multiply(x, layer.qkv, mine["qkv"])
                query = self._rotate(index, qkv, positions, metadata, pdl=joined.pdl)
            else:
                query = joined.rotate(x, layer.qkv, places[index], mine["rotated"])
            # Programs of attention that wait would be in the way of those before them that still run.
            attended = self._attend(index, query, metadata, pdl=False)
            feed_norm = layer.feed_norm, layer.epsilon
            x = joined.add(attended, layer.out, hidden, feed_norm, mine["out"], following=mine["gate_up"])
            fed = joined.feed(x, layer, mine["gate_up"])
            first = following.get("rotated") or following.get("qkv")
            x = joined.add(fed, layer.down, hidden, norms[index + 1], mine["down"], following=first)
        return joined.normed(x)

    def _run_thin(self, hidden: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """As :meth:`_run`, for a few rows of a model whose layers add plainly: norms and sums are the products'."""
        multiply = self._kernels.thin_matmul
        for index, layer in enumerate(self._layers):
            norm: dict[str, Any] = {"epsilon": layer.epsilon, "pdl": self.pdl}
            qkv = multiply(hidden, layer.qkv.weight, bias=layer.qkv.bias, factor=layer.input_norm, **norm)
            query = self._rotate(index, qkv, positions, metadata, pdl=self.pdl)
            attended = self._attend(index, query, metadata, pdl=self.pdl)
            multiply(attended, layer.out.weight, bias=layer.out.bias, add_to=hidden, pdl=self.pdl)
            gate_up = layer.gate_up
            fed = multiply(
                hidden,
                gate_up.weight,
                bias=gate_up.bias,
                factor=layer.feed_norm,
                activation=layer.activation,
                **norm,
            )
            multiply(fed, layer.down.weight, bias=layer.down.bias, add_to=hidden, pdl=self.pdl)
        return self._kernels.norm(hidden, self._ends.norm, self._ends.epsilon, pdl=self.pdl)

    def _rotate(
        self, index: int, qkv: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata, *, pdl: bool
    ) -> torch.Tensor:
        """Write keys and values into their blocks; queries ``[tokens, heads, size]``."""
        layer, blocks = self._layers[index], self._blocks
        key_scale, value_scale = self.scales[index]
        query = qkv.new_empty(len(qkv), layer.heads, layer.size)
        self._kernels.rotate_and_store(
            qkv,
            positions,
            *self._rotary.tables[self._rotary.table_of[index]],
            metadata.slot_mapping,
            blocks.keys[index],
            blocks.values[index],
            query,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            epsilon=layer.epsilon,
            key_scale=key_scale,
            value_scale=value_scale,
            pdl=pdl,
        )
        return query

    def _rotation(
        self, joined: JoinedProducts, index: int, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> Rotation:
        """As :meth:`_rotate` does it, for a product that does it."""
        layer, blocks = self._layers[index], self._blocks
        cosines, sines = self._rotary.tables[self._rotary.table_of[index]]
        return joined.rotation(
            positions=positions,
            cosines=cosines,
            sines=sines,
            slots=metadata.slot_mapping,
            keys=blocks.keys[index],
            values=blocks.values[index],
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            epsilon=layer.epsilon,
        )

    @property
    def _blocks(self) -> Blocks:
        if self._backend is None:
            raise RuntimeError("bind() a backend with blocks before a step")
        return self._backend.blocks

    def _attend(self, index: int, query: torch.Tensor, metadata: AttentionMetadata, *, pdl: bool) -> torch.Tensor:
        """Attend over the blocks, ``[tokens, heads * size]``."""
        if self._backend is None:
            raise RuntimeError("bind() a backend with blocks before a step")
        attended = self._backend.attend(index, query, metadata, **self._calls[index], pdl=pdl)
        return attended.reshape(len(query), -1)

    def _feed(self, normed: torch.Tensor, layer: DeviceLayer) -> torch.Tensor:
        """``activation(gate) * value`` of a feed-forward."""
        if len(normed) > self.thin_rows:
            return self._kernels.gated(self._product(normed, layer.gate_up), layer.activation)
        gate_up = layer.gate_up
        return self._kernels.thin_matmul(
            normed, gate_up.weight, bias=gate_up.bias, activation=layer.activation, pdl=self.pdl
        )

    def _product(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """``x W^T + bias``, ``[rows, inputs] -> [rows, outputs]``."""
        if linear.low_bit is not None:
            product = linear.low_bit(x)
            return product if linear.bias is None else product + linear.bias
        if len(x) <= self.thin_rows:
            return self._kernels.thin_matmul(x, linear.weight, bias=linear.bias, pdl=self.pdl)
        return functional.linear(x, linear.weight, linear.bias)

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        logits, ends = self._product(normed, self._ends.head), self._ends
        if ends.logit_scale != 1:
            logits *= ends.logit_scale
        if ends.softcap is not None:
            logits = torch.tanh(logits / ends.softcap) * ends.softcap
        return logits


def device_decoder(
    model: PreTrainedModel, bridge: AttentionBridge, shape: ModelShape, max_positions: int
) -> DeviceDecoder | None:
    """Return the whole model in device kernels, tried against its layers; None if it is not of their kind.

    Linears that share an input must have been joined by ``FuseLinears``.
    """
    name = type(model).__name__
    try:
        stack = find_layers(model)
        layers = [
            read_layer(layer, call, spec)
            for layer, call, spec in zip(getattr(*stack), shape.calls, shape.specs, strict=True)
        ]
        rotary = RotaryTables(model, stack, max_positions)
        decoder = DeviceDecoder(layers, read_ends(model, stack), rotary, max_positions)
        off = _try(model, bridge, decoder, shape.specs)
    except Exception as error:  # noqa: BLE001 (whatever speaks against it, the module itself is there to run)
        logger.info("%s runs its own forward: %s: %s", name, type(error).__name__, error)
        return None
    logger.info("%s runs in fused kernels: its logits differ from the layers' own by %.2g of their size", name, off)
    return decoder


@torch.no_grad()
@rows_as_they_are()
def _try(
    model: PreTrainedModel, bridge: AttentionBridge, decoder: DeviceDecoder, specs: Sequence[KVCacheSpec]
) -> float:
    """Compare logits, in the order opposite to the tokens', with the layers' own; return the error."""
    tolerance = TOLERANCE.get(model.dtype)
    if decoder.is_rounded and tolerance is not None:
        tolerance = max(tolerance, ROUNDED_TOLERANCE)
    if tolerance is None:
        raise NotRecognisedError(f"{model.dtype} is no dtype of the kernels")
    expected = layers_logits(model, bridge)
    decoder.bind(DenseBackend.make(specs, TRIAL_BLOCKS, TRIAL_BLOCK, model.device))
    logits = []
    for step in trial_steps(model):
        metadata = AttentionMetadata(
            num_tokens=len(step.positions),
            query_start=np.array(step.query_start, np.int32),
            seq_lens=np.array(step.seq_lens, np.int32),
            block_tables=np.array(step.block_tables, np.int32),
            slot_mapping=step.slots,
            block_size=TRIAL_BLOCK,
        )
        backwards = torch.arange(len(step.positions), device=model.device).flip(0)
        logits.append(decoder(step.input_ids, step.positions, backwards, metadata).flip(0))
    decoder.bind(None)
    return check_logits(expected, torch.cat(logits), tolerance)


@attrs.define(slots=True, eq=False)
class DenseBlocks:
    """Zeroed keys and values."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    block_size: int


@attrs.define(slots=True, eq=False)
class DenseBackend:
    """Attention over blocks in plain torch, sequence by sequence, for trials."""

    blocks: DenseBlocks

    @classmethod
    def make(cls, specs: Sequence[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> DenseBackend:
        """With zeroed blocks."""
        keys, values = (
            [
                torch.zeros(num_blocks, spec.num_kv_heads, block_size, spec.head_size, dtype=spec.dtype, device=device)
                for spec in specs
            ]
            for _ in range(2)
        )
        return cls(DenseBlocks(keys, values, block_size))

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        pdl: bool = False,
        **call: Any,  # noqa: ANN401 (the fields of AttentionCall)
    ) -> torch.Tensor:
        """See ``DeviceBackend``."""
        output = torch.empty_like(query)
        bounds = metadata.query_start.tolist()
        for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
            table = torch.from_numpy(metadata.block_tables[index].astype(np.int64)).to(query.device)
            keys, values = (
                blocks[table].transpose(1, 2).flatten(0, 1)[: int(metadata.seq_lens[index])]
                for blocks in (self.blocks.keys[layer], self.blocks.values[layer])
            )
            output[begin:end] = dense_attention(query[begin:end], keys, values, AttentionCall(**call))
        return output
