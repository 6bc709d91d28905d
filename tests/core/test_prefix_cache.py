"""Which blocks are found again: digests, the index, and the manager's side of match, adopt and commit."""

from __future__ import annotations

import hashlib
import struct

import pytest

from folo_core.errors import BlockPoolError, OutOfBlocksError
from folo_core.kv_cache.block_pool import BlockPool
from folo_core.kv_cache.block_table import BlockTable
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.kv_cache.prefix_cache import PrefixCacheStats, PrefixIndex, PrefixRoots, chain, extend_digests
from folo_core.kv_cache.swap import SwapSpace
from folo_core.sequence import Sequence, SequenceData

SIZE = 4


def sequence_of(tokens, root=b"", seq_id=0):
    return Sequence(seq_id=seq_id, index=0, data=SequenceData(tuple(tokens)), block_digests=[root])


def manager_of(num_blocks=9, **options):
    return KVCacheManager(num_blocks, SIZE, **{"enable_prefix_caching": True} | options)


def compute(kv, sequence, count=None):
    """Give a sequence room for its next tokens, as if they had been computed, and let others find them."""
    count = sequence.num_uncomputed_tokens if count is None else count
    copies = kv.extend([sequence], [count])
    assert copies is not None
    sequence.num_computed_tokens += count
    kv.commit(sequence, sequence.num_computed_tokens)
    return copies[0]


# --- digests --------------------------------------------------------------------------------------------------------


def test_a_digest_is_sha256_of_the_digest_before_and_of_the_tokens_as_eight_bytes_each():
    assert chain(b"before", [1, 2**40]) == hashlib.sha256(b"before" + struct.pack("=2q", 1, 2**40)).digest()


def test_a_digest_tells_beginnings_orders_and_lengths_apart():
    digests = [chain(b"", [1, 2]), chain(b"x", [1, 2]), chain(b"", [2, 1]), chain(b"", [1]), chain(b"", [])]
    assert len(set(digests)) == len(digests)


def test_a_root_is_sha256_of_a_secret_a_framed_tenant_and_a_salt():
    roots = PrefixRoots()
    framed = (2).to_bytes(8, "little") + "ä".encode()
    assert roots.root("ä", "salt") == hashlib.sha256(roots._secret + framed + b"salt").digest()
    assert len(roots._secret) >= 32, "nobody guesses it"


