"""Beam search that does not wait for the host: what finished is kept on the device, and rows are re-parented there.

The answer of a step has the fixed shape of ``Sampler.reparents``. Import this module only where triton is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
import triton
import triton.language as tl

from folo_beam.device import FIELDS, TUNING, choose, likeliest, power, rows_of, settings_of, to_device, told_pool
from folo_beam.sampler import BeamSampler
from folo_beam.steps import by_shape
from folo_core.sampling.interface import SamplerOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_beam.device import Tuning
    from folo_beam.params import BeamParams
    from folo_beam.sampler import Search
    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata

WIDEST = 16
"""Up to this width one program finds the places of all children; likewise ``MOST_CANDIDATES``, rounded up to powers of
two, that it finds them for."""
MOST_CANDIDATES = 1024

_LOWEST = tl.constexpr(float("-inf"))
_NEVER = tl.constexpr(1 << 30)
_ROOM = tl.constexpr(WIDEST)


class AheadBeamSampler(BeamSampler):
    """Beam search whose plain searches go on before the host knows what came of their last step."""

    reparents = True

    def __init__(self, tokenizer: Any = None) -> None:  # noqa: ANN401 (any tokenizer)
        super().__init__(tokenizer)
        self._pools = Pools()

    def steady_after(self, params: BeamParams) -> int | None:
        """Return 1 for searches that kernels advance by themselves, once the first step has made their rows."""
        if params.num_groups > 1 or params.must_include or params.stop or params.min_tokens:
            return None
        num_ends = len(params.stop_token_ids) + (0 if params.ignore_eos else len(params.resolved_eos))
        return 1 if fits(params.width, num_ends) else None

    def add_request(self, request: Request) -> None:
        """Open a search, with a lane on the device."""
        super().add_request(request)
        search = self._searches[request.request_id]
        self._searches[request.request_id] = attrs.evolve(search, lane=self._pools.take())

    def remove_request(self, request_id: str) -> None:
        """Drop the search and its lane."""
        if request_id in self._searches:
            self._pools.give_back(self._searches[request_id].lane)
        super().remove_request(request_id)

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Advance every search by one token."""
        if metadata.runs_ahead:
            return go_on(logits, metadata, by_shape(self._searches, metadata), self._pools)
        return super().step(logits, metadata)


class Pools:
    """The final scores of the best finished answers of each search, best first: a lane of numbers for each."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._count = 0
        self._scores: torch.Tensor | None = None

    def take(self) -> int:
        """Return a lane that nobody has. What it holds is void until a step has written it."""
        if not self._free:
            self._free.append(self._count)
            self._count += 1
        return self._free.pop()

    def give_back(self, lane: int) -> None:
        """Make a lane free."""
        self._free.append(lane)

    def on(self, device: torch.device) -> torch.Tensor:
        """Return all lanes, float64 ``[lanes, WIDEST]``, on ``device``."""
        if self._scores is None or len(self._scores) < self._count:
            grown = torch.full((max(64, 2 * self._count), WIDEST), -torch.inf, dtype=torch.float64, device=device)
            if self._scores is not None:
                grown[: len(self._scores)] = self._scores
            self._scores = grown
        return self._scores


@triton.jit
def _places(rank, row, going, rows, ROWS: tl.constexpr):
    """Return where each child that goes on does so, and which rows stay without one.

    The first child of a row does so in its place; further ones take the places of rows without a child.
    """
    lanes = tl.arange(0, ROWS)
    own = going[:, None] & (row[:, None] == lanes[None, :])
    first = tl.min(tl.where(own, rank[:, None], _NEVER), 0)
    in_place = tl.sum((own & (rank[:, None] == first[None, :])).to(tl.int32), 1)
    empty = (first == _NEVER) & (lanes < rows)
    number = tl.cumsum(empty.to(tl.int32))
    further = going & (in_place == 0)
    wanted = tl.cumsum(further.to(tl.int32))
    found = further[:, None] & empty[None, :] & (wanted[:, None] == number[None, :])
    place = tl.where(in_place > 0, row, tl.sum(tl.where(found, lanes[None, :], 0), 1))
    return place, empty & (number > tl.sum(further.to(tl.int32)))


@triton.jit
def _keep(pools, pool, final, ending, width, POOL: tl.constexpr):
    """Store the best of the kept scores and of those that end now, both of which fall from left to right."""
    offered = tl.where(ending, final, _LOWEST)
    above = tl.sum((ending[None, :] & (offered[None, :] > pool[:, None])).to(tl.int32), 1)
    before = tl.sum((pool[None, :] >= offered[:, None]).to(tl.int32), 1)
    slots = tl.arange(0, POOL)
    old, new = slots + above, before + tl.cumsum(ending.to(tl.int32)) - 1
    tl.debug_barrier()  # all have read what is overwritten now
    tl.store(pools + old, pool, mask=(slots < width) & (old < width))
    tl.store(pools + new, final, mask=ending & (new < width))


@triton.jit
def _fill(target, parent, mask, parents, tokens, totals, ended, ROWS: tl.constexpr):
    """Store what is nobody's child: a row without one, or an end that did not come."""
    tl.store(parents + target, parent, mask=mask)
    tl.store(tokens + target, tl.zeros([ROWS], tl.int64), mask=mask)
    tl.store(totals + target, tl.full([ROWS], _LOWEST, tl.float32), mask=mask)
    tl.store(ended + target, tl.full([ROWS], 1, tl.int8), mask=mask)


