"""Paged attention on CUDA devices with Folo's Triton kernels: split decoding, shared prefixes, chunked prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_attention.host import HostBlocks
from folo_kernels.gpu.attention import PagedAttention, Scoring
from folo_kernels.gpu.blocks import DeviceBlocks, LayerShape
from folo_kernels.gpu.regroup import Moves, regroup
from folo_kernels.gpu.staging import StagedPlan

if TYPE_CHECKING:
    import torch

    from folo_core.attention.interface import AttentionMetadata, KVCacheSpec
    from folo_kernels.gpu.attention import Configs
    from folo_kernels.gpu.plan import Tuning


class TritonBackend:
    """``AttentionBackend`` and ``SwappingBackend`` over ``DeviceBlocks``.

    A model may write keys and values itself, within a kernel of its own, and then call :meth:`attend`: ``blocks`` is
    where they lie, divided by their layer's scales. No call waits for the device, and what a captured step launches
    depends on its rows alone.
    """

    wants_device_metadata = False
    supports_graphs = True
    blocks: DeviceBlocks

    def __init__(
        self,
        *,
        max_rows: int = 256,
        max_model_len: int | None = None,
        tuning: Tuning | None = None,
        configs: Configs | None = None,
    ) -> None:
        """Serve captured steps of up to ``max_rows`` sequences of up to ``max_model_len`` tokens.

        ``tuning`` and ``configs`` overrule what is known to be fast on the device.
        """
        self._max_rows = max_rows
        self._max_model_len = max_model_len
        self._tuning = tuning
        self._configs = configs

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed blocks for each layer (see ``AttentionBackend``)."""
        shapes = [
            LayerShape(
                kv_heads=s.num_kv_heads,
                key_size=s.head_size,
                value_size=s.v_head_size or s.head_size,
                dtype=s.dtype,
                key_scale=s.k_scale,
                value_scale=s.v_scale,
            )
            for s in specs
        ]
        self.blocks = DeviceBlocks(shapes, num_blocks, block_size, device)
        longest = num_blocks if self._max_model_len is None else -(-self._max_model_len // block_size)
        self.attention = PagedAttention(
            self.blocks,
            max_rows=self._max_rows,
            max_width=min(num_blocks, longest),
            tuning=self._tuning,
            configs=self._configs,
        )

    def plan(self, metadata: AttentionMetadata) -> StagedPlan:
        """Cut the step into work for the device, and put that there."""
        return self.attention.plan(
            metadata.query_start,
            metadata.seq_lens,
            metadata.block_tables,
            is_captured=metadata.is_captured,
            exchanging=[] if metadata.regrouping is None else metadata.regrouping.groups,
        )

    def regroup(self, metadata: AttentionMetadata) -> None:
        """Let rows go on with each other's blocks (see ``RegroupingBackend``)."""
        asked, plan = metadata.regrouping, metadata.plan
        if asked is None or not isinstance(plan, StagedPlan):
            message = f"regrouping {asked} of a step planned as {plan!r}: give the plan of this backend's plan()"
            raise TypeError(message)
        moves = Moves(parents=asked.parents, groups=asked.groups, spares=asked.spares)
        regroup(plan, metadata.slot_mapping, self.blocks, moves)

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
        self.attention.write(layer, key, value, metadata.slot_mapping)
        return self.attend(layer, query, metadata, scale=scale, sliding_window=sliding_window, softcap=softcap)

    def attend(  # noqa: PLR0913 (what attention depends on)
        self,
        layer: int,
        query: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        out: torch.Tensor | None = None,
        pdl: bool = False,
    ) -> torch.Tensor:
        """Attend causally over blocks that hold the step's new keys and values already.

        Args:
            layer: index of the attention layer.
            query: ``[num_tokens, num_heads, head_size]``, of any stride over tokens and heads.
            metadata: the step's packed batch.
            scale: factor on query-key products before the softmax.
            sliding_window: as for :meth:`forward`.
            softcap: as for :meth:`forward`.
            out: where the result goes, ``[num_tokens, num_heads, v_head_size]``; allocated if None.
            pdl: start decoding while the kernel before it still runs (see ``PagedAttention.attend``).
        """
        plan = metadata.plan
        if not isinstance(plan, StagedPlan):
            raise TypeError(f"metadata.plan: {type(plan).__name__}: give what plan() returned for this step")
        shape = self.blocks.shapes[layer]
        scoring = Scoring(
            scale=scale,
            window=sliding_window,
            softcap=softcap,
            k_scale=shape.key_scale,
            v_scale=shape.value_scale,
        )
        return self.attention.attend(layer, query, plan, scoring, out, pdl=pdl)

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer."""
        self.blocks.copy(sources, destinations)

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer."""
        self.blocks.zero(blocks)

    def allocate_host(self, num_blocks: int) -> None:
        """Allocate room on the host for blocks 1 to ``num_blocks`` of all layers."""
        self._host = HostBlocks(self.blocks.tensors(), self.blocks.num_blocks, num_blocks)

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it, in every layer."""
        self._host.store(device_blocks, host_blocks)

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it, in every layer."""
        self._host.load(host_blocks, device_blocks)
