"""Gives whole groups of sequences room for new tokens, or gives none of them any."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from folo_core.kv_cache.block_pool import BlockPool
from folo_core.kv_cache.block_table import BlockTable, blocks_for

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from folo_core.sequence import Sequence


class KVCacheManager:
    """The scheduler's view of KV memory, in blocks. It never touches a tensor."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size

    def most_blocks(self, num_prompt_tokens: int, num_tokens: int, num_sequences: int) -> int:
        """Return how many blocks sequences of ``num_tokens`` tokens hold that share a prompt and nothing else."""
        shared = num_prompt_tokens // self.block_size
        return shared + (blocks_for(num_tokens, self.block_size) - shared) * num_sequences

    def extend(self, sequences: SequenceOf[Sequence], counts: SequenceOf[int]) -> list[tuple[int, int] | None] | None:
        """Make room for ``counts[i]`` new tokens of ``sequences[i]``, for all of them or for none.

        Returns:
            Per sequence, the ``(source, destination)`` block to copy before the step writes, or None for no copy;
            None instead of the list if the pool has too few blocks, and then nothing has changed.
        """
        tables = [self._table(sequence) for sequence in sequences]
        needed = sum(map(BlockTable.missing_blocks, tables, counts))
        writing = [table for table, count in zip(tables, counts, strict=True) if count]
        if needed + self._copies_needed(writing) > self.pool.num_free:
            return None
        return [table.append_tokens(count) for table, count in zip(tables, counts, strict=True)]

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget what was computed past ``num_tokens``."""
        if sequence.block_table is not None:
            sequence.block_table.truncate(num_tokens)
        sequence.num_computed_tokens = num_tokens

    def release(self, sequence: Sequence) -> list[int]:
        """Return a sequence's blocks to the pool; it has computed nothing afterwards.

        Returns:
            The blocks it held, some of which others may still hold.
        """
        table, sequence.block_table = sequence.block_table, None
        sequence.num_computed_tokens = 0
        if table is None:
            return []
        held = table.blocks.copy()
        table.release()
        return held

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Check the pool against the tables of all sequences that exist.

        Raises:
            BlockPoolError: the books do not balance.
        """
        self.pool.check_integrity(s.block_table.blocks for s in sequences if s.block_table is not None)

    def _table(self, sequence: Sequence) -> BlockTable:
        if sequence.block_table is None:
            sequence.block_table = BlockTable(self.pool, self.block_size)
        return sequence.block_table

    def _copies_needed(self, tables: list[BlockTable]) -> int:
        """Count the tail copies these writes cause: the last holder of a shared block writes in place."""
        writers = Counter(tail for table in tables if (tail := table.shared_tail()) is not None)
        return sum(min(count, self.pool.references(tail) - 1) for tail, count in writers.items())