@triton.jit
def _go_on(
    ids, log_probs, scores, settings, pools, count, width, parents, tokens, totals, ended, num_rows,
    ROWS: tl.constexpr, COUNT: tl.constexpr, POOL: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Per search: rank its candidates, put each child in its place, and keep what has finished."""
    search = tl.program_id(0)
    mine = settings + search * (FIELDS + width + ENDS)
    kept, slots = pools + tl.load(mine + 7).to(tl.int32) * _ROOM, tl.arange(0, POOL)
    own = tl.load(kept + slots, mask=slots < width, other=_LOWEST)
    pool = tl.where(tl.load(mine + 8) > 0, own, told_pool(mine, width, POOL))
    score, row, token, _, going, ending, final = choose(
        ids, log_probs, scores, mine, pool, count, width, ROWS, COUNT, ENDS
    )
    _keep(kept, pool, final, ending, width, POOL)
    rows, base = tl.load(mine + 1).to(tl.int32), tl.load(mine + 6).to(tl.int32)
    place, idle = _places(tl.arange(0, ROWS * COUNT), row, going, rows, ROWS)
    end = num_rows + tl.cumsum(ending.to(tl.int32)) - 1
    target = base + tl.where(going, place, end)
    live = going | ending
    tl.store(parents + target, (base + row).to(tl.int64), mask=live)
    tl.store(tokens + target, token, mask=live)
    tl.store(totals + target, score, mask=live)
    tl.store(ended + target, ending.to(tl.int8), mask=live)
    each = base + tl.arange(0, ROWS)
    _fill(each, each.to(tl.int64), idle, parents, tokens, totals, ended, ROWS)
    missing = (tl.arange(0, ROWS) >= tl.sum(ending.to(tl.int32))) & (tl.arange(0, ROWS) < rows)
    _fill(num_rows + each, tl.full([ROWS], -1, tl.int64), missing, parents, tokens, totals, ended, ROWS)


def fits(width: int, num_ends: int) -> bool:
    """Return whether a search of this width, with so many tokens that end an answer, can go on by itself."""
    return width <= WIDEST and power(width) * power(width + num_ends) <= MOST_CANDIDATES


def go_on(
    logits: torch.Tensor,
    metadata: SamplingMetadata,
    shapes: Sequence[Sequence[tuple[Search, range]]],
    pools: Pools,
    *,
    tuning: Tuning = TUNING,
) -> SamplerOutput:
    """Advance all searches by one token without waiting for the device.

    Args:
        logits: ``[rows, vocab]``, only read.
        metadata: what is known of the rows.
        shapes: all searches and their rows, those of one shape together. Each has as many rows as it is wide.
        pools: where their lanes are.
        tuning: how the work is cut up.
    """
    rows, device = len(logits), logits.device
    parents, tokens = torch.empty((2, 2 * rows), dtype=torch.int64, device=device)
    totals = torch.empty(2 * rows, dtype=torch.float32, device=device)
    ended = torch.empty(2 * rows, dtype=torch.bool, device=device)
    for members in shapes:
        width, _, num_ends, _ = members[0][0].shape
        _, own, scores = rows_of(logits, metadata.scores, members)
        ids, log_probs = likeliest(own, width + num_ends, tuning=tuning)
        settings = to_device(settings_of(members, metadata), device)
        _go_on[(len(members),)](
            ids, log_probs, scores, settings, pools.on(device), ids.shape[1], width,
            parents, tokens, totals, ended.view(torch.int8), rows,
            ROWS=power(width), COUNT=power(ids.shape[1]), POOL=power(width), ENDS=num_ends, enable_fp_fusion=False,
        )  # fmt: skip
    return SamplerOutput(parents=parents, tokens=tokens[:, None], scores=totals, finished=ended)
