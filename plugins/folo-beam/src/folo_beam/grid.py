"""One step of searches of one shape, as tensors.

Diverse beam search (Vijayakumar et al., 2016, arXiv:1610.02424, algorithm 1) runs it lane after lane, with the
paper's Hamming penalty on tokens that earlier lanes have just taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch

from folo_beam.constraints import add_wanted, choose

if TYPE_CHECKING:
    from folo_beam.sampler import Search
    from folo_core.sampling.metadata import SamplingMetadata

_BLOCK = 64


@attrs.frozen(slots=True)
class Grid:
    """The candidates of some searches: tensors ``[searches, width * n]``, ``n`` tokens for each of ``width`` rows."""

    searches: list[Search]
    length: torch.Tensor
    """float64 ``[searches, 1]``: tokens of each answer after this step."""
    most: torch.Tensor
    """float64 ``[searches, 1]``: ``max_tokens``."""
    total: torch.Tensor
    """Log probability of the whole answer; -inf where a search has fewer rows than its width."""
    columns: list[torch.Tensor]
    """Row of the logits, token, the token's log probability, and the row's tag."""

    @classmethod
    def of(cls, logits: torch.Tensor, metadata: SamplingMetadata, members: list[tuple[Search, range]]) -> Grid:
        """Lay out the likeliest tokens of each search's rows."""
        searches = [search for search, _ in members]
        width, _, num_ends, _ = searches[0].shape
        rows = torch.tensor([row for _, span in members for row in span], device=logits.device)
        places = [number * width + row for number, (_, span) in enumerate(members) for row in range(len(span))]
        index = torch.tensor(places, device=logits.device)
        wanted = [tokens for search in searches if search.banks for tokens in search.banks.wanted(search.request)]
        ids, logprobs = likeliest(logits if len(rows) == len(logits) else logits[rows], width + num_ends, wanted)

        def lay(column: torch.Tensor, empty: float = 0) -> torch.Tensor:
            whole = column.new_full((len(searches) * width, ids.shape[1]), empty)
            return whole.index_copy_(0, index, column.expand_as(ids)).view(len(searches), -1)

        total = lay(metadata.scores[rows, None] + logprobs, -math.inf)
        limits = [(len(s.request.live[0].data.output_token_ids) + 1, s.params.max_tokens or 0) for s in searches]
        length, most = torch.tensor(limits, dtype=torch.float64, device=logits.device)[:, :, None].unbind(1)
        columns = [lay(rows[:, None]), lay(ids), lay(logprobs), lay(metadata.tags[rows, None])]
        return cls(searches, length, most, total, columns)

    def advance(self) -> list[torch.Tensor]:
        """Return parents, tokens, logprobs, scores, tags and whether they end, of the rows to go on with."""
        _, num_lanes, _, _ = self.searches[0].shape
        chosen: list[list[torch.Tensor]] = []
        taken = self.columns[1][:, :0]
        for lane in range(1, num_lanes + 1):
            score = self.total
            if num_lanes > 1:
                tag, diversity = self.columns[3], self._each([s.params.diversity_penalty for s in self.searches])
                score = score.masked_fill((tag != 0) & (tag != lane), -math.inf)
                score = score - diversity.float() * (self.columns[1][:, :, None] == taken[:, None, :]).sum(2)
            going, ending, columns = self._advance_lane(lane, score)
            taken = torch.cat((taken, columns[1].masked_fill(~(going | ending), -1)), 1)
            # A row that goes on comes before one that ends: it does so in place, and the one that ends is the fork.
            chosen += [[going, *columns, torch.zeros_like(going)], [ending, *columns, torch.ones_like(going)]]
        mask, *found = (torch.cat(parts, 1) for parts in zip(*chosen, strict=True))
        return [column[mask] for column in found]

    def _advance_lane(self, lane: int, score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return which candidates go on, which end, and their columns: row, token, logprob, score and tag."""
        score, order = score.sort(stable=True, dim=1, descending=True)
        row, token, logprob, tag = (column.gather(1, order) for column in self.columns)
        params = [search.params for search in self.searches]
        share = params[0].width // params[0].num_groups
        ends = torch.tensor([search.ends for search in self.searches], dtype=torch.int64, device=token.device)
        live = score > -math.inf
        stops = live & ((self.length >= self.most) | (token[:, :, None] == ends[:, None, :]).any(2))
        if self.searches[0].banks is None:
            going, tag = live & ~stops, torch.full_like(tag, lane)
            going &= going.cumsum(1) <= share
            ending = stops & (torch.arange(score.shape[1], device=score.device) < share)
        else:
            chosen = choose(self.searches, row.tolist(), token.tolist(), stops.tolist(), live.sum(1).tolist())
            going, ending, tag = (torch.tensor(column, device=row.device) for column in chosen)
        self._settle(lane, going, ending, score)
        return going, ending, [row, token, logprob, score, tag]

    def _settle(self, lane: int, going: torch.Tensor, ending: torch.Tensor, score: torch.Tensor) -> None:
        """Drop from ``ending`` what is not among the best finished, and from ``going`` all of a search that is over."""
        params = [search.params for search in self.searches]
        penalty = self._each([p.length_penalty for p in params])
        early = self._each([p.early_stopping is True or p.width == 1 for p in params]) > 0
        distant = self._each([p.early_stopping == "never" and p.length_penalty > 0 for p in params]) > 0
        pool = torch.tensor([search.pool(lane) for search in self.searches], dtype=torch.float64, device=score.device)
        ending &= ~(early & (pool[:, -1:] > -math.inf))
        final = score / self.length**penalty
        finished = torch.cat((pool, final.masked_fill(~ending, -math.inf)), 1)
        worst = finished.topk(pool.shape[1]).values[:, -1:]
        reach = torch.where(distant, self.most, self.length)
        best = score.masked_fill(~going, -math.inf).amax(1, keepdim=True) / reach**penalty
        going &= (worst == -math.inf) | (~early & (best > worst))
        ending &= final >= worst

    def _each(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.total.device)[:, None]


def likeliest(logits: torch.Tensor, count: int, wanted: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's ``count`` likeliest tokens and those of ``wanted``, and their log probabilities.

    Overwrites ``logits``. Places without a token have -inf.
    """
    values, ids = _largest(logits, min(count, logits.shape[1]))
    peak = values[:, :1].clone()
    if wanted:
        values, ids = add_wanted(logits, values, ids, wanted)
    mass = logits.sub_(peak).exp_().sum(1, keepdim=True)
    return ids, values.sub_(peak).sub_(mass.log_())


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``logits.topk(count)`` returns: they lie in the ``count`` blocks with the largest maxima."""
    rows, vocab_size = logits.shape
    whole = vocab_size // _BLOCK * _BLOCK
    if 2 * count * _BLOCK > vocab_size:
        values, ids = logits.topk(count, 1)
        return values, ids
    blocks = logits[:, :whole].view(rows, -1, _BLOCK).amax(2).topk(count, 1).indices
    ids = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    ids = torch.cat((ids, torch.arange(whole, vocab_size, device=logits.device).expand(rows, -1)), 1)
    values, places = logits.gather(1, ids).topk(count, 1)
    return values, ids.gather(1, places)
