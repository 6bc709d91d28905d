"""Sampling on a CUDA device: every row and every mix of parameters in a fixed sequence of Triton kernels.

Nothing here asks the device anything, no shape depends on data and all inputs are read where they lie, so a call can
be captured in a CUDA graph. Rows are cut into chunks, so that few rows fill the device too; what a row does not ask
for its programs skip. Chosen tokens do not depend on that layout: maxima and selections are exact, and masses are
whole numbers, as in ``masks`` and ``random``, whose results these are. Differences: a weight may differ from the
CPU's in the last bit of float64, and a row of temperature 0 takes the lowest of its largest tokens.

A top-k or top-p cut is found in three passes: count the tokens in 256 even steps down from the largest logit, which
brackets the cut between a few of them; collect the logits inside the bracket; bisect over their bit patterns.
Import this module only where triton is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOWEST = tl.constexpr(float("-inf"))
_BUCKETS = tl.constexpr(256)
_TOP_P_UNIT = tl.constexpr(2.0**42)
"""Top-p counts weights in units of 2**-42 of the largest, as ``masks.top_p_cut`` does."""
_DEPTH = tl.constexpr(37.0)
"""A token this many temperatures below the largest has a mass of 0 in any unit used, so no cut matters there."""
_ROUNDER = tl.constexpr(2.0**52)
"""Added to a float64 in [0, 2**52) it leaves the nearest whole number, of two the even one, in the low 52 bits."""


@attrs.frozen(slots=True, kw_only=True)
class Tuning:
    """Sizes that decide speed alone, never a token."""

    chunk: int = 4096
    """Logits for each program; a power of two."""
    warps: int = 8
    """Warps of a program that works on a chunk."""
    tile: int = 4096
    """Candidates that the search for a cut holds in registers; a power of two."""
    tile_warps: int = 8
    """Warps of a program that searches for a cut."""


TUNING = Tuning()


@attrs.frozen(slots=True)
class Drawn:
    """What one call chose for each row."""

    tokens: torch.Tensor
    """int64 ``[rows]``."""
    peaks: torch.Tensor
    """float32 ``[rows]``: each row's largest logit, NaN if the row holds a NaN."""


@triton.jit
def _clean(x):
    """Return float32 logits without NaN, which become -inf, and without negative zeros, which tie with zero."""
    x = tl.where(x == 0.0, 0.0, x)
    return tl.where(x == x, x, _LOWEST)  # noqa: PLR0124 (only NaN differs from itself)


@triton.jit
def _chunk_of(logits, row, stride, chunk, vocab, CHUNK: tl.constexpr):
    """Return a chunk of a row as clean float32 ``[CHUNK]``; -inf past its end."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    return _clean(tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=_LOWEST).to(tl.float32))


@triton.jit
def _keys(x, SHIFT: tl.constexpr):
    """Return uint32 in the order of the float32 ``x``, less ``SHIFT`` low bits that logits of few bits never use."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)) >> SHIFT


@triton.jit
def _masses(x, peak, temperature, UNIT: tl.constexpr):
    """Return each token's weight relative to the largest one's in units of 1 / ``UNIT``, int64; 0 for nonsense."""
    weight = tl.exp((x.to(tl.float64) - peak.to(tl.float64)) * (1.0 / temperature.to(tl.float64)))
    weight = tl.where(weight <= 1.0, weight, 0.0)
    return (weight * UNIT + _ROUNDER).to(tl.int64, bitcast=True) & ((1 << 52) - 1)


@triton.jit
def _peak_of(maxima, row, chunks, CHUNKS: tl.constexpr):
    """Return a row's largest logit that is no NaN."""
    places = tl.arange(0, CHUNKS)
    return tl.max(_clean(tl.load(maxima + row * chunks + places, mask=places < chunks, other=_LOWEST)))


@triton.jit
def _limits_top_k(top_k, vocab):
    return (top_k > 0) & (top_k < vocab)


