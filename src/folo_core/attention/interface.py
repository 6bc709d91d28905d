"""What an attention backend is: it owns the KV tensors' layout, writes new keys and values, and attends over blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    import numpy as np
    import torch


@attrs.frozen(slots=True, kw_only=True)
class KVCacheSpec:
    """Shape of one layer's keys and values. All attention layers of a model need not share one."""

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    v_head_size: int | None = None
    """Head size of the values when it differs from the keys'; None when equal."""
    k_scale: float = 1.0
    """What is stored is ``key / k_scale``, and what is read is multiplied by it. Other than 1 only where ``dtype`` is
    float8, which a backend stores only if it has the capability ``fp8-kv``."""
    v_scale: float = 1.0
    """As ``k_scale``, for values."""

    def bytes_per_token(self) -> int:
        """Bytes that one token's key and value take in this layer."""
        value_size = self.head_size if self.v_head_size is None else self.v_head_size
        return self.num_kv_heads * (self.head_size + value_size) * self.dtype.itemsize


@attrs.frozen(slots=True, kw_only=True)
class Regrouping:
    """Which row's blocks each row of a decode step goes on with, where the device alone knows that.

    The tables and slots of the step are what the host knows: those of the step before. A row whose parent is itself
    keeps them. Any other takes its parent's blocks but for the last one, which it writes to. Where the new token begins
    a block, that block is the row's own. Else it is the row's spare, into which the parent's last block is copied
    first, in every layer; all of them are read before any is written.
    """

    parents: torch.Tensor
    """int64 ``[num_seqs]`` on the device: the row of the step that each row continues."""
    groups: list[tuple[int, int]]
    """First row and number of the rows of each group; a parent is of its row's group. Other rows keep their blocks."""
    spares: np.ndarray
    """int32 ``[num_seqs]``: a block that nobody else holds, for rows of groups whose new token does not begin one."""


@attrs.define(slots=True, kw_only=True)
class AttentionMetadata:
    """One step's packed batch. Tokens of all sequences lie end to end along one axis, without padding.

    Host arrays (numpy) are for backends that plan on the CPU, tensors are on the model's device.
    Block 0 is the null block: no sequence owns it, and padding entries of a block table point to it.
    """

    num_tokens: int
    """Number of new tokens in the step, over all sequences."""
    query_start: np.ndarray
    """int32 ``[num_seqs + 1]``: sequence ``i``'s new tokens are ``query_start[i]:query_start[i + 1]``."""
    seq_lens: np.ndarray
    """int32 ``[num_seqs]``: tokens to attend over, the new ones included."""
    block_tables: np.ndarray
    """int32 ``[num_seqs, max_blocks]``: the blocks of each sequence in order, padded with 0."""
    slot_mapping: torch.Tensor
    """int64 ``[num_tokens]``: where each new token's key and value go: ``block * block_size + offset``."""
    block_size: int
    query_start_device: torch.Tensor | None = None
    """``query_start`` on the device, for backends that ask for it (``wants_device_metadata``)."""
    seq_lens_device: torch.Tensor | None = None
    block_tables_device: torch.Tensor | None = None
    is_captured: bool = False
    """That the step is recorded into a graph, or replays one: what is launched may depend on the number of rows alone.
    Each row is one new token; those of length 0 in ``seq_lens`` are padding, of which the output is not read."""
    regrouping: Regrouping | None = None
    """Whose blocks rows go on with; None where the tables say it all. Only for a ``RegroupingBackend``."""
    plan: object | None = None
    """What ``AttentionBackend.plan`` returned for this step: shared by all layers, private to the backend."""

    def to_device(self, device: torch.device) -> None:
        """Fill in the ``*_device`` tensors, for backends that ask for them."""
        import torch

        self.query_start_device = torch.from_numpy(self.query_start).to(device, non_blocking=True)
        self.seq_lens_device = torch.from_numpy(self.seq_lens).to(device, non_blocking=True)
        self.block_tables_device = torch.from_numpy(self.block_tables).to(device, non_blocking=True)


@runtime_checkable
class AttentionBackend(Protocol):
    """Paged attention for all layers of one model. One instance per engine.

    A backend whose attribute ``supports_graphs`` is true can serve steps that are recorded once and replayed
    (``AttentionMetadata.is_captured``): its ``plan`` then fills tensors that stay in place.
    """

    wants_device_metadata: bool
    """True if the backend reads the ``*_device`` tensors of AttentionMetadata."""

    def allocate(self, specs: list[KVCacheSpec], num_blocks: int, block_size: int, device: torch.device) -> None:
        """Allocate zeroed keys and values of every layer for ``num_blocks`` blocks. Called once."""

    def plan(self, metadata: AttentionMetadata) -> object:
        """Work shared by all layers of a step (sorting, index tensors). Called once per step."""

    def forward(  # noqa: PLR0913 (a layer's whole call)
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
        """Write the new keys and values into the blocks, then attend causally.

        Args:
            layer: index of the attention layer.
            query: ``[num_tokens, num_heads, head_size]``.
            key: ``[num_tokens, num_kv_heads, head_size]``.
            value: ``[num_tokens, num_kv_heads, v_head_size]``.
            metadata: the step's packed batch.
            scale: factor on query-key products before the softmax.
            sliding_window: each token sees itself and the ``sliding_window - 1`` tokens before it; None for all.
            softcap: ``softcap * tanh(x / softcap)`` on scores before the softmax; None for none.

        Returns:
            ``[num_tokens, num_heads, v_head_size]``.
        """

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks in every layer, in one batched operation that reads all sources before it writes."""

    def zero_blocks(self, blocks: list[int]) -> None:
        """Overwrite blocks with zeros in every layer, so that a NaN left behind cannot reach the next owner."""


@runtime_checkable
class RegroupingBackend(AttentionBackend, Protocol):
    """A backend whose rows may go on with each other's blocks without the host's knowing.

    Its ``plan`` then relies on nothing but what all rows of a group share.
    """

    def regroup(self, metadata: AttentionMetadata) -> None:
        """Carry out ``metadata.regrouping`` after the step is planned and before it runs, without waiting.

        Rewrites the planned tables and ``metadata.slot_mapping`` in place, and copies blocks.
        """


@runtime_checkable
class SwappingBackend(AttentionBackend, Protocol):
    """A backend that can move blocks to the host and back, for ``swap_space``.

    Copies take effect in the order of the calls, and before what the device is asked to do after them. Within that,
    they may still be under way when a call returns.
    """

    def allocate_host(self, num_blocks: int) -> None:
        """Allocate room on the host for blocks 1 to ``num_blocks`` of all layers. Called once, after ``allocate``."""

    def swap_out(self, device_blocks: list[int], host_blocks: list[int]) -> None:
        """Copy each device block to the host block beside it."""

    def swap_in(self, host_blocks: list[int], device_blocks: list[int]) -> None:
        """Copy each host block to the device block beside it."""
