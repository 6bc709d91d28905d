"""KV memory under every operation there is, against a model that keeps each sequence's tokens in plain lists.

``MemoryMachine`` is driven two ways: by hypothesis, which looks for a short failing sequence, and by ``run_randomly``,
which makes millions of operations. Device and host memory are dictionaries of what was really written, so a wrong
table, a missed copy, a block evicted while in use or a stale cache entry shows up as a sequence that reads another's
tokens.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from folo_core.errors import OutOfBlocksError
from folo_core.kv_cache.block_table import blocks_for
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.sequence import Sequence, SequenceData

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 2
ALPHABET = 2
"""Few different tokens, so that sequences often begin alike."""


class MemoryMachine:
    """A manager, the memory that it keeps books of, and what every sequence should read from it."""

    def __init__(
        self,
        *,
        num_blocks: int = 12,
        num_host_blocks: int = 6,
        prefix_cache_size: int | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.kv = KVCacheManager(
            num_blocks,
            SIZE,
            enable_prefix_caching=enable_prefix_caching,
            prefix_cache_size=prefix_cache_size,
            num_host_blocks=num_host_blocks,
        )
        self.device: dict[tuple[int, int], Any] = {}
        self.host: dict[tuple[int, int], Any] = {}
        self.running: list[Sequence] = []
        self.swapped: list[list[Sequence]] = []
        self.counts: dict[str, int] = {}
        self._ids = 0

    # --- operations; each picks what it works on with the numbers it is given ---------------------------------------

    def open(self, tokens: list[int], tenant: int) -> None:
        """Admit a sequence: find its beginning, then compute the rest of it, short of nothing."""
        root = b"tenant%d" % tenant
        sequence = Sequence(seq_id=self._ids, index=0, data=SequenceData(tuple(tokens)), block_digests=[root])
        self._ids += 1
        found = self.kv.match(sequence, len(tokens))
        assert len(found) * SIZE < len(tokens), "the newest token is always computed"
        before = self._books()
        if not self.kv.fits(found, len(tokens), 0):
            self._note("open refused")
            assert before == self._books()
            return
        self.kv.adopt(sequence, found)
        self._note("hit" if found else "miss")
        for place in range(len(found) * SIZE):
            assert self._read(sequence, place) == (root, tokens[: place + 1]), "a hit holds exactly these tokens"
        copies = self.kv.extend([sequence], [len(tokens) - len(found) * SIZE])
        assert copies == [None]
        self._compute([sequence], [len(tokens) - len(found) * SIZE])
        self.running.append(sequence)

    def grow(self, number: int, token: int, *, commit: bool) -> None:
        """Append a token and compute it; tell the cache, or not yet, as when the step's result is still on its way."""
        if not self.running:
            return
        sequence = self._pick(number)
        before = self._books()
        copies = self.kv.extend([sequence], [1])
        if copies is None:
            self._note("grow refused")
            assert before == self._books()
            return
        sequence.add_token_id(token)
        self._copy(copies)
        self._compute([sequence], [1])
        if commit:
            self.kv.commit(sequence, sequence.num_computed_tokens)
        self._note("grow")

    def grow_group(self, number: int, width: int, token: int) -> None:
        """Fork a sequence ``width`` times and let all of them write at once, or none."""
        if not self.running:
            return
        parent = self._pick(number)
        group = [parent, *(self._fork(parent) for _ in range(width))]
        before = self._books()
        copies = self.kv.extend(group, [1] * len(group))
        if copies is None:
            self._note("group refused")
            assert before == self._books()
            return
        self._note("group copied" if any(copies) else "group grew")
        for place, sequence in enumerate(group):
            sequence.add_token_id((token + place) % ALPHABET)
        self._copy(copies)
        self._compute(group, [1] * len(group))

    def fork(self, number: int) -> None:
        """Branch a sequence: both share all blocks until one writes."""
        if self.running:
            self._fork(self._pick(number))
            self._note("fork")

    def commit(self, number: int) -> None:
        """Tell the cache of what a sequence has computed."""
        if self.running:
            sequence = self._pick(number)
            self.kv.commit(sequence, sequence.num_computed_tokens)
            self._note("commit")

    def rewrite(self, number: int, cut: int, token: int) -> None:
        """Go back some tokens and write others: rejected drafts, or a branch at an earlier point."""
        if not self.running:
            return
        sequence = self._pick(number)
        keep = max(1, sequence.num_tokens - cut)
        if keep < len(sequence.data.prompt_token_ids):
            return
        self.kv.truncate(sequence, keep)
        del sequence.data.output_token_ids[keep - len(sequence.data.prompt_token_ids) :]
        sequence.data._token_ids = None
        del sequence.block_digests[keep // SIZE + 1 :]
        self._note("rewrite")
        self.grow(self.running.index(sequence), token, commit=True)

    def release(self, number: int) -> None:
        """End a sequence."""
        if self.running:
            sequence = self._pick(number)
            self.running.remove(sequence)
            self.kv.release(sequence)
            self._note("release")

    def fail(self, number: int) -> None:
        """End a sequence whose memory must not be believed any more."""
        if self.running:
            sequence = self._pick(number)
            self.running.remove(sequence)
            for block in self.kv.release(sequence):
                if self.kv.pool.references(block) == 0:
                    self.kv.pool.forget(block)
            self._note("fail")

    def swap_out(self, number: int, width: int) -> None:
        """Move some neighbours to the host together."""
        if not self.running:
            return
        start = number % len(self.running)
        group = self.running[start : start + width]
        if any(sequence.num_tokens == 1 for sequence in group):
            return  # nothing to move: the newest token is computed anew
        before = self._books()
        pairs = self.kv.swap_out(group)
        if pairs is None:
            self._note("swap refused")
            assert before == self._books()
            return
        for source, target in pairs:
            for offset in range(SIZE):
                self.host[target, offset] = self.device.get((source, offset))
        del self.running[start : start + width]
        self.swapped.append(group)
        self._note("swap out")

    def swap_in(self, number: int) -> None:
        """Bring a group back, in a step that swaps nothing out afterwards."""
        if not self.swapped:
            return
        group = self.swapped[number % len(self.swapped)]
        before = self._books()
        pairs = self.kv.swap_in(group, 0)
        if pairs is None:
            self._note("return refused")
            assert before == self._books()
            return
        for source, target in pairs:
            for offset in range(SIZE):
                self.device[target, offset] = self.host.get((source, offset))
        self.swapped.remove(group)
        self.running += group
        self._note("swap in")

    def abort_swapped(self, number: int) -> None:
        """End a group where it lies."""
        if self.swapped:
            for sequence in self.swapped.pop(number % len(self.swapped)):
                assert self.kv.release(sequence) == []
            self._note("abort swapped")

    def begin_step(self) -> None:
        """Let host blocks that were read go to others."""
        self.kv.begin_step()

    def reset(self) -> None:
        """Forget all beginnings."""
        self.kv.reset_prefix_cache()
        assert self.kv.pool.num_cached == 0
        self._note("reset")

    def exhaust(self) -> None:
        """Ask for more than there is: refused, and nothing has changed."""
        before = self._books()
        try:
            self.kv.pool.allocate(self.kv.pool.num_available + 1)
        except OutOfBlocksError:
            assert before == self._books()
            self._note("exhausted")
        else:
            raise AssertionError("a pool gave more than it has")

    # --- what must hold after each of them --------------------------------------------------------------------------

    def check(self, *, contents: bool = True) -> None:
        """Every invariant of KV memory (numbers 1 to 6 of the design), and what every sequence reads."""
        everyone = [*self.running, *(sequence for group in self.swapped for sequence in group)]
        self.kv.check_integrity(everyone)
        usage = self.kv.usage()
        used = {block for sequence in self.running for block in sequence.block_table.blocks}
        assert len(used) == usage.num_used_blocks
        assert usage.num_free_blocks + usage.num_cached_blocks + len(used) == usage.num_blocks
        for sequence in self.running:
            assert len(sequence.block_table.blocks) == blocks_for(sequence.block_table.num_tokens, SIZE)
            assert sequence.block_table.num_tokens == sequence.num_computed_tokens
        if not contents:
            return
        for sequence in self.running:
            tokens, root = sequence.data.token_ids, sequence.block_digests[0]
            for place in range(sequence.num_computed_tokens):
                assert self._read(sequence, place) == (root, tokens[: place + 1]), "a sequence reads its own"
        if self.kv.index is not None:
            assert self.kv.index.is_sound()
            for block in self.kv.index:
                _, tokens = self.kv.index.contents(block)
                written = [self.device[block, offset] for offset in range(SIZE)]
                assert [history[-1] for _, history in written] == tokens, "a cached block holds what its hash says"

    def finish(self) -> None:
        """End everything: every block comes back."""
        while self.running:
            self.release(0)
        while self.swapped:
            self.abort_swapped(0)
        self.begin_step()
        self.check()
        assert self.kv.pool.num_available == self.kv.pool.num_usable
        if self.kv.swap is not None:
            assert self.kv.swap.pool.num_free == self.kv.swap.pool.num_usable

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _pick(self, number: int) -> Sequence:
        return self.running[number % len(self.running)]

    def _fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(seq_id=self._ids, index=self._ids)
        self._ids += 1
        self.running.append(child)
        return child

    def _compute(self, group: list[Sequence], counts: list[int]) -> None:
        """Write each new token with the whole history that its keys and values depend on."""
        for sequence, count in zip(group, counts, strict=True):
            tokens, root = sequence.data.token_ids, sequence.block_digests[0]
            start = sequence.num_computed_tokens
            for place in range(start, start + count):
                block = sequence.block_table.blocks[place // SIZE]
                assert self.kv.pool.references(block) == 1, "only a block of one's own is written"
                assert block not in (self.kv.index or ()), "what the cache knows of is not overwritten"
                self.device[block, place % SIZE] = (root, tokens[: place + 1])
            sequence.num_computed_tokens += count

    def _read(self, sequence: Sequence, place: int) -> Any:
        return self.device.get((sequence.block_table.blocks[place // SIZE], place % SIZE))

    def _copy(self, copies: list[tuple[int, int] | None]) -> None:
        """Copy blocks as a backend does: all sources are read before anything is written."""
        pairs = [pair for pair in copies if pair is not None]
        read = [[self.device.get((source, offset)) for offset in range(SIZE)] for source, _ in pairs]
        for (_, target), values in zip(pairs, read, strict=True):
            for offset, value in enumerate(values):
                self.device[target, offset] = value

    def _books(self) -> tuple[Any, ...]:
        pool = self.kv.pool
        tables = [(s.seq_id, tuple(s.block_table.blocks), s.num_computed_tokens) for s in self.running]
        return pool.num_free, tuple(pool._cached), tuple(pool._references), tables

    def _note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


OPERATIONS: list[tuple[int, Callable[[MemoryMachine, random.Random], None]]] = [
    (14, lambda m, r: m.open([r.randrange(ALPHABET) for _ in range(r.randint(1, 9))], r.randrange(2))),
    (26, lambda m, r: m.grow(r.randrange(64), r.randrange(ALPHABET), commit=r.random() < 0.8)),
    (5, lambda m, r: m.grow_group(r.randrange(64), r.randint(1, 3), r.randrange(ALPHABET))),
    (6, lambda m, r: m.fork(r.randrange(64))),
    (6, lambda m, r: m.commit(r.randrange(64))),
    (6, lambda m, r: m.rewrite(r.randrange(64), r.randint(1, 4), r.randrange(ALPHABET))),
    (14, lambda m, r: m.release(r.randrange(64))),
    (3, lambda m, r: m.fail(r.randrange(64))),
    (6, lambda m, r: m.swap_out(r.randrange(64), r.randint(1, 3))),
    (6, lambda m, r: m.swap_in(r.randrange(64))),
    (2, lambda m, r: m.abort_swapped(r.randrange(64))),
    (6, lambda m, r: m.begin_step()),
    (1, lambda m, r: m.reset()),
    (1, lambda m, r: m.exhaust()),
]


def run_randomly(machine: MemoryMachine, count: int, seed: int, check: Callable[[], None]) -> None:
    """Make ``count`` random operations and call ``check`` after each."""
    generator = random.Random(seed)
    weights = [weight for weight, _ in OPERATIONS]
    operations = [operation for _, operation in OPERATIONS]
    for operation in generator.choices(operations, weights, k=count):
        if len(machine.running) > 12:
            machine.release(generator.randrange(64))
        operation(machine, generator)
        check()
