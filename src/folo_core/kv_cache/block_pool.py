"""The pool of KV blocks: a reference count per block, and two queues of blocks that nobody references."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING

from folo_core.errors import BlockPoolError, OutOfBlocksError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from folo_core.kv_cache.prefix_cache import PrefixIndex

NULL_BLOCK = 0
"""Never owned: padding entries of block tables point to it."""


class BlockPool:
    """Owns ``num_blocks`` blocks, of which block 0 is the null block.

    A block is *referenced* by one or more tables, or *cached* (by none, but the index knows what it holds), or *free*.
    Fresh blocks are taken from the free ones first, the one freed longest ago, and then from the cached ones, the one
    used longest ago. A fresh pool hands out consecutive blocks.
    """

    __slots__ = ("_cached", "_free", "_references", "index", "most_cached", "num_blocks", "num_evicted")

    def __init__(self, num_blocks: int, index: PrefixIndex | None = None, most_cached: int | None = None) -> None:
        """Create a pool without a single referenced block.

        Args:
            num_blocks: the null block included.
            index: knows what blocks hold; None keeps nothing of a block that is released.
            most_cached: cached blocks to keep at most; None for no limit.

        Raises:
            BlockPoolError: there is no block to use.
        """
        if num_blocks < 2:  # noqa: PLR2004 (the null block and one to use)
            message = f"num_blocks={num_blocks}: a pool needs the null block and at least one more"
            raise BlockPoolError(message)
        self.num_blocks = num_blocks
        self.index = index
        self.most_cached = num_blocks if most_cached is None else most_cached
        self.num_evicted = 0
        self._references = [0] * num_blocks
        self._free = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can own: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody references and that hold nothing of use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody references, kept for what they hold until room is needed."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` can give: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    def references(self, block: int) -> int:
        """Return how many block tables hold ``block``."""
        return self._references[block]

    def is_cached(self, block: int) -> bool:
        """Whether nobody references ``block`` and it is kept for what it holds."""
        return block in self._cached

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, each with one reference, evicting cached ones if too few are free.

        Raises:
            OutOfBlocksError: fewer are available; nothing has changed.
        """
        if count > self.num_available:
            message = f"{count} blocks wanted, {self.num_available} of {self.num_usable} free"
            raise OutOfBlocksError(message)
        blocks = [self._free.popleft() for _ in range(min(count, len(self._free)))]
        if len(blocks) < count:
            # A beginning is evicted from its end. Ascending, its blocks are a run, which attention reads in place.
            blocks += sorted(self._evict() for _ in range(count - len(blocks)))
        for block in blocks:
            self._references[block] = 1
        return blocks

    def mirror(self, tables: Sequence[list[int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Take a block for every block of another pool's tables; what those share, the new tables share.

        Returns:
            The new tables, and (other pool's block, own block) pairs to copy.

        Raises:
            OutOfBlocksError: fewer are available; nothing has changed.
        """
        distinct = list(dict.fromkeys(block for table in tables for block in table))
        place = dict(zip(distinct, self.allocate(len(distinct)), strict=True))
        mirrored = [[place[block] for block in table] for table in tables]
        # Allocated with one reference each: the holders after the first share them.
        seen: set[int] = set()
        for table in mirrored:
            self.share([block for block in table if block in seen])
            seen.update(table)
        return mirrored, list(place.items())

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block, whether referenced or cached.

        Raises:
            BlockPoolError: one of them is free or null; nothing has changed.
        """
        references, unheld = self._references, list[int]()
        for block in blocks:
            count = references[block] = references[block] + 1
            if count == 1:
                unheld.append(block)
        for block in unheld:
            if block not in self._cached:
                for counted in blocks:
                    references[counted] -= 1
                message = f"block {block} is free: only a block that somebody holds can be shared"
                raise BlockPoolError(message)
        for block in unheld:
            del self._cached[block]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block; those that reach zero become cached or free.

        Of a table's blocks the last counts as used longest ago: without those before it, it would be of no use.

        Raises:
            BlockPoolError: one would drop below zero (a double free); nothing has changed.
        """
        references, unused = self._references, list[int]()
        for block in blocks:
            left = references[block] = references[block] - 1
            if left < 1:
                unused.append(block)
        if not unused:
            return
        if min(map(references.__getitem__, unused)) < 0:
            for block in blocks:
                references[block] += 1
            raise BlockPoolError(self._overdrawn(blocks))
        self._retire(unused)

    def _overdrawn(self, blocks: Sequence[int]) -> str:
        """Name a block among ``blocks`` that is dropped more often than it is held; so is the null block."""
        drops = Counter(blocks)
        block = next(block for block in blocks if self._references[block] < drops[block])
        return f"block {block} freed {drops[block]} times but referenced {self._references[block]} times"

    def _retire(self, unused: list[int]) -> None:
        """Keep those blocks, which nobody references now, that the index knows, and free the others."""
        index = self.index
        if index is None:
            self._free += unused
            return
        self._free += [block for block in unused if block not in index]
        self._cached |= dict.fromkeys(block for block in reversed(unused) if block in index)
        while len(self._cached) > self.most_cached:
            self._free.append(self._evict())

    def leave(self, block: int) -> None:
        """Drop one reference to a block that others hold too."""
        self._references[block] -= 1

    def forget(self, block: int) -> None:
        """Drop what the index knows about a block; if it was cached, it is free afterwards."""
        if self.index is not None:
            self.index.forget(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def forget_all(self) -> None:
        """Drop all that the index knows; no block is cached afterwards, and what is referenced stays so."""
        for block in [] if self.index is None else list(self.index):
            self.forget(block)

    def _evict(self) -> int:
        """Forget what the cached block used longest ago holds, and take it."""
        block, _ = self._cached.popitem(last=False)
        if self.index is not None:
            self.index.forget(block)
        self.num_evicted += 1
        return block

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check the books against every block table there is.

        Raises:
            BlockPoolError: free, cached and referenced blocks overlap or do not add up, a count is wrong, or the index
                knows of a block that is free.
        """
        counted = Counter(block for table in tables for block in table)
        free = set(self._free)
        if len(free) != len(self._free) or NULL_BLOCK in free or NULL_BLOCK in self._cached or counted[NULL_BLOCK]:
            message = "the free queue holds a block twice, or the null block is in use"
            raise BlockPoolError(message)
        for block in range(1, self.num_blocks):
            held = counted[block]
            places = (held > 0) + (block in free) + (block in self._cached)
            if self._references[block] != held or places != 1:
                message = (
                    f"block {block}: {held} tables hold it, its count says {self._references[block]}, "
                    f"it is {'' if block in free else 'not '}in the free queue "
                    f"and {'' if block in self._cached else 'not '}cached"
                )
                raise BlockPoolError(message)
        self._check_index(free)

    def _check_index(self, free: set[int]) -> None:
        if self.index is None:
            if self._cached:
                message = f"blocks {list(self._cached)} are cached, and there is no index that knows what they hold"
                raise BlockPoolError(message)
            return
        unknown = [block for block in self._cached if block not in self.index]
        stale = [block for block in self.index if block in free or block == NULL_BLOCK]
        if unknown or stale or len(self._cached) > self.most_cached:
            message = (
                f"cached blocks {unknown} hold nothing that the index knows, free blocks {stale} still do, "
                f"and {len(self._cached)} of at most {self.most_cached} are cached"
            )
            raise BlockPoolError(message)