@triton.jit
def _survey(logits, stride, vocab, chunks, maxima, minima, best, CHUNK: tl.constexpr):
    """Per chunk: the largest logit (NaN if there is one), the least finite one, and the lowest id of the largest."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    raw = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=_LOWEST).to(tl.float32)
    bad = tl.max((raw != raw).to(tl.int32))  # noqa: PLR0124 (only NaN differs from itself)
    x = _clean(raw)
    peak = tl.max(x)
    place = row * chunks + chunk
    tl.store(maxima + place, tl.where(bad > 0, float("nan"), peak))
    tl.store(minima + place, tl.min(tl.where(x > _LOWEST, x, float("inf"))))
    tl.store(best + place, tl.min(tl.where((x == peak) & (ids < vocab), ids, vocab)))


@triton.jit
def _scale_of(minima, row, chunks, peak, temperature, CHUNKS: tl.constexpr):
    """Return how many buckets a logit of 1 spans, so that all of them cover the tokens that can have a mass."""
    places = tl.arange(0, CHUNKS)
    low = tl.min(tl.load(minima + row * chunks + places, mask=places < chunks, other=float("inf")))
    return 256.0 / tl.maximum(tl.minimum(peak - low, _DEPTH * temperature), 1e-30)


@triton.jit
def _buckets_of(x, peak, scale, temperature):
    """Return each logit's bucket, int32 that rises as the logit falls, and whether it can have a mass at all."""
    distance = peak - x
    inside = (x > _LOWEST) & (distance <= _DEPTH * temperature)
    return tl.where(inside, tl.minimum(distance * scale, 255.0), 255.0).to(tl.int32), inside


