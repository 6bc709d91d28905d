"""Paged attention with Folo's own CPU kernels (``folo_kernels``): blocks are read where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_attention.host import HostBlocks
from folo_kernels.store import BlockStore, LayerShape, PackedStep

if TYPE_CHECKING:
    from folo_core.attention.interface import AttentionMetadata, KVCacheSpec


class NativeBackend:
    """``AttentionBackend`` and ``SwappingBackend`` over a ``BlockStore``, in float32 on a CPU.

    A model may run whole layers natively and attend without calling :meth:`forward`: ``store`` and what :meth:`plan`
    returns are what it needs.
    """

    wants_device_metadata = False
    store: BlockStore

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed blocks for each layer (see ``AttentionBackend``)."""
        shapes = [
            LayerShape(kv_heads=s.num_kv_heads, key_size=s.head_size, value_size=s.v_head_size or s.head_size)
            for s in specs
        ]
        self.store = BlockStore(shapes, num_blocks, block_size)
        self._num_blocks = num_blocks

    def plan(self, metadata: AttentionMetadata) -> PackedStep:
        """Cut the step into tiles."""
        return PackedStep(
            metadata.query_start, metadata.seq_lens, metadata.block_tables, metadata.slot_mapping, self.store.group
        )

    def forward(  # noqa: PLR0913 (the protocol's signature)
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values into their slots, then attend causally (see ``AttentionBackend``)."""
        plan = metadata.plan
        if not isinstance(plan, PackedStep):
            raise TypeError(f"metadata.plan: {type(plan).__name__}: give what plan() returned for this step")
        self.store.write(layer, plan, key, value)
        return self.store.attend(layer, plan, query, scale=scale, window=sliding_window, softcap=softcap)

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer."""
        source, destination = (torch.tensor(blocks, dtype=torch.int64) for blocks in (sources, destinations))
        for tensor in self.store.tensors():
            tensor.index_copy_(0, destination, tensor.index_select(0, source))

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for tensor in self.store.tensors():
            tensor.index_fill_(0, index, 0)

    def allocate_host(self, num_blocks: int) -> None:
        """Allocate room on the host for blocks 1 to ``num_blocks`` of all layers."""
        self._host = HostBlocks(self.store.tensors(), self._num_blocks, num_blocks)

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it, in every layer."""
        self._host.store(device_blocks, host_blocks)

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it, in every layer."""
        self._host.load(host_blocks, device_blocks)