def test_every_tenant_salt_and_process_has_a_root_of_its_own():
    roots, elsewhere = PrefixRoots(), PrefixRoots()
    names = [("", ""), ("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]
    found = [source.root(*name) for source in (roots, elsewhere) for name in names]
    assert len(set(found)) == len(found)
    assert found[: len(names)] == [roots.root(*name) for name in names], "and keeps it"


def test_a_name_that_is_no_valid_unicode_has_a_root_too():
    roots = PrefixRoots()
    assert roots.root("\ud800", "") != roots.root("\ud801", "")
    assert roots.root("", "\ud800") != roots.root("", "\ud801")


def test_a_sequences_digests_grow_block_by_block_and_are_computed_once():
    sequence = sequence_of(range(10), b"root")
    one = chain(b"root", [0, 1, 2, 3])
    assert extend_digests(sequence, 1, SIZE) == [b"root", one]
    assert extend_digests(sequence, 2, SIZE) == [b"root", one, chain(one, [4, 5, 6, 7])]
    sequence.block_digests[1] = b"kept"
    assert extend_digests(sequence, 1, SIZE)[1] == b"kept"
    assert len(sequence.block_digests) == 3, "asking for fewer drops none"


# --- the index ------------------------------------------------------------------------------------------------------


def index_of(**blocks):
    index = PrefixIndex()
    for name, (block, tokens) in blocks.items():
        index.add(block, name.encode(), b"", tokens)
    return index


def test_a_block_is_found_by_its_digest_and_known_by_its_number():
    index = index_of(a=(3, [1, 2]), b=(5, [3, 4]))
    assert index.find(b"a", b"", [1, 2]) == 3
    assert index.find(b"c", b"", [1, 2]) is None
    assert (len(index), list(index), 3 in index, 4 in index) == (2, [3, 5], True, False)
    assert index.contents(5) == (b"", [3, 4])
    with pytest.raises(KeyError):
        index.contents(4)


@pytest.mark.parametrize(("parent", "tokens"), [(b"other", [1, 2]), (b"", [1, 3])])
def test_should_two_beginnings_have_one_digest_neither_is_taken_for_the_other(parent, tokens):
    assert index_of(a=(3, [1, 2])).find(b"a", parent, tokens) is None


def test_of_two_blocks_with_the_same_content_the_first_is_known():
    index = index_of(a=(3, [1, 2]))
    index.add(4, b"a", b"", [1, 2])
    assert list(index) == [3]
    assert index.find(b"a", b"", [1, 2]) == 3


def test_a_block_that_is_known_is_not_given_another_content():
    index = index_of(a=(3, [1, 2]))
    index.add(3, b"b", b"", [3, 4])
    assert index.contents(3) == (b"", [1, 2])
    assert index.find(b"b", b"", [3, 4]) is None


def test_what_is_forgotten_is_found_no_more_and_can_be_added_again():
    index = index_of(a=(3, [1, 2]), b=(5, [3, 4]))
    index.forget(3)
    index.forget(3)
    index.forget(99)
    assert list(index) == [5]
    assert index.find(b"a", b"", [1, 2]) is None
    index.add(7, b"a", b"", [1, 2])
    assert index.find(b"a", b"", [1, 2]) == 7


def test_an_index_is_sound_if_both_directions_agree_and_digests_are_those_of_the_tokens():
    def fresh():
        index = PrefixIndex()
        index.add(3, chain(b"", [1, 2]), b"", [1, 2])
        index.add(4, chain(b"", [3, 4]), b"", [3, 4])
        return index

    assert fresh().is_sound()
    assert not index_of(wrong=(3, [1, 2])).is_sound(), "a digest of other tokens"
    index = fresh()
    index._blocks[b"left over"] = 9
    assert not index.is_sound(), "a digest without a block"
    index = fresh()
    index._blocks[chain(b"", [1, 2])] = 4
    assert not index.is_sound(), "a digest that leads to another block"


def test_the_hit_rate_is_the_share_of_queried_tokens_that_was_found():
    assert PrefixCacheStats().hit_rate == 0.0
    assert PrefixCacheStats(num_queried_tokens=8, num_hit_tokens=2).hit_rate == 0.25


# --- what the pool keeps --------------------------------------------------------------------------------------------


def pool_of(num_blocks=6, most_cached=None, known=()):
    """Return a pool whose blocks ``known`` hold something that the index knows."""
    index = PrefixIndex()
    for block in known:
        digest = chain(b"", [block])
        index.add(block, digest, b"", [block])
    return BlockPool(num_blocks, index, most_cached)


def cached_pool(num_blocks=6, most_cached=None, known=(1, 2, 3)):
    """The same, with all its blocks taken once and given back in order."""
    pool = pool_of(num_blocks, most_cached, known)
    blocks = pool.allocate(num_blocks - 1)
    pool.release(blocks)
    return pool


def test_released_blocks_are_kept_if_the_index_knows_them_and_free_if_not():
    pool = cached_pool()
    assert (pool.num_free, pool.num_cached, pool.num_available) == (2, 3, 5)
    assert [pool.is_cached(block) for block in range(6)] == [False, True, True, True, False, False]
    pool.check_integrity([])


def test_a_cached_block_can_be_shared_and_is_then_cached_no_more():
    pool = cached_pool()
    pool.share([2, 1])
    assert (pool.references(1), pool.references(2), pool.num_cached) == (1, 1, 1)
    pool.share([2])
    assert pool.references(2) == 2
    pool.check_integrity([[1, 2], [2]])


def test_free_blocks_are_taken_before_cached_ones_and_of_those_a_beginning_loses_its_end_first():
    pool = cached_pool()
    assert pool.allocate(3) == [4, 5, 3]
    assert 3 not in pool.index
    assert pool.num_evicted == 1
    pool.check_integrity([[4, 5, 3]])


def test_evicted_blocks_come_as_an_ascending_run():
    pool = cached_pool()
    assert pool.allocate(5) == [4, 5, 1, 2, 3]
    assert (pool.num_evicted, len(pool.index), pool.num_available) == (3, 0, 0)


def test_what_was_used_again_is_evicted_last():
    pool = cached_pool()
    pool.share([3])
    pool.release([3])
    assert pool.allocate(4) == [4, 5, 1, 2]
    assert pool.is_cached(3)


def test_no_more_blocks_are_kept_than_allowed():
    pool = cached_pool(most_cached=2)
    assert (pool.num_cached, pool.num_free, pool.num_evicted) == (2, 3, 1)
    assert [pool.is_cached(block) for block in (1, 2, 3)] == [True, True, False], "the end of the beginning went"
    pool.check_integrity([])
    assert cached_pool(most_cached=0).num_cached == 0


def test_a_forgotten_block_is_free_at_once_if_nobody_holds_it():
    pool = cached_pool()
    pool.forget(2)
    assert (pool.num_free, pool.num_cached, 2 in pool.index) == (3, 2, False)
    pool.share([1])
    pool.forget(1)
    assert (pool.num_free, pool.references(1), 1 in pool.index) == (3, 1, False)
    pool.forget(4)
    assert pool.num_free == 3, "nothing was known of it"
    pool.release([1])
    assert pool.num_free == 4
    pool.check_integrity([])


def test_a_pool_without_an_index_keeps_nothing_and_has_nothing_to_forget():
    pool = BlockPool(4)
    held = pool.allocate(2)
    pool.forget(held[0])
    pool.forget_all()
    pool.release(held)
    assert (pool.num_free, pool.num_cached) == (3, 0)


def test_all_can_be_forgotten_and_what_is_referenced_stays_so():
    pool = cached_pool()
    pool.share([1])
    pool.forget_all()
    assert (len(pool.index), pool.num_cached, pool.references(1)) == (0, 0, 1)
    pool.check_integrity([[1]])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pool: pool._cached.__setitem__(0, None),
        lambda pool: pool._free.append(1),
        lambda pool: pool._cached.__setitem__(4, None),
        lambda pool: pool.index.forget(2),
        lambda pool: pool.index.add(4, b"4", b"", [4]),
        lambda pool: pool.index.add(0, b"0", b"", [0]),
        lambda pool: setattr(pool, "most_cached", 2),
        lambda pool: setattr(pool, "index", None),
    ],
)
def test_the_integrity_check_sees_damage_to_what_is_cached(spoil):
    pool = cached_pool()
    pool.check_integrity([])
    spoil(pool)
    with pytest.raises(BlockPoolError):
        pool.check_integrity([])


