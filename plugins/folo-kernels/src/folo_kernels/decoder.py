"""A whole stack of decoder layers as one native call."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import attrs
import torch

from folo_kernels import library as native
from folo_kernels.matrix import Epilogue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_kernels.matrix import PackedMatrix
    from folo_kernels.store import BlockStore, PackedStep


@attrs.frozen(slots=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer: ``h += attention(norm(h))``, then ``h += feed_forward(norm(h))``.

    Norms are float32 factors of RMSNorm, ``x / sqrt(mean(x^2) + epsilon) * factor``.
    """

    input_norm: torch.Tensor
    """Before attention, ``[hidden]``."""
    feed_norm: torch.Tensor
    """Before the feed-forward."""
    qkv: PackedMatrix
    """Queries of all heads, then keys, then values."""
    out: PackedMatrix
    gate_up: PackedMatrix
    """Gated (see ``PackedMatrix``)."""
    down: PackedMatrix
    heads: int
    epsilon: float
    scale: float
    """Factor on scores."""
    gate: Epilogue = Epilogue.SILU_GATE
    window: int | None = None
    softcap: float | None = None
    query_norm: torch.Tensor | None = None
    """On each head's queries before they are turned, ``[key_size]``."""
    key_norm: torch.Tensor | None = None
    attention_norm: torch.Tensor | None = None
    """On what attention adds."""
    output_norm: torch.Tensor | None = None
    """On what the feed-forward adds."""


class DecoderStack:
    """Layers bound to a ``BlockStore``, whose layers are theirs in order."""

    def __init__(self, layers: Sequence[LayerWeights], store: BlockStore, hidden_size: int) -> None:
        self._library = native.load()
        self._keep = (list(layers), store)
        store.group = max(layer.heads // shape.kv_heads for layer, shape in zip(layers, store.shapes, strict=True))
        self._layers = (native.Layer * len(layers))(
            *(_layer(layer, store.native[index]) for index, layer in enumerate(layers))
        )
        self._native = native.Decoder(layers=self._layers, num_layers=len(layers), hidden_size=hidden_size)
        self._rotary = (native.Rotary * len(layers))()
        self._workspace = torch.empty(0)

    def run(self, hidden: torch.Tensor, rotary: Sequence[tuple[torch.Tensor, torch.Tensor]], step: PackedStep) -> None:
        """Run all layers, changing ``hidden`` (float32 ``[num_tokens, hidden]``, contiguous) in place.

        Args:
            hidden: the residual stream.
            rotary: each layer's cosines and sines, float32 ``[num_tokens, size]``, contiguous; the two halves of the
                first ``size`` features of a head are turned against each other.
            step: the packed batch.
        """
        for index, (cosine, sine) in enumerate(rotary):
            self._rotary[index] = native.Rotary(cosine.data_ptr(), sine.data_ptr())
        needed = self._library.workspace_floats(ctypes.byref(self._native), step.num_tokens)
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed)
        call = native.DecoderStep(hidden.data_ptr(), self._rotary, rotary[0][0].shape[-1], self._workspace.data_ptr())
        self._library.decode(ctypes.byref(self._native), ctypes.byref(call), ctypes.byref(step.native))

    def stage_seconds(self) -> dict[str, float]:
        """Seconds spent in each kind of work since the stack was made."""
        return dict(zip(native.STAGES, self._native.seconds, strict=True))


def normalise(x: torch.Tensor, factor: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm of float32 rows ``[rows, size]``, contiguous, with the kernels that the layers use."""
    y = torch.empty_like(x)
    native.load().normalise(x.data_ptr(), factor.data_ptr(), *x.shape, epsilon, y.data_ptr())
    return y


def _layer(weights: LayerWeights, store: native.Store) -> native.Layer:
    norms = ("input_norm", "query_norm", "key_norm", "attention_norm", "feed_norm", "output_norm")
    pointers = {name: _address(getattr(weights, name)) for name in norms}
    matrices = {name: ctypes.pointer(getattr(weights, name).native) for name in ("qkv", "out", "gate_up", "down")}
    return native.Layer(
        **pointers,
        **matrices,
        store=ctypes.pointer(store),
        heads=weights.heads,
        window=weights.window or 0,
        gate=weights.gate,
        epsilon=weights.epsilon,
        scale=weights.scale,
        softcap=weights.softcap or 0.0,
    )


def _address(norm: torch.Tensor | None) -> int | None:
    return None if norm is None else norm.data_ptr()
