"""KV memory by millions of random operations: found sound as it is, and found out when it is spoilt."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from folo_core.errors import BlockPoolError, OutOfBlocksError
from folo_core.kv_cache.block_pool import BlockPool
from folo_core.kv_cache.block_table import BlockTable, blocks_for
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.kv_cache.prefix_cache import PrefixIndex
from folo_core.kv_cache.swap import SwapSpace
from memory_machine import ALPHABET, SIZE, MemoryMachine, run_randomly

NUM_OPERATIONS = int(os.environ.get("FOLO_SOAK", "20_000"))
"""``nox -s soak`` makes a million."""
RUN = 1000
"""Operations on one pool before the next begins, of another size."""

numbers, bits = st.integers(0, 63), st.integers(0, ALPHABET - 1)


class Memory(RuleBasedStateMachine):
    """The rules of ``MemoryMachine``, for hypothesis to combine and to shrink what fails."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryMachine(num_blocks=10, num_host_blocks=5, prefix_cache_size=5)

    @rule(tokens=st.lists(bits, min_size=1, max_size=9), tenant=st.integers(0, 1))
    def open(self, tokens: list[int], tenant: int) -> None:
        self.memory.open(tokens, tenant)

    @rule(number=numbers, token=bits, commit=st.booleans())
    def grow(self, number: int, token: int, commit: bool) -> None:  # noqa: FBT001 (drawn)
        self.memory.grow(number, token, commit=commit)

    @rule(number=numbers, width=st.integers(1, 3), token=bits)
    def grow_group(self, number: int, width: int, token: int) -> None:
        self.memory.grow_group(number, width, token)

    @rule(number=numbers)
    def fork(self, number: int) -> None:
        self.memory.fork(number)

    @rule(number=numbers)
    def commit(self, number: int) -> None:
        self.memory.commit(number)

    @rule(number=numbers, cut=st.integers(1, 4), token=bits)
    def rewrite(self, number: int, cut: int, token: int) -> None:
        self.memory.rewrite(number, cut, token)

    @rule(number=numbers)
    def release(self, number: int) -> None:
        self.memory.release(number)

    @rule(number=numbers)
    def fail(self, number: int) -> None:
        self.memory.fail(number)

    @rule(number=numbers, width=st.integers(1, 3))
    def swap_out(self, number: int, width: int) -> None:
        self.memory.swap_out(number, width)

    @rule(number=numbers)
    def swap_in(self, number: int) -> None:
        self.memory.swap_in(number)

    @rule(number=numbers)
    def abort_swapped(self, number: int) -> None:
        self.memory.abort_swapped(number)

    @rule()
    def begin_step(self) -> None:
        self.memory.begin_step()

    @rule()
    def reset(self) -> None:
        self.memory.reset()

    @rule()
    def exhaust(self) -> None:
        self.memory.exhaust()

    @invariant()
    def holds(self) -> None:
        self.memory.check()

    def teardown(self) -> None:
        self.memory.finish()


TestMemory = pytest.mark.slow(Memory.TestCase)
TestMemory.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def machine_of(number: int) -> MemoryMachine:
    """A pool of another size each time, with and without a limit on cached blocks."""
    return MemoryMachine(
        num_blocks=6 + number % 17,
        num_host_blocks=2 + number % 7,
        prefix_cache_size=None if number % 3 else 1 + number % 5,
        enable_prefix_caching=number % 8 != 7,
    )