def test_the_integrity_check_sees_a_table_that_holds_the_null_block():
    with pytest.raises(BlockPoolError):
        BlockPool(4).check_integrity([[0]])


# --- tables over what is cached -------------------------------------------------------------------------------------


def test_a_table_cut_back_into_a_full_block_makes_the_index_forget_it_before_writing():
    pool = pool_of(known=(1, 2))
    table = BlockTable(pool, SIZE)
    table.append_tokens(8)
    table.truncate(6)
    assert 2 in pool.index, "nothing is written yet"
    assert table.append_tokens(0) is None
    assert 2 in pool.index
    assert table.append_tokens(1) is None
    assert list(pool.index) == [1]


def test_a_table_that_goes_on_in_a_new_block_lets_the_index_know_what_it_knew():
    pool = pool_of(known=(1, 2))
    table = BlockTable(pool, SIZE)
    table.append_tokens(8)
    table.append_tokens(1)
    assert list(pool.index) == [1, 2]


def test_a_copy_on_write_leaves_the_source_to_its_holder_and_to_the_index():
    pool = pool_of(known=(1, 2))
    parent = BlockTable(pool, SIZE)
    parent.append_tokens(8)
    child = parent.fork()
    child.truncate(6)
    assert child.shared_tail() == 2
    assert child.append_tokens(1) == (2, 3)
    assert (pool.references(2), 2 in pool.index, parent.blocks, child.blocks) == (1, True, [1, 2], [1, 3])
    assert child.shared_tail() is None


