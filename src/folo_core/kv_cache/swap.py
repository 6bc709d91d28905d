"""Host blocks: where the keys and values of preempted sequences wait for their return. Bookkeeping only, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.kv_cache.block_pool import BlockPool

if TYPE_CHECKING:
    from collections.abc import Sequence

Table = list[int]
Pair = tuple[int, int]
"""A block to copy from and one to copy to."""


class SwapSpace:
    """Gives device blocks a place on the host, and keeps what is shared there shared.

    Within one step the executor copies out before it copies in, so a host block that a step reads must not be
    given away in the same step: it is free only when the next one begins.
    """

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks + 1)
        self._read_in_this_step: list[int] = []

    def begin_step(self) -> None:
        """Free what the step before has read."""
        self.pool.release(self._read_in_this_step)
        self._read_in_this_step = []

    def store(self, tables: Sequence[Table]) -> tuple[list[Table], list[Pair]]:
        """Find host blocks for every block of these tables, one for a block that several tables hold.

        Returns:
            The host tables, and (device block, host block) pairs to copy.

        Raises:
            OutOfBlocksError: there is no room; nothing has changed.
        """
        return self.pool.mirror(tables)

    def drop(self, blocks: Table) -> None:
        """Give up a host table that nobody will read any more."""
        self.pool.release(blocks)

    def read(self, blocks: Table) -> None:
        """Give up a host table that this step copies from."""
        self._read_in_this_step += blocks

    def check_integrity(self, tables: Sequence[Table]) -> None:
        """Check the books against every host table there is.

        Raises:
            BlockPoolError: they do not balance.
        """
        self.pool.check_integrity([*tables, self._read_in_this_step])