@pytest.mark.slow
def test_random_operations_leave_every_invariant_whole(capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, int] = {}
    evicted, started = 0, time.perf_counter()
    for number in range(max(1, NUM_OPERATIONS // RUN)):
        machine = machine_of(number)
        run_randomly(machine, RUN, number, machine.check)
        machine.finish()
        evicted += machine.kv.pool.num_evicted
        for name, count in machine.counts.items():
            seen[name] = seen.get(name, 0) + count
    assert evicted > 10, "room was made"
    wanted = {"hit", "group copied", "swap in", "swap refused", "grow refused", "return refused", "open refused"}
    assert wanted <= seen.keys(), "every refusal and every way of sharing occurred"
    with capsys.disabled():
        if "FOLO_SOAK" in os.environ:
            seconds = time.perf_counter() - started
            print(f"\n{NUM_OPERATIONS:,} operations, each checked in full: {seconds:.0f} s, 0 blocks leaked; {seen}")


# --- ten and more ways to spoil the books, each of which must be noticed -------------------------------------------


def share_too_few(pool: BlockPool, blocks: list[int]) -> None:
    for block in blocks[1:]:
        pool._references[block] += 1
        pool._cached.pop(block, None)


def share_without_taking_back(pool: BlockPool, blocks: list[int]) -> None:
    for block in blocks:
        pool._references[block] += 1


def release_leaks(pool: BlockPool, blocks: list[int]) -> None:
    for block in blocks:
        pool._references[block] -= 1


def release_frees_early(pool: BlockPool, blocks: list[int]) -> None:
    for block in blocks:
        pool._references[block] -= 1
        if pool._references[block] <= 1 and block not in pool._free:
            pool._references[block] = 0
            pool._free.append(block)


def allocate_gives_twice(pool: BlockPool, count: int) -> list[int]:
    if count > pool.num_available:
        raise OutOfBlocksError("short")
    blocks = [*pool._free, *pool._cached][:count]
    for block in blocks:
        pool._references[block] = 1
    return blocks


def allocate_in_part(pool: BlockPool, count: int) -> list[int]:
    blocks = []
    for _ in range(count):
        if not pool.num_available:
            raise OutOfBlocksError("short, and some are gone")
        block = pool._free.popleft() if pool._free else pool._evict()
        pool._references[block] = 1
        blocks.append(block)
    return blocks


def evict_without_forgetting(pool: BlockPool) -> int:
    block, _ = pool._cached.popitem(last=False)
    pool.num_evicted += 1
    return block


def append_without_copying(table: BlockTable, count: int) -> None:
    fresh = table.pool.allocate(table.missing_blocks(count))
    table.blocks += fresh
    table.num_tokens += count


def append_without_forgetting(table: BlockTable, count: int) -> Any:
    forget, table.pool.index.forget = table.pool.index.forget, lambda _: None
    try:
        return ORIGINALS["append_tokens"](table, count)
    finally:
        table.pool.index.forget = forget


def truncate_keeps_one(table: BlockTable, num_tokens: int) -> None:
    keep = blocks_for(num_tokens, table.block_size) + 1
    table.pool.release(table.blocks[keep:])
    del table.blocks[keep:]
    table.num_tokens = num_tokens


def fork_without_counting(table: BlockTable) -> BlockTable:
    child = BlockTable(table.pool, table.block_size)
    child.blocks, child.num_tokens = table.blocks.copy(), table.num_tokens
    return child


def find_by_tokens_alone(index: PrefixIndex, digest: bytes, parent: bytes, token_ids: list[int]) -> int | None:
    return next((block for block in index if index.contents(block)[1] == token_ids), None)


def commit_too_much(kv: KVCacheManager, sequence: Any, num_computed_tokens: int) -> None:
    ORIGINALS["commit"](kv, sequence, num_computed_tokens)
    full, table = sequence.num_tokens // SIZE, sequence.block_table
    if kv.index is not None and full * SIZE < sequence.num_tokens and len(table.blocks) > full:
        kv.index.add(table.blocks[full], bytes(32), bytes(32), sequence.data.token_ids[full * SIZE :])


def match_everything(kv: KVCacheManager, sequence: Any, num_tokens: int) -> list[int]:
    return ORIGINALS["match"](kv, sequence, num_tokens + SIZE)


def store_without_sharing(swap: SwapSpace, tables: list[list[int]]) -> Any:
    distinct = list(dict.fromkeys(block for table in tables for block in table))
    place = dict(zip(distinct, swap.pool.allocate(len(distinct)), strict=True))
    return [[place[block] for block in table] for table in tables], list(place.items())


def read_forgets(swap: SwapSpace, blocks: list[int]) -> None:
    """The host blocks of a group that came back are never freed."""


FAULTS = {
    share_too_few: (BlockPool, "share"),
    share_without_taking_back: (BlockPool, "share"),
    release_leaks: (BlockPool, "release"),
    release_frees_early: (BlockPool, "release"),
    allocate_gives_twice: (BlockPool, "allocate"),
    allocate_in_part: (BlockPool, "allocate"),
    evict_without_forgetting: (BlockPool, "_evict"),
    append_without_copying: (BlockTable, "append_tokens"),
    append_without_forgetting: (BlockTable, "append_tokens"),
    truncate_keeps_one: (BlockTable, "truncate"),
    fork_without_counting: (BlockTable, "fork"),
    find_by_tokens_alone: (PrefixIndex, "find"),
    commit_too_much: (KVCacheManager, "commit"),
    match_everything: (KVCacheManager, "match"),
    store_without_sharing: (SwapSpace, "store"),
    read_forgets: (SwapSpace, "read"),
}
ORIGINALS = {name: getattr(owner, name) for owner, name in FAULTS.values()}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_a_spoilt_pool_is_found_out_every_time(fault: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = FAULTS[fault]
    machine = MemoryMachine(num_blocks=10, num_host_blocks=6, prefix_cache_size=5)
    monkeypatch.setattr(owner, name, fault)

    def run() -> None:
        run_randomly(machine, 3000, seed, machine.check)
        machine.finish()

    with pytest.raises((AssertionError, BlockPoolError, IndexError, KeyError, ValueError)):
        run()


def test_the_same_operations_find_nothing_in_a_sound_pool() -> None:
    for seed in range(5):
        machine = MemoryMachine(num_blocks=10, num_host_blocks=6, prefix_cache_size=5)
        run_randomly(machine, 3000, seed, machine.check)
        machine.finish()


def test_random_operations_are_the_same_for_the_same_seed() -> None:
    one, other = MemoryMachine(), MemoryMachine()
    for machine in (one, other):
        run_randomly(machine, 300, 7, lambda: None)
    assert one.counts == other.counts
