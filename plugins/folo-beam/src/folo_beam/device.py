"""Beam search on a CUDA device: three Triton kernels from logits to the rows that go on, and one copy to the host.

The first reads every logit once: of each chunk of a row its largest logits and its sum of exponentials. The second
merges a row's chunks into its likeliest tokens and their log probabilities. The third is ``grid.Grid.advance`` for
searches of one lane without phrases: it ranks a search's candidates and says which go on and which end.
Of equal candidates the one of the earlier row, then of the lower token id comes first.
Import this module only where triton is installed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_beam.sampler import Search
    from folo_core.sampling.metadata import SamplingMetadata

_LOWEST = tl.constexpr(float("-inf"))
FIELDS = tl.constexpr(9)
"""What the host tells of a search beside its kept scores and the tokens that end an answer; see ``settings_of``."""
MOST_CANDIDATES = 2048
"""Up to this many candidates of a search, rounded up to powers of two, are ranked by one program."""


@attrs.frozen(slots=True, kw_only=True)
class Tuning:
    """Sizes that decide speed, and of log probabilities the last bits."""

    chunk: int = 4096
    """Logits for each program; a power of two, and more than a search has candidates for each row."""
    warps: int = 8
    """Warps of a program that works on a chunk."""


TUNING = Tuning()


@triton.jit
def _pack(x, ids):
    """Return int64 that sort as the float32 ``x``, those of equal ones higher whose int32 ``ids`` are lower."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _value_of(packed):
    key = (packed >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _id_of(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _clean(x):
    """Return ``x`` without NaN, which become -inf, and without negative zeros, which tie with zero."""
    x = tl.where(x == 0.0, 0.0, x)
    return tl.where(x == x, x, _LOWEST)  # noqa: PLR0124 (only NaN differs from itself)


@triton.jit
def _survey(logits, stride, vocab, chunks, maxima, sums, tops, CHUNK: tl.constexpr, TOP: tl.constexpr):
    """Per chunk: its largest logit, the sum of exponentials relative to it, and its ``TOP`` largest, packed."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=_LOWEST).to(tl.float32)
    x = _clean(x)
    peak = tl.max(x)
    place = row * chunks + chunk
    tl.store(maxima + place, peak)
    tl.store(sums + place, tl.sum(tl.where(x > _LOWEST, tl.exp(x - peak), 0.0)))
    tl.store(tops + place * TOP + tl.arange(0, TOP), tl.topk(_pack(x, ids), TOP))


@triton.jit
def _merge(
    maxima, sums, tops, chunks, count, ids, log_probs, CHUNKS: tl.constexpr, TOP: tl.constexpr
):  # fmt: skip
    """Per row: its ``count`` likeliest tokens and their log probabilities, best first."""
    row = tl.program_id(0)
    places, columns = tl.arange(0, CHUNKS), tl.arange(0, TOP)
    peaks = tl.load(maxima + row * chunks + places, mask=places < chunks, other=_LOWEST)
    parts = tl.load(sums + row * chunks + places, mask=places < chunks, other=0.0)
    peak = tl.max(peaks)
    mass = tl.sum(tl.where(peaks > _LOWEST, parts * tl.exp(peaks - peak), 0.0))
    offered = tl.arange(0, CHUNKS * TOP)
    nothing = tl.full([], -(1 << 63), tl.int64)
    packed = tl.load(tops + row * chunks * TOP + offered, mask=offered < chunks * TOP, other=nothing)
    best = tl.topk(packed, TOP)
    tl.store(ids + row * count + columns, _id_of(best).to(tl.int64), mask=columns < count)
    tl.store(log_probs + row * count + columns, _value_of(best) - peak - tl.log(mass), mask=columns < count)


@triton.jit
def _worst_kept(pool, final, ending, width):
    """Return the ``width``-th largest of the kept scores and of those that end now.

    Both fall from left to right, except for what is no score: an entry is it if as many reach it as are wanted, and
    it is the largest such. Of equal endings only the last counts them all, which is enough.
    """
    offered = tl.where(ending, final, _LOWEST)
    reached = (pool[None, :] >= pool[:, None]).to(tl.int32)
    joined = (offered[None, :] >= pool[:, None]).to(tl.int32)
    of_pool = tl.sum(reached, 1) + tl.sum(joined, 1)
    beside = (pool[None, :] >= offered[:, None]).to(tl.int32)
    of_offered = tl.sum(beside, 1) + tl.cumsum(ending.to(tl.int32))
    kept = tl.max(tl.where(of_pool >= width, pool, _LOWEST))
    return tl.maximum(kept, tl.max(tl.where(of_offered >= width, offered, _LOWEST)))


@triton.jit
def _settle(settings, pool, width, score, going, ending):
    """Drop from ``ending`` what is not among the best finished, and from ``going`` all of a search that is over."""
    divisor, reach, early = tl.load(settings + 3), tl.load(settings + 4), tl.load(settings + 5).to(tl.int32)
    complete = tl.sum((pool > _LOWEST).to(tl.int32)) // width
    ending = ending & (early * complete == 0)
    final = score.to(tl.float64) / divisor
    worst = _worst_kept(pool, final, ending, width)
    best = tl.max(tl.where(going, score, _LOWEST)).to(tl.float64) / reach
    # Numbers, as the interpreter cannot spread a truth value that was compared from floats.
    goes_on = tl.where((worst == _LOWEST) | ((early == 0) & (best > worst)), 1, 0)
    return going & (goes_on > 0), ending & (final >= worst), final


@triton.jit
def choose(
    ids, log_probs, scores, mine, pool, count, width, ROWS: tl.constexpr, COUNT: tl.constexpr, ENDS: tl.constexpr
):  # fmt: skip
    """Rank a search's candidates.

    Returns:
        Of each, best first: its score, its row, counted within the search, its token and log probability, whether it
        goes on, whether it ends, and its final score if it does.
    """
    first, rows, last_step = tl.load(mine).to(tl.int32), tl.load(mine + 1).to(tl.int32), tl.load(mine + 2).to(tl.int32)
    rank = tl.arange(0, ROWS * COUNT)
    row, column = rank // COUNT, rank % COUNT
    there = (row < rows) & (column < count)
    log_prob = tl.load(log_probs + (first + row) * count + column, mask=there, other=_LOWEST)
    total = tl.load(scores + first + row, mask=there, other=_LOWEST) + log_prob
    order = tl.sort(_pack(_clean(total), rank), descending=True)
    score, place = _value_of(order), _id_of(order)
    live = score > _LOWEST
    row = place // COUNT
    candidate = (first + row) * count + place % COUNT
    token = tl.load(ids + candidate, mask=live, other=-1)
    log_prob = tl.load(log_probs + candidate, mask=live, other=_LOWEST)
    stops = live & (last_step > 0)
    for number in tl.static_range(ENDS):
        stops = stops | (live & (token == tl.load(mine + FIELDS + width + number).to(tl.int64)))
    going = live & (stops == 0)
    going = going & (tl.cumsum(going.to(tl.int32)) <= width)
    going, ending, final = _settle(mine, pool, width, score, going, stops & (rank < width))
    return score, row, token, log_prob, going, ending, final


@triton.jit
def told_pool(mine, width, POOL: tl.constexpr):
    """Return a search's kept scores as the host told them, best first, -inf for each that is missing."""
    slots = tl.arange(0, POOL)
    return tl.load(mine + FIELDS + slots, mask=slots < width, other=_LOWEST)


@triton.jit
def _advance(
    ids, log_probs, scores, settings, count, width, chosen,
    ROWS: tl.constexpr, COUNT: tl.constexpr, POOL: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Per search: rank its candidates and store those that go on, then those that end; see ``Step.chosen``."""
    search = tl.program_id(0)
    mine = settings + search * (FIELDS + width + ENDS)
    pool = told_pool(mine, width, POOL)
    score, row, token, log_prob, going, ending, _ = choose(
        ids, log_probs, scores, mine, pool, count, width, ROWS, COUNT, ENDS
    )
    slot = tl.where(going, tl.cumsum(going.to(tl.int32)), width + tl.cumsum(ending.to(tl.int32))) - 1
    target = chosen + (search * 2 * width + slot) * 3
    numbers = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (
        log_prob.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    )
    tl.store(target, (row + tl.load(mine).to(tl.int32)).to(tl.int64), mask=going | ending)
    tl.store(target + 1, token, mask=going | ending)
    tl.store(target + 2, numbers, mask=going | ending)


def likeliest(logits: torch.Tensor, count: int, *, tuning: Tuning = TUNING) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's ``count`` likeliest tokens, int64, and their log probabilities, float32: ``[rows, count]``.

    Args:
        logits: bfloat16, float16 or float32 ``[rows, vocab]``; only read.
        count: tokens wanted of each row; fewer come where the vocabulary is smaller.
        tuning: how the work is cut up.
    """
    rows, vocab = logits.shape
    count = min(count, vocab)
    chunks, top = triton.cdiv(vocab, tuning.chunk), power(count)
    if logits.stride(1) != 1 or top > tuning.chunk:
        message = f"logits with strides {logits.stride()}, count {count}: use contiguous rows, count <= {tuning.chunk}"
        raise ValueError(message)
    maxima, sums = (torch.empty((rows, chunks), dtype=torch.float32, device=logits.device) for _ in range(2))
    tops = torch.empty((rows, chunks, top), dtype=torch.int64, device=logits.device)
    ids = torch.empty((rows, count), dtype=torch.int64, device=logits.device)
    log_probs = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    _survey[rows, chunks](
        logits, logits.stride(0), vocab, chunks, maxima, sums, tops,
        CHUNK=tuning.chunk, TOP=top, num_warps=tuning.warps,
    )  # fmt: skip
    powers = {"CHUNKS": power(chunks), "TOP": top}
    _merge[(rows,)](maxima, sums, tops, chunks, count, ids, log_probs, **powers)
    return ids, log_probs


def fits(width: int, num_ends: int) -> bool:
    """Return whether a search of this width, with so many tokens that end an answer, is ranked by one program."""
    return power(width) * power(width + num_ends) <= MOST_CANDIDATES


def power(number: int) -> int:
    """Return the least power of two that is not below ``number``, 2 at least: one entry cannot be sorted."""
    return max(2, int(triton.next_power_of_2(number)))


@attrs.frozen(slots=True)
class Step:
    """A step of searches of one shape, on its way to the host."""

    rows: Sequence[int]
    """The row of the step's logits that each row of the searches is."""
    chosen: torch.Tensor
    """int64 ``[searches, 2 * width, 3]`` on the host once the stream has come so far: the row, -1 if there is none,
    its token, and the bits of its float32 score above those of its log probability. Of each search first what goes
    on, best first, then from ``width`` on what ends."""

    @classmethod
    def start(
        cls, logits: torch.Tensor, metadata: SamplingMetadata, members: Sequence[tuple[Search, range]], *,
        tuning: Tuning = TUNING,
    ) -> Step:  # fmt: skip
        """Set out without waiting for the device.

        Args:
            logits: ``[rows, vocab]``: all rows of the step.
            metadata: what is known of them; ``scores`` are their log probabilities so far.
            members: searches of one shape, one lane and no phrases, and their rows.
            tuning: how the work is cut up.
        """
        width, _, num_ends, _ = members[0][0].shape
        rows, logits, scores = rows_of(logits, metadata.scores, members)
        ids, log_probs = likeliest(logits, width + num_ends, tuning=tuning)
        settings = to_device(settings_of(members, metadata), logits.device)
        chosen = torch.full((len(members), 2 * width, 3), -1, dtype=torch.int64, device=logits.device)
        _advance[(len(members),)](
            ids, log_probs, scores, settings, ids.shape[1], width, chosen,
            ROWS=power(width), COUNT=power(ids.shape[1]), POOL=power(width), ENDS=num_ends, enable_fp_fusion=False,
        )  # fmt: skip
        return cls(rows, chosen.to("cpu", non_blocking=True))

    def columns(self) -> list[torch.Tensor]:
        """Return parents, tokens, logprobs, scores, tags and whether they end. The stream must have come so far."""
        chosen = self.chosen.numpy()
        search, slot = (chosen[:, :, 0] >= 0).nonzero()
        row, token, numbers = np.ascontiguousarray(chosen[search, slot].T)
        halves = numbers.view(np.float32).reshape(-1, 2)  # little-endian: the low half comes first
        parents, ends = np.array(self.rows, dtype=np.int64)[row], slot >= chosen.shape[1] // 2
        found = (parents, token, halves[:, 0], halves[:, 1], np.ones_like(token), ends)
        return [torch.from_numpy(column) for column in found]


def rows_of(
    logits: torch.Tensor, scores: torch.Tensor, members: Sequence[tuple[Search, range]]
) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Return the rows of some searches, and their logits and scores."""
    rows = [row for _, span in members for row in span]
    if rows != list(range(len(logits))):
        index = torch.tensor(rows, device=logits.device)
        logits, scores = logits[index], scores[index]
    return rows, logits, scores.contiguous()


def to_device(values: list[list[float]], device: torch.device) -> torch.Tensor:
    """Return float64 ``[searches, fields]`` on the device, on its way there."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64, pin_memory=True).to(device, non_blocking=True)


def settings_of(members: Sequence[tuple[Search, range]], metadata: SamplingMetadata) -> list[list[float]]:
    """Return what kernels are told of each search: ``FIELDS`` numbers, the kept scores, what ends an answer.

    The numbers: its first row, how many it has, whether this is its last step, the divisors of a final score and of
    the best that a live one may get, whether it stops as soon as enough have finished, its first row among all of the
    step, the lane of its kept scores on the device, and whether the host is behind, so that only that one has them all.
    """
    settings, first, behind = [], 0, metadata.is_behind
    for search, span in members:
        params, row = search.params, span.start
        length = int(metadata.places[row]) - metadata.prompt_lengths[row] + 1
        is_behind = behind is not None and bool(behind[row])
        pool = [-math.inf] * params.width if is_behind else search.pool(1)
        penalty, most = params.length_penalty, params.max_tokens or 0
        distant = params.early_stopping == "never" and penalty > 0
        early = params.early_stopping is True or params.width == 1
        divisors = float(length) ** penalty, float(most if distant else length) ** penalty
        numbers = first, len(span), length >= most, *divisors, early, row, search.lane, is_behind
        settings.append([*numbers, *pool, *search.ends])
        first += len(span)
    return settings
