"""A sequence's blocks in order, shared copy-on-write with its forks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folo_core.kv_cache.block_pool import BlockPool


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks ``num_tokens`` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // block_size)


class BlockTable:
    """Maps token positions to blocks: position ``p`` lives in ``blocks[p // block_size]``.

    ``len(blocks) == ceil(num_tokens / block_size)`` holds after every call.
    """

    __slots__ = ("block_size", "blocks", "num_tokens", "pool")

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.blocks: list[int] = []
        self.num_tokens = 0

    def missing_blocks(self, count: int) -> int:
        """Return how many new blocks ``count`` more tokens need, copies on write not counted."""
        return blocks_for(self.num_tokens + count, self.block_size) - len(self.blocks)

    def shared_tail(self) -> int | None:
        """Return the partly filled last block if a write to it must copy it first, else None."""
        if self.num_tokens % self.block_size == 0:
            return None
        tail = self.blocks[-1]
        return tail if self.pool.references(tail) > 1 else None

    def append_tokens(self, count: int) -> tuple[int, int] | None:
        """Make room for ``count`` more tokens that this table alone will write.

        Returns:
            ``(source, destination)`` if a shared tail block was replaced and must be copied, else None.

        Raises:
            OutOfBlocksError: the pool has too few; nothing has changed.
        """
        tail = self.shared_tail() if count else None
        wanted = self.missing_blocks(count) + (tail is not None)
        fresh = self.pool.allocate(wanted) if wanted else []
        copy = None
        if tail is not None:
            copy = (tail, fresh.pop(0))
            self.pool.leave(tail)
            self.blocks[-1] = copy[1]
        elif count and self.num_tokens % self.block_size:
            # Cut back into a block that was full: what the index says of it is about to become untrue.
            self.pool.forget(self.blocks[-1])
        self.blocks += fresh
        self.num_tokens += count
        return copy

    def has_place(self) -> bool:
        """Whether one more token takes no block: the last one is not full, and nobody else holds it."""
        return self.num_tokens % self.block_size != 0 and self.pool.references(self.blocks[-1]) == 1

    def append_in_place(self) -> bool:
        """Make room for one more token where the table ``has_place``, as ``append_tokens(1)`` would.

        Returns:
            False where it has none, and then nothing has changed.
        """
        if self.num_tokens % self.block_size == 0:
            return False
        tail, pool = self.blocks[-1], self.pool
        if pool.references(tail) > 1:
            return False
        if pool.index is not None:
            pool.forget(tail)
        self.num_tokens += 1
        return True

    def truncate(self, num_tokens: int) -> None:
        """Forget every token past ``num_tokens``, and return the blocks that no longer hold any."""
        keep = blocks_for(num_tokens, self.block_size)
        self.pool.release(self.blocks[keep:])
        del self.blocks[keep:]
        self.num_tokens = num_tokens

    def adopt(self, blocks: list[int], num_tokens: int) -> None:
        """Start an empty table with blocks that it shares with whoever holds them, or with the cache.

        Raises:
            BlockPoolError: one of them is free; nothing has changed.
        """
        self.pool.share(blocks)
        self.blocks = blocks.copy()
        self.num_tokens = num_tokens

    def fork(self) -> BlockTable:
        """Return a table over the same blocks, each with one more reference; nothing is copied yet."""
        child = BlockTable(self.pool, self.block_size)
        child.adopt(self.blocks, self.num_tokens)
        return child

    def release(self) -> list[int]:
        """Drop every reference, forget all tokens, and return the blocks that were held."""
        held, self.blocks, self.num_tokens = self.blocks, [], 0
        self.pool.release(held)
        return held