def test_adopted_blocks_are_shared_and_the_list_is_the_tables_own():
    pool = cached_pool()
    found = [1, 2]
    table = BlockTable(pool, SIZE)
    table.adopt(found, 8)
    assert (table.blocks, table.num_tokens, pool.references(1)) == ([1, 2], 8, 1)
    found.append(3)
    assert table.blocks == [1, 2]
    with pytest.raises(BlockPoolError):
        BlockTable(pool, SIZE).adopt([4], 4)


# --- match, fits, adopt, commit -------------------------------------------------------------------------------------


def test_the_longest_known_beginning_is_found_short_of_the_newest_token():
    kv = manager_of()
    compute(kv, sequence_of(range(12)))
    again = sequence_of(range(12), seq_id=1)
    assert kv.match(again, 12) == [1, 2], "the last block would leave nothing to compute"
    assert kv.match(again, 13) == [1, 2, 3]
    assert kv.match(again, 9) == [1, 2]
    assert kv.match(again, 8) == [1]
    assert kv.match(again, 4) == kv.match(again, 1) == []


def test_a_beginning_is_found_up_to_the_first_difference():
    kv = manager_of()
    compute(kv, sequence_of([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]))
    assert kv.match(sequence_of([0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11, 12]), 13) == [1]
    assert kv.match(sequence_of([99, 1, 2, 3, 4, 5, 6, 7, 8]), 9) == []
    assert kv.match(sequence_of([4, 5, 6, 7, 8]), 5) == [], "the same tokens after another beginning are others"


def test_nothing_is_found_past_a_block_that_was_evicted():
    kv = manager_of()
    compute(kv, sequence_of(range(13)))
    kv.pool.forget(2)
    assert kv.match(sequence_of(range(13)), 13) == [1]


def test_one_tenant_never_finds_what_another_computed():
    kv = manager_of()
    compute(kv, sequence_of(range(8), b"a"))
    assert kv.match(sequence_of(range(9), b"b"), 9) == []
    assert kv.match(sequence_of(range(9), b"a"), 9) == [1, 2]


def test_without_prefix_caching_nothing_is_kept_or_found():
    kv = manager_of(enable_prefix_caching=False)
    sequence = sequence_of(range(9))
    compute(kv, sequence)
    assert kv.index is None
    assert kv.match(sequence_of(range(9)), 9) == []
    kv.release(sequence)
    assert kv.pool.num_cached == 0
    kv.reset_prefix_cache()


def test_a_sequence_starts_on_the_blocks_it_finds_and_shares_them():
    kv = manager_of()
    one = sequence_of(range(9))
    compute(kv, one)
    two = sequence_of(range(9), seq_id=1)
    kv.adopt(two, kv.match(two, 9))
    assert two.block_table.blocks == [1, 2]
    assert (two.block_table.num_tokens, two.num_computed_tokens, two.num_indexed_blocks) == (8, 8, 2)
    assert [kv.pool.references(block) for block in (1, 2, 3)] == [2, 2, 1]
    compute(kv, two)
    kv.check_integrity([one, two])


