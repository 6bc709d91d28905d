"""Block pool, block tables and the manager: the books always balance and a parent's blocks are never written."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from folo_core.errors import BlockPoolError, OutOfBlocksError
from folo_core.kv_cache.block_pool import NULL_BLOCK, BlockPool
from folo_core.kv_cache.block_table import BlockTable, blocks_for
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.sequence import Sequence, SequenceData


def test_a_fresh_pool_hands_out_consecutive_blocks_and_never_the_null_block() -> None:
    pool = BlockPool(6)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(2) == [4, 5]
    assert NULL_BLOCK == 0
    assert pool.num_free == 0


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(OutOfBlocksError, match="2 blocks wanted, 1 of 3 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity([held])


def test_a_pool_needs_a_block_besides_the_null_block() -> None:
    with pytest.raises(BlockPoolError, match="num_blocks=1"):
        BlockPool(1)


@pytest.mark.parametrize("blocks", [[0], [3], [1, 3]])
def test_sharing_a_free_block_is_refused_and_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(BlockPoolError, match="is free"):
        pool.share(blocks)
    pool.check_integrity([held])


@pytest.mark.parametrize("blocks", [[0], [3], [1, 1], [2, 1, 3]])
def test_a_double_free_is_refused_and_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    with pytest.raises(BlockPoolError, match="freed"):
        pool.release(blocks)
    pool.check_integrity([held])


def test_the_block_freed_longest_ago_is_reused_first() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    pool.release([first[1]])
    pool.release([first[0]])
    assert pool.allocate(2) == [first[1], first[0]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.append(NULL_BLOCK),
        lambda pool: pool._free.pop(),
        lambda pool: pool._references.__setitem__(1, 2),
        lambda pool: pool._references.__setitem__(1, 0),
        lambda pool: pool._free.append(1),
    ],
)
def test_the_integrity_check_sees_every_kind_of_damage(spoil) -> None:
    pool = BlockPool(5)
    table = pool.allocate(2)
    pool.check_integrity([table])
    spoil(pool)
    with pytest.raises(BlockPoolError):
        pool.check_integrity([table])


def test_a_fork_shares_blocks_until_it_writes_and_then_copies_only_the_partial_one() -> None:
    pool = BlockPool(10)
    parent = BlockTable(pool, 4)
    parent.append_tokens(6)
    child = parent.fork()
    assert child.blocks == parent.blocks
    assert pool.num_free == 7
    source, destination = child.append_tokens(1)
    assert source == parent.blocks[1]
    assert child.blocks == [parent.blocks[0], destination]
    assert parent.append_tokens(1) is None, "the last holder writes in place"


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    pool = BlockPool(10)
    parent = BlockTable(pool, 4)
    parent.append_tokens(8)
    child = parent.fork()
    assert child.append_tokens(1) is None
    assert child.blocks[:2] == parent.blocks


def _sequence(manager: KVCacheManager, tokens: int, seq_id: int = 0) -> Sequence:
    sequence = Sequence(seq_id=seq_id, index=seq_id, data=SequenceData((1,)))
    assert manager.extend([sequence], [tokens]) == [None]
    return sequence


def test_one_token_goes_into_the_last_block_if_it_has_room_and_is_nobody_elses() -> None:
    pool = BlockPool(6)
    table = BlockTable(pool, 2)
    assert not table.has_place(), "no block yet"
    table.append_tokens(1)
    child = table.fork()
    assert not table.has_place(), "shared"
    child.release()
    assert table.has_place()
    table.append_in_place()
    assert (table.num_tokens, table.blocks) == (2, [1])
    assert not table.has_place(), "full"


def test_what_was_known_of_a_block_that_is_written_in_place_is_forgotten() -> None:
    kv = KVCacheManager(6, 2, enable_prefix_caching=True)
    sequence = Sequence(seq_id=0, index=0, data=SequenceData((1, 2, 3)))
    assert kv.extend([sequence], [2]) is not None
    kv.commit(sequence, 2)
    table = sequence.block_table
    assert table is not None
    assert table.blocks[0] in kv.index
    kv.truncate(sequence, 1)
    assert table.has_place()
    table.append_in_place()
    assert table.blocks[0] not in kv.index


def test_a_group_is_extended_whole_or_not_at_all() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    one, two = _sequence(manager, 4, 0), _sequence(manager, 4, 1)
    assert manager.extend([one, two], [1, 1]) is None
    assert manager.pool.num_free == 1
    assert len(one.block_table.blocks) == len(two.block_table.blocks) == 1
    manager.check_integrity([one, two])


def test_copies_are_counted_exactly_when_all_holders_write() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    parent = _sequence(manager, 2)
    children = [parent.fork(seq_id=i, index=i) for i in (1, 2)]
    family = [parent, *children]
    copies = manager.extend(family, [1, 1, 1])
    assert copies is not None
    assert [copy is None for copy in copies] == [False, False, True], "two copies, the last holder keeps the block"
    assert manager.pool.num_free == 0
    manager.check_integrity(family)


def test_a_group_that_needs_one_copy_too_many_is_refused() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    parent = _sequence(manager, 2)
    family = [parent, *(parent.fork(seq_id=i, index=i) for i in (1, 2))]
    assert manager.extend(family, [1, 1, 1]) is None
    manager.check_integrity(family)


def test_a_sequence_that_gets_no_tokens_copies_nothing() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    parent = _sequence(manager, 2)
    child = parent.fork(seq_id=1, index=1)
    assert manager.extend([parent, child], [0, 0]) == [None, None]
    assert child.block_table.blocks == parent.block_table.blocks


def test_what_can_never_fit_is_known_beforehand() -> None:
    manager = KVCacheManager(num_blocks=5, block_size=4)
    assert manager.most_blocks(0, 8, 2) == 4
    assert manager.most_blocks(7, 8, 2) == 3  # of the prompt, the full block is shared
    assert manager.most_blocks(8, 9, 2) == 4


class BlockTables(RuleBasedStateMachine):
    """Tables over one pool against a model that keeps every table's contents as plain lists.

    Contents are written through the tables with copy-on-write; each table must always read back its own.
    """

    SIZE = 3

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(14)
        self.memory: dict[int, list[int]] = {block: [-1] * self.SIZE for block in range(14)}
        self.tables: list[BlockTable] = []
        self.contents: list[list[int]] = []
        self.clock = 0

    def _write(self, place: int, count: int) -> None:
        table = self.tables[place]
        start = table.num_tokens
        copy = table.append_tokens(count)
        if copy is not None:
            self.memory[copy[1]] = self.memory[copy[0]].copy()
        for position in range(start, start + count):
            self.clock += 1
            block = table.blocks[position // self.SIZE]
            assert self.pool.references(block) == 1, "only a block of one's own is written"
            self.memory[block][position % self.SIZE] = self.clock
            self.contents[place].append(self.clock)

    @rule(count=st.integers(0, 7))
    def open(self, count: int) -> None:
        self.tables.append(BlockTable(self.pool, self.SIZE))
        self.contents.append([])
        self._append(len(self.tables) - 1, count)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(0, 7))
    def append(self, data: st.DataObject, count: int) -> None:
        self._append(data.draw(st.integers(0, len(self.tables) - 1)), count)

    def _append(self, place: int, count: int) -> None:
        before = self.tables[place].blocks.copy(), self.tables[place].num_tokens, self.pool.num_free
        try:
            self._write(place, count)
        except OutOfBlocksError:
            assert before == (self.tables[place].blocks, self.tables[place].num_tokens, self.pool.num_free)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.append(self.tables[place].fork())
        self.contents.append(self.contents[place].copy())

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.tables) - 1))
        keep = data.draw(st.integers(0, self.tables[place].num_tokens))
        self.tables[place].truncate(keep)
        del self.contents[place][keep:]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.pop(place).release()
        self.contents.pop(place)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity([table.blocks for table in self.tables])

    @invariant()
    def tables_are_exactly_as_long_as_needed(self) -> None:
        for table in self.tables:
            assert len(table.blocks) == blocks_for(table.num_tokens, self.SIZE)

    @invariant()
    def every_table_reads_back_its_own(self) -> None:
        for table, content in zip(self.tables, self.contents, strict=True):
            read = [self.memory[table.blocks[p // self.SIZE]][p % self.SIZE] for p in range(table.num_tokens)]
            assert read == content

    def teardown(self) -> None:
        for table in self.tables:
            table.release()
        assert self.pool.num_free == self.pool.num_usable


TestBlockTables = pytest.mark.slow(BlockTables.TestCase)
TestBlockTables.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
