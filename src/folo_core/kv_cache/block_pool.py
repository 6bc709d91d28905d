"""The pool of KV blocks: a free queue and a reference count per block."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from folo_core.errors import BlockPoolError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
"""Never owned: padding entries of block tables point to it."""


class BlockPool:
    """Owns ``num_blocks`` blocks, of which block 0 is the null block.

    Freed blocks join the end of the queue and fresh ones leave from its front, so the block freed longest ago
    is reused first, and a fresh pool hands out consecutive blocks.
    """

    __slots__ = ("_free", "_references", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:  # noqa: PLR2004 (the null block and one to use)
            message = f"num_blocks={num_blocks}: a pool needs the null block and at least one more"
            raise BlockPoolError(message)
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free = deque(range(1, num_blocks))

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can own: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    def references(self, block: int) -> int:
        """Return how many block tables hold ``block``."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, each with one reference.

        Raises:
            OutOfBlocksError: fewer are free; nothing has changed.
        """
        if count > len(self._free):
            message = f"{count} blocks wanted, {len(self._free)} of {self.num_usable} free"
            raise OutOfBlocksError(message)
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block.

        Raises:
            BlockPoolError: one of them is free or null; nothing has changed.
        """
        for block in blocks:
            if block == NULL_BLOCK or self._references[block] < 1:
                message = f"block {block} is free: only a block that somebody holds can be shared"
                raise BlockPoolError(message)
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block; those that reach zero become free.

        Raises:
            BlockPoolError: one would drop below zero (a double free); nothing has changed.
        """
        for block, drops in Counter(blocks).items():
            if block == NULL_BLOCK or self._references[block] < drops:
                message = f"block {block} freed {drops} times but referenced {self._references[block]} times"
                raise BlockPoolError(message)
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check the books against every block table there is.

        Raises:
            BlockPoolError: free and referenced blocks overlap or do not add up, or a count is wrong.
        """
        counted = Counter(block for table in tables for block in table)
        free = set(self._free)
        if len(free) != len(self._free) or NULL_BLOCK in free or counted[NULL_BLOCK]:
            message = "the free queue holds a block twice, or the null block is in use"
            raise BlockPoolError(message)
        for block in range(1, self.num_blocks):
            held = counted[block]
            if self._references[block] != held or (block in free) != (held == 0):
                message = (
                    f"block {block}: {held} tables hold it, its count says {self._references[block]}, "
                    f"and it is {'' if block in free else 'not '}in the free queue"
                )
                raise BlockPoolError(message)
