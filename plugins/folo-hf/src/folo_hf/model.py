"""A transformers model that runs packed batches through paged attention."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING

import torch

from folo_hf.attention import PagedTarget
from folo_hf.native import packed_matrices
from folo_kernels.store import BlockStore, PackedStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from folo_core.attention.interface import AttentionBackend, AttentionMetadata
    from folo_core.execution.interface import ModelInfo
    from folo_hf.attention import AttentionBridge
    from folo_hf.decoder import NativeDecoder
    from folo_hf.device_decoder import DeviceDecoder
    from folo_hf.invariance import Guard
    from folo_hf.probe import ModelShape


class HfLoadedModel:
    """``LoadedModel`` over a transformers module."""

    def __init__(  # noqa: PLR0913 (what the loader found out)
        self,
        module: PreTrainedModel,
        bridge: AttentionBridge,
        shape: ModelShape,
        info: ModelInfo,
        *,
        guard: Guard = contextlib.nullcontext,
        decoder: NativeDecoder | None = None,
        device_decoder: DeviceDecoder | None = None,
    ) -> None:
        self.module = module
        self.matrices = list(packed_matrices(module))
        """What the kernels multiply by, the head last."""
        self.info = info
        self.kv_cache_specs = shape.specs
        self.device = module.device
        self._bridge = bridge
        self._layers = shape.layers
        self._guard = guard
        self._decoder = decoder
        self.device_decoder = device_decoder
        """The whole model in a CUDA device's kernels, for backends with blocks on the device; None if it has none."""
        self._target: PagedTarget | None = None
        self._chooses_rows = "logits_to_keep" in inspect.signature(module.forward).parameters
        bridge.release_with(self)

    def bind(self, backend: AttentionBackend) -> None:
        """Attach the backend that every attention layer calls from now on."""
        self._target = self._bridge.target = PagedTarget(backend, self._layers)
        if self._decoder is not None:
            store = getattr(backend, "store", None)
            self._decoder.bind(store if isinstance(store, BlockStore) else None)
        if self.device_decoder is not None:
            self.device_decoder.bind(backend)

    @property
    def supports_graphs(self) -> bool:
        """Whether steps can be recorded: they run in a device's kernels, over the bound backend's blocks."""
        return self.device_decoder is not None and self.device_decoder.is_bound

    def stage_seconds(self) -> dict[str, float]:
        """Seconds spent in each kind of work of native layers; empty where layers run through torch."""
        return {} if self._decoder is None else self._decoder.stage_seconds()

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Logits ``[rows, vocab_size]`` of the packed tokens that ``logits_indices`` names (see ``LoadedModel``)."""
        if self._target is None:
            raise RuntimeError("bind() an attention backend before forward()")
        if self.device_decoder is not None and self.device_decoder.is_bound:
            return self.device_decoder(input_ids, positions, logits_indices, metadata)
        if self._decoder is not None and isinstance(metadata.plan, PackedStep):
            self._decoder.step = metadata.plan
            if self._decoder.direct is not None:
                return self._decoder.direct(input_ids, positions, logits_indices)
        rows = {"logits_to_keep": logits_indices} if self._chooses_rows else {}
        self._target.metadata = metadata
        try:
            with self._guard():
                output = self.module(
                    input_ids=input_ids[None],
                    position_ids=positions[None],
                    use_cache=False,
                    return_dict=True,
                    **rows,
                )
        finally:
            self._target.metadata = None
        logits: torch.Tensor = output.logits[0]
        return logits if self._chooses_rows else logits[logits_indices]
