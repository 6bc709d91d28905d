"""Gives whole groups of sequences room for new tokens, or gives none of them any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.errors import BlockPoolError
from folo_core.kv_cache.block_pool import BlockPool
from folo_core.kv_cache.block_table import BlockTable, blocks_for
from folo_core.kv_cache.prefix_cache import PrefixCacheStats, PrefixIndex, extend_digests
from folo_core.kv_cache.swap import SwapSpace

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from folo_core.kv_cache.swap import Pair
    from folo_core.sequence import Sequence


@attrs.frozen(slots=True, kw_only=True)
class KVCacheUsage:
    """How the blocks of a device and of the host are used; in bytes, multiply by ``block_bytes``."""

    block_size: int
    """Tokens in a block."""
    block_bytes: int
    """Bytes of a block's keys and values over all layers; 0 if nobody said."""
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    """Referenced by nobody, kept for what they hold."""
    num_host_blocks: int
    num_free_host_blocks: int

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_free_blocks - self.num_cached_blocks


class KVCacheManager:
    """The scheduler's view of KV memory, in blocks. It never touches a tensor."""

    def __init__(  # noqa: PLR0913 (one for each part that may be left out)
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = False,
        prefix_cache_size: int | None = None,
        num_host_blocks: int = 0,
        block_bytes: int = 0,
    ) -> None:
        """Create the books of an empty cache.

        Args:
            num_blocks: device blocks, the null block included.
            block_size: tokens in a block.
            enable_prefix_caching: keep what blocks hold when nobody references them, for those who begin alike.
            prefix_cache_size: most blocks kept for that; None for as many as are free.
            num_host_blocks: blocks on the host to swap to; 0 for none.
            block_bytes: bytes of a block, for ``usage``.
        """
        self.index = PrefixIndex() if enable_prefix_caching else None
        self.pool = BlockPool(num_blocks, self.index, prefix_cache_size)
        self.swap = SwapSpace(num_host_blocks) if num_host_blocks else None
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.stats = PrefixCacheStats()

    def begin_step(self) -> None:
        """Settle what the step before left to do. Called before each step is scheduled."""
        if self.swap is not None:
            self.swap.begin_step()

    def most_blocks(self, num_prompt_tokens: int, num_tokens: int, num_sequences: int) -> int:
        """Return how many blocks sequences of ``num_tokens`` tokens hold that share a prompt and nothing else."""
        shared = num_prompt_tokens // self.block_size
        return shared + (blocks_for(num_tokens, self.block_size) - shared) * num_sequences

    def usage(self) -> KVCacheUsage:
        """Return how the blocks are used."""
        host = None if self.swap is None else self.swap.pool
        return KVCacheUsage(
            block_size=self.block_size,
            block_bytes=self.block_bytes,
            num_blocks=self.pool.num_usable,
            num_free_blocks=self.pool.num_free,
            num_cached_blocks=self.pool.num_cached,
            num_host_blocks=0 if host is None else host.num_usable,
            num_free_host_blocks=0 if host is None else host.num_free,
        )

    # --- the beginning that others have computed ------------------------------------------------------------------

    def match(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Return the blocks that hold a sequence's longest known beginning of fewer than ``num_tokens`` tokens."""
        if self.index is None:
            return []
        size, tokens, blocks = self.block_size, sequence.data.token_ids, []
        digests = extend_digests(sequence, (num_tokens - 1) // size, size)
        for place in range((num_tokens - 1) // size):
            content = tokens[place * size : (place + 1) * size]
            block = self.index.find(digests[place + 1], digests[place], content)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def fits(self, found: list[int], num_tokens: int, spare: int) -> bool:
        """Whether a sequence of ``num_tokens`` tokens that begins with the blocks ``found`` leaves ``spare`` blocks."""
        taken_back = sum(map(self.pool.is_cached, found))
        needed = blocks_for(num_tokens, self.block_size) - len(found)
        return needed + spare <= self.pool.num_available - taken_back

    def adopt(self, sequence: Sequence, found: list[int]) -> None:
        """Start a sequence without memory on blocks that hold its beginning."""
        table = self._table(sequence)
        table.adopt(found, len(found) * self.block_size)
        sequence.num_computed_tokens = table.num_tokens
        sequence.num_indexed_blocks = len(found)

    def commit(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Let others find the full blocks among a sequence's first ``num_computed_tokens``, now that they are written.

        Called when a step's result is here, and not before: what a failed step wrote must never be found.
        """
        table = sequence.block_table
        if self.index is None or table is None:
            return
        full = min(num_computed_tokens, table.num_tokens, sequence.num_tokens) // self.block_size
        if full <= sequence.num_indexed_blocks:
            return  # most steps fill no block, and a fork's list of tokens would be made for nothing
        size, tokens = self.block_size, sequence.data.token_ids
        digests = extend_digests(sequence, full, size)
        for place in range(sequence.num_indexed_blocks, full):
            content = tokens[place * size : (place + 1) * size]
            self.index.add(table.blocks[place], digests[place + 1], digests[place], content)
        sequence.num_indexed_blocks = full

    def reset_prefix_cache(self) -> None:
        """Forget what every block holds. Sequences keep the blocks that they have."""
        self.pool.forget_all()

    # --- room for new tokens --------------------------------------------------------------------------------------

    def extend(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int]) -> list[Pair | None] | None:
        """Make room for ``counts[i]`` new tokens of ``sequences[i]``, for all of them or for none.

        Returns:
            Per sequence, the ``(source, destination)`` block to copy before the step writes, or None for no copy;
            None instead of the list if the pool has too few blocks, and then nothing has changed.
        """
        tables = [self._table(sequence) for sequence in sequences]
        needed, writers = 0, dict[int, int]()
        for table, count in zip(tables, counts, strict=True):
            needed += table.missing_blocks(count)
            if count and (tail := table.shared_tail()) is not None:
                writers[tail] = writers.get(tail, 0) + 1
        # The last holder of a shared block writes in place.
        needed += sum(min(count, self.pool.references(tail) - 1) for tail, count in writers.items())
        if needed > self.pool.num_available:
            return None
        return [table.append_tokens(count) for table, count in zip(tables, counts, strict=True)]

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget what was computed past ``num_tokens``."""
        if sequence.block_table is not None:
            sequence.block_table.truncate(num_tokens)
        sequence.num_computed_tokens = num_tokens
        sequence.num_indexed_blocks = min(sequence.num_indexed_blocks, num_tokens // self.block_size)

    def release(self, sequence: Sequence) -> list[int]:
        """Return a sequence's blocks to the pool, on the host too; it has computed nothing afterwards.

        Returns:
            The device blocks it held, some of which others may still hold.
        """
        held = [] if sequence.spare_block is None else [sequence.spare_block]
        self.drop_spares([sequence])
        table, sequence.block_table = sequence.block_table, None
        sequence.num_computed_tokens = sequence.num_indexed_blocks = sequence.num_pending = 0
        if self.swap is not None and sequence.host_blocks:
            self.swap.drop(sequence.host_blocks)
            sequence.host_blocks = []
        return held if table is None else held + table.release()

    # --- rows that go on with each other's blocks -----------------------------------------------------------------

    def reserve_spares(self, sequences: SequenceOf[Sequence]) -> bool:
        """Give each sequence of a group a spare block, if its next token does not begin a block.

        Returns:
            False if the pool has too few, and then nothing has changed.
        """
        if sequences[0].num_computed_tokens % self.block_size == 0:
            self.drop_spares(sequences)
            return True
        bare = [sequence for sequence in sequences if sequence.spare_block is None]
        if len(bare) > self.pool.num_available:
            return False
        for sequence, block in zip(bare, self.pool.allocate(len(bare)), strict=True):
            sequence.spare_block = block
        return True

    def drop_spares(self, sequences: SequenceOf[Sequence]) -> None:
        """Return the spare blocks of these sequences to the pool."""
        for sequence in sequences:
            if sequence.spare_block is not None:
                self.pool.release([sequence.spare_block])
                sequence.spare_block = None

    def regroup(self, sequences: SequenceOf[Sequence], parents: SequenceOf[int], *, is_late: bool) -> None:
        """Give each sequence of a group the blocks that its parent has.

        Args:
            sequences: a group whose sequences have computed equally many tokens.
            parents: the sequence, counted from the first, that each one continues from here on.
            is_late: whether the next step has begun: then the device has done this already, as ``Regrouping`` says,
                and the last token that was computed is each one's own.
        """
        size = self.block_size
        computed = sequences[0].num_computed_tokens - is_late
        kept = computed // size if is_late else blocks_for(computed, size)
        tables = [self._table(sequence).blocks for sequence in sequences]
        changed = [(row, parent) for row, parent in enumerate(parents) if row != parent]
        leads = [tables[parent][:kept] for _, parent in changed]
        apart = [_first_difference(lead, tables[row]) for lead, (row, _) in zip(leads, changed, strict=True)]
        for lead, first in zip(leads, apart, strict=True):  # before any is let go, which might free it
            self.pool.share(lead[first:])
        for lead, first, (row, _) in zip(leads, apart, changed, strict=True):
            self.pool.release(tables[row][first:kept])
            tables[row][:kept] = lead
            if is_late and computed % size:
                sequence = sequences[row]
                assert sequence.spare_block is not None  # noqa: S101 (reserved before the step that is under way)
                tables[row][kept], sequence.spare_block = sequence.spare_block, tables[row][kept]

    # --- to the host and back ---------------------------------------------------------------------------------------

    def swap_out(self, sequences: SequenceOf[Sequence]) -> list[Pair] | None:
        """Move a group's blocks to the host: what it has computed stays computed, and what is shared stays shared.

        Returns:
            (device block, host block) pairs to copy before anybody writes; None if the host has no room, and then
            nothing has changed.
        """
        held = {block for s in sequences if s.block_table is not None for block in s.block_table.blocks}
        if self.swap is None or len(held) > self.swap.pool.num_available:
            return None
        for sequence in sequences:
            # Steps in flight may bring newest tokens that are dropped with their rows: they will be run again.
            sequence.num_pending = 0
            self.drop_spares([sequence])
            self.truncate(sequence, min(sequence.num_computed_tokens, sequence.num_tokens - 1))
        tables = [[] if s.block_table is None else s.block_table.blocks for s in sequences]
        host_tables, pairs = self.swap.store(tables)
        for sequence, host_table in zip(sequences, host_tables, strict=True):
            sequence.host_blocks = host_table
            if sequence.block_table is not None:
                sequence.block_table.release()
                sequence.block_table = None
                sequence.num_indexed_blocks = 0
        return pairs

    def swap_in(self, sequences: SequenceOf[Sequence], spare: int) -> list[Pair] | None:
        """Bring a group's blocks back, if ``spare`` more remain then.

        Returns:
            (host block, device block) pairs to copy; None if the device has no room, and then nothing has changed.
        """
        lying = {block for sequence in sequences for block in sequence.host_blocks}
        if self.swap is None or len(lying) + spare > self.pool.num_available:
            return None
        tables, pairs = self.pool.mirror([sequence.host_blocks for sequence in sequences])
        for sequence, blocks in zip(sequences, tables, strict=True):
            if blocks:
                table = self._table(sequence)
                table.blocks, table.num_tokens = blocks, sequence.num_computed_tokens
                self.swap.read(sequence.host_blocks)
                sequence.host_blocks = []
        return pairs

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Check all books against all sequences that exist, and what the index says of their blocks.

        Raises:
            BlockPoolError: the books do not balance, or a block is known to hold what its owner's tokens are not.
        """
        known = list(sequences)
        spares = [s.spare_block for s in known if s.spare_block is not None]
        self.pool.check_integrity([*(s.block_table.blocks for s in known if s.block_table is not None), spares])
        if self.swap is not None:
            self.swap.check_integrity([sequence.host_blocks for sequence in known])
        for sequence in known:
            self._check_contents(sequence)

    def _check_contents(self, sequence: Sequence) -> None:
        table, size = sequence.block_table, self.block_size
        if table is None or self.index is None:
            return
        full = min(table.num_tokens, sequence.num_tokens) // size
        tokens, digests = sequence.data.token_ids, extend_digests(sequence, full, size)
        for place, block in enumerate(table.blocks[:full]):
            content = tokens[place * size : (place + 1) * size]
            if block in self.index and self.index.contents(block) != (digests[place], content):
                message = f"block {block} is known to hold other tokens than sequence {sequence.seq_id}'s {content}"
                raise BlockPoolError(message)

    def _table(self, sequence: Sequence) -> BlockTable:
        if sequence.block_table is None:
            sequence.block_table = BlockTable(self.pool, self.block_size)
        return sequence.block_table


def _first_difference(lead: list[int], other: list[int]) -> int:
    """Return where two tables of sequences that were one part: from there on they have no block in common."""
    place = len(lead)
    while place and lead[place - 1] != other[place - 1]:
        place -= 1
    return place if lead[:place] == other[:place] else 0