def test_what_is_found_in_the_cache_counts_as_taken_when_room_is_judged():
    kv = manager_of(num_blocks=6)
    sequence = sequence_of(range(8))
    compute(kv, sequence)
    held = kv.match(sequence_of(range(20)), 20)
    assert kv.fits(held, 20, 0), "two are held by another, and three are free"
    assert not kv.fits(held, 21, 0)
    assert not kv.fits(held, 20, 1)
    assert kv.fits(held, 16, 1)
    kv.release(sequence)
    assert kv.fits(held, 20, 0), "two come back from the cache, and three are free"
    assert not kv.fits(held, 21, 0)
    assert kv.fits([], 20, 0)
    assert not kv.fits([], 21, 0)


def test_only_full_blocks_that_are_written_hold_what_others_may_find():
    kv = manager_of()
    sequence = sequence_of(range(20))
    kv.extend([sequence], [11])
    kv.commit(sequence, 7)
    assert list(kv.index) == [1]
    assert sequence.num_indexed_blocks == 1
    kv.commit(sequence, 16)
    assert list(kv.index) == [1, 2], "no further than its table"
    kv.commit(sequence, 4)
    assert sequence.num_indexed_blocks == 2, "what was told stays told"


def test_no_block_is_told_of_past_a_sequences_tokens():
    kv = manager_of()
    sequence = sequence_of(range(7))
    kv.extend([sequence], [8])
    kv.commit(sequence, 8)
    assert list(kv.index) == [1], "the eighth is a draft"


def test_blocks_are_told_of_once():
    kv = manager_of()
    sequence = sequence_of(range(8))
    compute(kv, sequence)
    kv.pool.forget(1)
    kv.commit(sequence, 8)
    assert list(kv.index) == [2]


def test_a_sequence_without_memory_has_nothing_to_tell():
    kv = manager_of()
    kv.commit(sequence_of(range(8)), 8)
    assert len(kv.index) == 0


def test_a_reset_forgets_what_all_blocks_hold_and_takes_none_away():
    kv = manager_of()
    one, two = sequence_of(range(8)), sequence_of(range(10, 18), seq_id=1)
    compute(kv, one)
    compute(kv, two)
    kv.release(two)
    kv.reset_prefix_cache()
    assert (len(kv.index), kv.pool.num_cached, kv.pool.num_free, one.block_table.blocks) == (0, 0, 6, [1, 2])
    assert kv.match(sequence_of(range(9)), 9) == []


def test_what_is_cut_off_is_told_of_again_when_it_is_written_anew():
    kv = manager_of()
    sequence = sequence_of(range(12))
    compute(kv, sequence)
    kv.truncate(sequence, 6)
    assert (sequence.num_computed_tokens, sequence.num_indexed_blocks) == (6, 1)
    assert sequence.block_table.blocks == [1, 2]
    kv.truncate(sequence, 4)
    assert sequence.num_indexed_blocks == 1, "a full block that is whole stays known"
    compute(kv, sequence)
    assert sequence.num_indexed_blocks == 3
    kv.check_integrity([sequence])


def test_cutting_back_a_sequence_never_tells_of_more():
    kv = manager_of()
    sequence = sequence_of(range(12))
    kv.extend([sequence], [12])
    kv.truncate(sequence, 8)
    assert sequence.num_indexed_blocks == 0
    unstarted = sequence_of(range(4))
    kv.truncate(unstarted, 0)
    assert unstarted.block_table is None


def test_the_integrity_check_sees_a_block_known_by_tokens_that_are_not_its_owners():
    kv = manager_of()
    sequence = sequence_of(range(9))
    compute(kv, sequence)
    kv.check_integrity([sequence])
    kv.index.forget(2)
    kv.index.add(2, b"digest", sequence.block_digests[1], [4, 5, 6, 8])
    with pytest.raises(BlockPoolError, match="block 2 is known to hold other tokens"):
        kv.check_integrity([sequence])


def test_the_integrity_check_sees_a_block_known_to_follow_another_beginning():
    kv = manager_of()
    sequence = sequence_of(range(9))
    compute(kv, sequence)
    kv.index.forget(1)
    kv.index.add(1, b"digest", b"elsewhere", [0, 1, 2, 3])
    with pytest.raises(BlockPoolError, match="block 1 is known"):
        kv.check_integrity([sequence])