@triton.jit
def _count_buckets(
    logits, stride, vocab, chunks, maxima, minima, temperatures, top_ks, top_ps, counts,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Add a chunk's tokens in each bucket to its row's ``counts``."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    wanted = _limits_top_k(tl.load(top_ks + row), vocab) | (tl.load(top_ps + row) < 1.0)
    if wanted & (temperature > 0.0):
        peak = _peak_of(maxima, row, chunks, CHUNKS)
        scale = _scale_of(minima, row, chunks, peak, temperature, CHUNKS)
        x = _chunk_of(logits, row, stride, chunk, vocab, CHUNK)
        bucket, inside = _buckets_of(x, peak, scale, temperature)
        found = tl.histogram(bucket, _BUCKETS, mask=inside)
        tl.atomic_add(counts + row * _BUCKETS + tl.arange(0, _BUCKETS), found, mask=found > 0)


@triton.jit
def _bracket(counts, row, scale, temperature, top_k, top_p, limits_k):
    """Return the first and the last bucket that the cut may lie in; for top-k the first is 0, the last its own.

    Top-p cuts where the mass below falls to ``1 - top_p`` of all. That mass lies between what a bucket's tokens would
    have at its lower and at its upper edge, widened by a thousandth for roundings.
    """
    places = tl.arange(0, _BUCKETS)
    number = tl.load(counts + row * _BUCKETS + places).to(tl.float64)
    step = -1.0 / (scale.to(tl.float64) * temperature.to(tl.float64))
    most = number * (tl.exp(places.to(tl.float64) * step) * 1.001 + 1.0 / _TOP_P_UNIT)
    least = number * tl.maximum(tl.exp((places + 1).to(tl.float64) * step) * 0.999 - 1.0 / _TOP_P_UNIT, 0.0)
    spared = 1.0 - top_p.to(tl.float64)
    most_below = tl.sum(most) - tl.cumsum(most) + 2.0 / _TOP_P_UNIT
    least_below = tl.sum(least) - tl.cumsum(least)
    first = tl.sum((least_below * 0.999 > spared * tl.sum(most)).to(tl.int32))
    last = tl.sum((most_below * 1.001 > spared * tl.sum(least)).to(tl.int32))
    rank_last = tl.sum((tl.cumsum(number) < top_k.to(tl.float64)).to(tl.int32))
    return tl.where(limits_k, 0, first), tl.where(limits_k, rank_last, last)


@triton.jit
def _collect(
    logits, stride, vocab, chunks, maxima, minima, temperatures, top_ks, top_ps, counts, candidates, cursors, sums,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Append a chunk's logits inside the bracket to its row's ``candidates``, in any order.

    Where top-p alone cuts, also add up the mass of all tokens and of those above the bracket, ``sums [rows, 2]``.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    limits_k = _limits_top_k(top_k, vocab)
    if (limits_k | (top_p < 1.0)) & (temperature > 0.0):
        peak = _peak_of(maxima, row, chunks, CHUNKS)
        scale = _scale_of(minima, row, chunks, peak, temperature, CHUNKS)
        x = _chunk_of(logits, row, stride, chunk, vocab, CHUNK)
        bucket, inside = _buckets_of(x, peak, scale, temperature)
        first, last = _bracket(counts, row, scale, temperature, top_k, top_p, limits_k)
        candidate = inside & (bucket >= first) & (bucket <= last)
        taken = candidate.to(tl.int32)
        number = tl.sum(taken)
        if number > 0:
            start = tl.atomic_add(cursors + row, number)
            place = start + tl.cumsum(taken) - taken
            tl.store(candidates + row.to(tl.int64) * vocab + place, x, mask=candidate)
        if limits_k == 0:
            mass = _masses(x, peak, temperature, _TOP_P_UNIT)
            tl.atomic_add(sums + row * 2, tl.sum(mass))
            tl.atomic_add(sums + row * 2 + 1, tl.sum(tl.where(bucket < first, mass, 0)))


@triton.jit
def _tile_of(candidates, start, number, TILE: tl.constexpr):
    places = start + tl.arange(0, TILE)
    return tl.load(candidates + places, mask=places < number, other=_LOWEST).to(tl.float32)


@triton.jit
def _count_from(trial, keys, candidates, number, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Return how many candidates have a key of ``trial`` or more; ``keys`` are those of the first tile."""
    found = tl.sum((keys >= trial).to(tl.int32))
    start = TILE + number * 0
    while start < number:
        found += tl.sum((_keys(_tile_of(candidates, start, number, TILE), SHIFT) >= trial).to(tl.int32))
        start += TILE
    return found


@triton.jit
def _mass_from(
    trial, keys, masses, candidates, number, peak, temperature, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return the mass of the candidates with a key of ``trial`` or more."""
    found = tl.sum(tl.where(keys >= trial, masses, 0))
    start = TILE + number * 0
    while start < number:
        x = _tile_of(candidates, start, number, TILE)
        found += tl.sum(tl.where(_keys(x, SHIFT) >= trial, _masses(x, peak, temperature, _TOP_P_UNIT), 0))
        start += TILE
    return found


@triton.jit
def _cut_at_rank(rank, keys, candidates, number, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Return the key of the ``rank``-th largest candidate, found bit by bit; 0 if there are fewer."""
    cut, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << (31 - SHIFT), tl.uint32)
    for _ in range(32 - SHIFT):
        trial = cut | bit
        enough = _count_from(trial, keys, candidates, number, SHIFT, TILE) >= rank
        cut = tl.where(enough, trial, cut)
        bit = bit >> 1
    return cut


@triton.jit
def _cut_at_mass(
    needed, keys, masses, candidates, number, peak, temperature, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return the largest key down to which the candidates have a mass of ``needed``."""
    cut, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << (31 - SHIFT), tl.uint32)
    for _ in range(32 - SHIFT):
        trial = cut | bit
        found = _mass_from(trial, keys, masses, candidates, number, peak, temperature, SHIFT, TILE)
        cut = tl.where(found >= needed, trial, cut)
        bit = bit >> 1
    return cut


@triton.jit
def _select(
    vocab, chunks, maxima, temperatures, top_ks, top_ps, candidates, cursors, sums, cuts,
    SHIFT: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Per row: the smallest key that top-k and then top-p keep; 0 where neither is on."""
    row = tl.program_id(0)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    limits_k, limits_p = _limits_top_k(top_k, vocab), top_p < 1.0
    cut = tl.full([], 0, tl.uint32)
    if (limits_k | limits_p) & (temperature > 0.0):
        peak = _peak_of(maxima, row, chunks, CHUNKS)
        number, total, above = tl.load(cursors + row), tl.load(sums + row * 2), tl.load(sums + row * 2 + 1)
        mine = candidates + row.to(tl.int64) * vocab
        x = _tile_of(mine, 0, number, TILE)
        keys = _keys(x, SHIFT)
        if limits_k:
            cut = _cut_at_rank(top_k, keys, mine, number, SHIFT, TILE)
        if limits_p:
            masses = _masses(x, peak, temperature, _TOP_P_UNIT)
            if limits_k:
                total = _mass_from(cut, keys, masses, mine, number, peak, temperature, SHIFT, TILE)
            share = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            needed = tl.minimum(tl.maximum(share, 1), total) - above
            cut = _cut_at_mass(needed, keys, masses, mine, number, peak, temperature, SHIFT, TILE)
    tl.store(cuts + row, cut.to(tl.int64))


@triton.jit
def _kept_masses(
    x, row, cuts, peak, temperature, min_ps, FILTERED: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Return the masses by which tokens are drawn: 0 for those that a filter drops."""
    least = tl.load(min_ps + row).to(tl.float64)
    floor = peak.to(tl.float64) + temperature.to(tl.float64) * tl.log(least)
    masses = tl.where(x.to(tl.float64) >= floor, _masses(x, peak, temperature, UNIT), 0)
    if FILTERED:
        masses = tl.where(_keys(x, SHIFT) >= tl.load(cuts + row).to(tl.uint32), masses, 0)
    return masses


@triton.jit
def _weigh(
    logits, stride, vocab, chunks, maxima, temperatures, min_ps, cuts, weights,
    FILTERED: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Per chunk: the mass of the tokens that may be drawn."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        weight = tl.full([], 0, tl.int64)
        reaches = tl.full([], 1, tl.int32)
        if FILTERED:  # a chunk whose largest logit is cut need not be read
            largest = _keys(_clean(tl.load(maxima + row * chunks + chunk)), SHIFT)
            reaches = (largest >= tl.load(cuts + row).to(tl.uint32)).to(tl.int32)
        if reaches > 0:
            peak = _peak_of(maxima, row, chunks, CHUNKS)
            x = _chunk_of(logits, row, stride, chunk, vocab, CHUNK)
            weight = tl.sum(_kept_masses(x, row, cuts, peak, temperature, min_ps, FILTERED, SHIFT, UNIT))
        tl.store(weights + row * chunks + chunk, weight)


@triton.jit
def _uniform(seed, index, position):
    """Return ``folo_core.sampling.rng.uniform`` of one key: Philox4x32-10, then 53 bits as a float64 in [0, 1)."""
    mask = tl.full([], 0xFFFFFFFF, tl.uint64)
    seed, index, position = seed.to(tl.uint64), index.to(tl.uint64), position.to(tl.uint64)
    c0, c1, c2, c3 = position & mask, position >> 32, index & mask, index >> 32
    k0, k1 = seed & mask, seed >> 32
    for _ in tl.static_range(10):
        p0 = c0 * tl.full([], 0xD2511F53, tl.uint64)
        p1 = c2 * tl.full([], 0xCD9E8D57, tl.uint64)
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + tl.full([], 0x9E3779B9, tl.uint64)) & mask
        k1 = (k1 + tl.full([], 0xBB67AE85, tl.uint64)) & mask
    return ((c0 << 21) + (c1 >> 11)).to(tl.int64).to(tl.float64) * (2.0**-53)


@triton.jit
def _draw(
    logits, stride, vocab, chunks, maxima, best, temperatures, min_ps, cuts, weights, seeds, indices, positions,
    tokens, peaks,
    FILTERED: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Per row: the token at which the running mass passes the row's random share of all; greedily at temperature 0."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    places = tl.arange(0, CHUNKS)
    peak = _peak_of(maxima, row, chunks, CHUNKS)
    token = _report(maxima, best, row, chunks, vocab, peak, peaks, CHUNKS)
    if temperature > 0.0:
        mass = tl.load(weights + row * chunks + places, mask=places < chunks, other=0)
        running, total = tl.cumsum(mass), tl.sum(mass)
        drawn = _uniform(tl.load(seeds + row), tl.load(indices + row), tl.load(positions + row))
        share = tl.minimum((drawn * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.minimum(tl.sum(((running <= share) & (places < chunks)).to(tl.int32)), chunks - 1)
        before = tl.sum(tl.where(places < chunk, mass, 0))
        x = _chunk_of(logits, row, stride, chunk, vocab, CHUNK)
        inside = _kept_masses(x, row, cuts, peak, temperature, min_ps, FILTERED, SHIFT, UNIT)
        place = tl.sum((tl.cumsum(inside) <= share - before).to(tl.int32))
        token = tl.minimum(chunk * CHUNK + place, vocab - 1)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _report(maxima, best, row, chunks, vocab, peak, peaks, CHUNKS: tl.constexpr):
    """Store a row's peak, NaN if some chunk has one, and return its lowest largest token."""
    places = tl.arange(0, CHUNKS)
    found = tl.load(maxima + row * chunks + places, mask=places < chunks, other=_LOWEST)
    bad = tl.max((found != found).to(tl.int32))  # noqa: PLR0124 (only NaN differs from itself)
    tl.store(peaks + row, tl.where(bad > 0, float("nan"), peak))
    ids = tl.load(best + row * chunks + places, mask=places < chunks, other=vocab)
    return tl.minimum(tl.min(tl.where(_clean(found) == peak, ids, vocab)), vocab - 1)


@triton.jit
def _take_largest(maxima, best, vocab, chunks, tokens, peaks, CHUNKS: tl.constexpr):
    """Per row: the lowest of its largest tokens."""
    row = tl.program_id(0)
    peak = _peak_of(maxima, row, chunks, CHUNKS)
    token = _report(maxima, best, row, chunks, vocab, peak, peaks, CHUNKS)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _chunk_log_masses(logits, stride, vocab, chunks, maxima, sums, CHUNK: tl.constexpr):
    """Per chunk: its largest logit and the sum of exponentials relative to it, float32."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    x = _chunk_of(logits, row, stride, chunk, vocab, CHUNK)
    peak = tl.max(x)
    tl.store(maxima + row * chunks + chunk, peak)
    tl.store(sums + row * chunks + chunk, tl.sum(tl.where(x > _LOWEST, tl.exp(x - peak), 0.0)))


@triton.jit
def _log_probs(
    logits, stride, chunks, maxima, sums, tokens, width, found, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Per row: the log-softmax at each of its tokens."""
    row = tl.program_id(0)
    places, columns = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    peaks = tl.load(maxima + row * chunks + places, mask=places < chunks, other=_LOWEST)
    parts = tl.load(sums + row * chunks + places, mask=places < chunks, other=0.0)
    peak = tl.max(peaks)
    total = tl.sum(tl.where(peaks > _LOWEST, parts * tl.exp(peaks - peak), 0.0))
    ids = tl.load(tokens + row * width + columns, mask=columns < width, other=0)
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(found + row * width + columns, x - peak - tl.log(total), mask=columns < width)


@attrs.frozen(slots=True)
class _Rows:
    """Logits cut into chunks, and what a first look at them found."""

    logits: torch.Tensor
    tuning: Tuning
    maxima: torch.Tensor
    minima: torch.Tensor
    best: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, tuning: Tuning) -> _Rows:
        """Look at every logit once."""
        _check(logits)
        shape = (len(logits), triton.cdiv(logits.shape[1], tuning.chunk))
        maxima, minima = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
        best = torch.empty(shape, dtype=torch.int32, device=logits.device)
        rows = cls(logits, tuning, maxima, minima, best)
        _survey[shape](*rows.span, maxima, minima, best, **rows.chunked)
        return rows

    @property
    def span(self) -> tuple[torch.Tensor, int, int, int]:
        """Where the logits lie: tensor, row stride, vocabulary and chunks."""
        return self.logits, self.logits.stride(0), self.logits.shape[1], self.maxima.shape[1]

    @property
    def chunked(self) -> Mapping[str, int]:
        """How a program that works on one chunk is launched. Sums and products stay apart, as in torch."""
        return {"CHUNK": self.tuning.chunk, "num_warps": self.tuning.warps, "enable_fp_fusion": False}

    @property
    def chunks(self) -> int:
        """Chunks of a row, rounded up to a power of two."""
        return int(triton.next_power_of_2(self.maxima.shape[1]))

    @property
    def shift(self) -> int:
        """Low bits of a float32 that logits of this dtype leave at one value."""
        return {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[self.logits.dtype]


def _check(logits: torch.Tensor) -> None:
    if logits.dtype not in {torch.bfloat16, torch.float16, torch.float32} or logits.stride(1) != 1:
        message = f"logits: {logits.dtype} with strides {logits.stride()}: use bf16, fp16 or fp32, each row contiguous"
        raise ValueError(message)


def greedy_tokens(logits: torch.Tensor, *, tuning: Tuning = TUNING) -> Drawn:
    """Return the lowest of each row's largest tokens.

    Args:
        logits: bfloat16, float16 or float32 ``[rows, vocab]``.
        tuning: how the work is cut up.
    """
    rows = _Rows.of(logits, tuning)
    drawn = _empty(logits)
    _, _, vocab, chunks = rows.span
    _take_largest[(len(logits),)](rows.maxima, rows.best, vocab, chunks, drawn.tokens, drawn.peaks, CHUNKS=rows.chunks)
    return drawn


def _empty(logits: torch.Tensor) -> Drawn:
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    return Drawn(tokens, torch.empty(len(logits), dtype=torch.float32, device=logits.device))


def draw_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    sequence_indices: torch.Tensor,
    positions: torch.Tensor,
    *,
    filtered: bool = True,
    tuning: Tuning = TUNING,
) -> Drawn:
    """Draw one token for each row.

    Args:
        logits: bfloat16, float16 or float32 ``[rows, vocab]``; only read.
        temperature: float32 ``[rows]``; 0 takes the largest.
        top_k: int64 ``[rows]``; ``vocab`` or more, or less than 1, is off.
        top_p: float32 ``[rows]``; 1 is off.
        min_p: float32 ``[rows]``; 0 is off.
        seeds: int64 ``[rows]``; with the next two the key of ``folo_core.sampling.rng.uniform``.
        sequence_indices: int64 ``[rows]``.
        positions: int64 ``[rows]``.
        filtered: False promises that no row limits top-k or top-p, which spares three launches.
        tuning: how the work is cut up.
    """
    rows = _Rows.of(logits, tuning)
    drawn = _empty(logits)
    cuts = _cuts(rows, temperature, top_k, top_p) if filtered else top_k
    weights = torch.empty(rows.maxima.shape, dtype=torch.int64, device=logits.device)
    shared = {"FILTERED": filtered, "SHIFT": rows.shift, "UNIT": 2.0 ** (52 - logits.shape[1].bit_length())}
    sizes = {**shared, **rows.chunked, "CHUNKS": rows.chunks}
    _weigh[rows.maxima.shape](*rows.span, rows.maxima, temperature, min_p, cuts, weights, **sizes)
    _draw[(len(logits),)](
        *rows.span, rows.maxima, rows.best, temperature, min_p, cuts, weights, seeds, sequence_indices, positions,
        drawn.tokens, drawn.peaks, **sizes,
    )  # fmt: skip
    return drawn


def _cuts(rows: _Rows, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the smallest key that top-k and top-p keep of each row, int64 ``[rows]``."""
    logits, (count, chunks) = rows.logits, rows.maxima.shape
    # One zeroed piece of memory: per row two sums, 256 counts of 32 bits and a cursor.
    state = torch.zeros(count * (_BUCKETS.value // 2 + 3), dtype=torch.int64, device=logits.device)
    sums, counted, cursors = state.split((count * 2, count * _BUCKETS.value // 2, count))
    counts = counted.view(torch.int32)
    candidates = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    cuts = torch.empty(count, dtype=torch.int64, device=logits.device)
    given = (*rows.span, rows.maxima, rows.minima, temperature, top_k, top_p, counts)
    _count_buckets[count, chunks](*given, CHUNKS=rows.chunks, **rows.chunked)
    _collect[count, chunks](*given, candidates, cursors, sums, CHUNKS=rows.chunks, **rows.chunked)
    _select[(count,)](
        logits.shape[1], chunks, rows.maxima, temperature, top_k, top_p, candidates, cursors, sums, cuts,
        SHIFT=rows.shift, CHUNKS=rows.chunks, TILE=rows.tuning.tile, num_warps=rows.tuning.tile_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return cuts


def log_probs_of(logits: torch.Tensor, tokens: torch.Tensor, *, tuning: Tuning = TUNING) -> torch.Tensor:
    """Return the log-softmax of each row at its ``tokens``, float32 ``[rows, k]``, in one pass and without a copy.

    Args:
        logits: bfloat16, float16 or float32 ``[rows, vocab]``; only read.
        tokens: int64 ``[rows, k]``, each in ``[0, vocab)``.
        tuning: how the work is cut up.
    """
    _check(logits)
    (count, vocab), width = logits.shape, tokens.shape[1]
    chunks = triton.cdiv(vocab, tuning.chunk)
    maxima, sums = (torch.empty((count, chunks), dtype=torch.float32, device=logits.device) for _ in range(2))
    found = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    stride = logits.stride(0)
    _chunk_log_masses[count, chunks](
        logits, stride, vocab, chunks, maxima, sums, CHUNK=tuning.chunk, num_warps=tuning.warps
    )
    powers = {"CHUNKS": triton.next_power_of_2(chunks), "WIDTH": triton.next_power_of_2(width)}
    _log_probs[(count,)](logits, stride, chunks, maxima, sums, tokens.contiguous(), width, found, **powers)
    return found