def test_the_integrity_check_asks_only_for_blocks_that_are_full():
    kv = manager_of()
    sequence = sequence_of(range(7))
    compute(kv, sequence)
    kv.extend([sequence], [2])
    kv.check_integrity([sequence])


# --- to the host and back -------------------------------------------------------------------------------------------


def test_a_host_block_that_a_step_reads_is_free_only_in_the_next():
    swap = SwapSpace(3)
    tables, pairs = swap.store([[7, 8], [7, 9]])
    assert tables == [[1, 2], [1, 3]]
    assert pairs == [(7, 1), (8, 2), (9, 3)]
    assert [swap.pool.references(block) for block in (1, 2, 3)] == [2, 1, 1]
    swap.check_integrity(tables)
    swap.read(tables[0])
    assert swap.pool.num_free == 0
    swap.check_integrity([tables[1]])
    swap.begin_step()
    assert swap.pool.num_free == 1
    swap.begin_step()
    assert swap.pool.num_free == 1
    swap.drop(tables[1])
    assert swap.pool.num_free == 3
    swap.check_integrity([])


def test_the_host_refuses_what_it_has_no_room_for_and_changes_nothing():
    swap = SwapSpace(3)
    with pytest.raises(OutOfBlocksError):
        swap.store([[1, 2], [3, 4]])
    assert swap.pool.num_free == 3
    with pytest.raises(BlockPoolError):
        swap.check_integrity([[1]])


def swapped_pair(**options):
    """Return a manager and two sequences of nine tokens that share two blocks of three."""
    kv = manager_of(num_host_blocks=4, **options)
    one = sequence_of(range(9))
    compute(kv, one)
    two = one.fork(seq_id=1, index=1)
    for sequence in (one, two):
        sequence.add_token_id(sequence.seq_id)
    assert kv.extend([one, two], [1, 1]) == [(3, 4), None]
    for sequence in (one, two):
        sequence.num_computed_tokens += 1
        sequence.add_token_id(7)
    return kv, [one, two]


def test_a_group_moves_to_the_host_with_what_it_shares():
    kv, group = swapped_pair()
    pairs = kv.swap_out(group)
    assert pairs == [(1, 1), (2, 2), (4, 3), (3, 4)]
    assert [sequence.host_blocks for sequence in group] == [[1, 2, 3], [1, 2, 4]]
    assert [sequence.block_table for sequence in group] == [None, None]
    assert [sequence.num_computed_tokens for sequence in group] == [10, 10], "what is computed stays computed"
    assert [sequence.num_indexed_blocks for sequence in group] == [0, 0]
    assert kv.pool.num_available == kv.pool.num_usable
    assert kv.swap.pool.num_free == 0
    kv.check_integrity(group)


def test_a_group_comes_back_with_what_it_shares():
    kv, group = swapped_pair()
    kv.swap_out(group)
    pairs = kv.swap_in(group, 4)
    assert [source for source, _ in pairs] == [1, 2, 3, 4]
    place = dict(pairs)
    assert group[0].block_table.blocks == [place[1], place[2], place[3]]
    assert group[1].block_table.blocks == [place[1], place[2], place[4]]
    assert [sequence.block_table.num_tokens for sequence in group] == [10, 10]
    assert [sequence.host_blocks for sequence in group] == [[], []]
    assert [kv.pool.references(place[block]) for block in (1, 2, 3, 4)] == [2, 2, 1, 1]
    assert kv.swap.pool.num_free == 0, "the step still reads them"
    kv.check_integrity(group)
    kv.begin_step()
    assert kv.swap.pool.num_free == 4


def test_a_group_comes_back_only_if_as_much_room_remains_as_asked_for():
    kv, group = swapped_pair()
    kv.swap_out(group)
    assert kv.swap_in(group, 5) is None, "eight blocks, four of them for the group"
    assert [sequence.host_blocks for sequence in group] == [[1, 2, 3], [1, 2, 4]]
    assert kv.swap_in(group, 4) is not None


def test_a_group_that_the_host_has_no_room_for_stays():
    kv, group = swapped_pair()
    other = sequence_of([50, 51], seq_id=2)
    compute(kv, other)
    other.add_token_id(1)
    assert kv.swap_out([other]) is not None
    assert kv.swap_out(group) is None
    assert [sequence.block_table.blocks for sequence in group] == [[1, 2, 4], [1, 2, 3]]
    kv.check_integrity([*group, other])


def test_where_there_is_no_host_memory_nothing_moves_and_nothing_returns():
    kv = manager_of()
    sequence = sequence_of(range(9))
    compute(kv, sequence)
    assert kv.swap is None
    assert kv.swap_out([sequence]) is None
    assert kv.swap_in([sequence], 0) is None
    kv.begin_step()


def test_the_newest_token_is_run_again_after_a_return():
    kv = manager_of(num_host_blocks=4)
    sequence = sequence_of(range(9))
    kv.extend([sequence], [9])
    sequence.num_computed_tokens = 9
    assert kv.swap_out([sequence]) == [(1, 1), (2, 2)], "the ninth is computed anew, so its block need not move"
    assert sequence.num_computed_tokens == 8


def test_a_sequence_of_a_group_that_has_no_memory_yet_moves_nothing():
    kv = manager_of(num_host_blocks=4)
    one, bare = sequence_of(range(5)), sequence_of(range(5), seq_id=1)
    kv.extend([one], [4])
    one.num_computed_tokens = 4
    assert kv.swap_out([bare, one]) == [(1, 1)]
    assert (bare.host_blocks, one.host_blocks) == ([], [1])
    assert kv.swap_in([bare, one], 0) == [(1, 2)]
    assert bare.block_table is None
    kv.check_integrity([one, bare])


def test_what_ends_on_the_host_gives_its_blocks_back_there():
    kv, group = swapped_pair()
    kv.swap_out(group)
    assert kv.release(group[0]) == []
    assert group[0].host_blocks == []
    assert group[0].num_computed_tokens == 0
    assert kv.swap.pool.num_free == 1, "the others are shared"
    assert kv.release(group[1]) == []
    assert kv.swap.pool.num_free == 4


def test_a_release_tells_which_blocks_were_held():
    kv, group = swapped_pair()
    assert kv.release(group[0]) == [1, 2, 4]
    assert (group[0].block_table, group[0].num_computed_tokens, group[0].num_indexed_blocks) == (None, 0, 0)
    assert kv.pool.references(1) == 1
    assert kv.release(sequence_of([1])) == []


def test_usage_counts_blocks_of_device_and_host():
    kv, group = swapped_pair(block_bytes=4096)
    usage = kv.usage()
    assert (usage.block_size, usage.block_bytes, usage.num_blocks, usage.num_host_blocks) == (4, 4096, 8, 4)
    assert (usage.num_used_blocks, usage.num_cached_blocks, usage.num_free_blocks) == (4, 0, 4)
    assert usage.num_free_host_blocks == 4
    kv.swap_out(group)
    usage = kv.usage()
    assert (usage.num_used_blocks, usage.num_cached_blocks, usage.num_free_blocks) == (0, 2, 6)
    assert usage.num_free_host_blocks == 0
    assert KVCacheManager(5, SIZE).index is None, "what is not asked for is off"
    bare = KVCacheManager(5, SIZE).usage()
    assert (bare.block_bytes, bare.num_host_blocks, bare.num_free_host_blocks) == (0, 0, 0)


def test_the_manager_keeps_no_more_cached_blocks_than_it_is_told():
    kv = manager_of(prefix_cache_size=1)
    sequence = sequence_of(range(9))
    compute(kv, sequence)
    kv.release(sequence)
    assert kv.usage().num_cached_blocks == 1
