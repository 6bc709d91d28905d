"""Beam search, batched: searches of one shape advance together. A step is that of transformers' beam search."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import torch

from folo_beam.constraints import Banks
from folo_beam.steps import advance, by_shape
from folo_core.sampling.interface import SamplerOutput

if TYPE_CHECKING:
    from folo_beam.params import BeamParams
    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence


@attrs.frozen(slots=True)
class Search:
    """One request's search. Scores and lanes ride with its rows, and the engine keeps what has finished."""

    request: Request
    params: BeamParams
    ends: tuple[int, ...]
    banks: Banks | None
    lane: int = -1
    """Where its kept scores are on the device; -1 for nowhere."""

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """Searches of one shape share a grid: width, lanes, tokens that end an answer, whether phrases must appear."""
        return self.params.width, self.params.num_groups, len(self.ends), self.banks is not None

    def score(self, sequence: Sequence) -> float:
        """Return a finished hypothesis' final score: its log probability over a power of its length."""
        return sequence.score / float(len(sequence.data.output_token_ids) ** self.params.length_penalty)

    def kept(self, lane: int) -> list[Sequence]:
        """Return the best finished hypotheses of a lane (a group of beams), as many as it is wide."""
        tag = self.banks.all_met if self.banks else lane
        found = [sequence for sequence in self.request.finished if sequence.tag == tag]
        return sorted(found, key=self.score, reverse=True)[: self.params.width // self.params.num_groups]

    def pool(self, lane: int) -> list[float]:
        """Return the scores of the kept hypotheses, best first, and -inf for every one still missing."""
        scores = [*map(self.score, self.kept(lane))]
        return scores + [-math.inf] * (self.params.width // self.params.num_groups - len(scores))


class BeamSampler:
    """Serves BeamParams."""

    reads_any_dtype = True

    def __init__(self, tokenizer: Any = None) -> None:  # noqa: ANN401 (any tokenizer)
        self._tokenizer = tokenizer
        self._searches: dict[str, Search] = {}

    def add_request(self, request: Request) -> None:
        """Open a search."""
        params: BeamParams = request.params  # type: ignore[assignment]  # its class picked this sampler
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else params.resolved_eos))
        banks = Banks.of(request, self._tokenizer, ends) if params.must_include else None
        self._searches[request.request_id] = Search(request, params, ends, banks)

    def remove_request(self, request_id: str) -> None:
        """Drop the search."""
        self._searches.pop(request_id, None)

    def finish(self, request: Request) -> list[Sequence]:
        """Rank the kept hypotheses by their final scores, which callers see."""
        search = self._searches[request.request_id]
        kept = [sequence for lane in range(1, search.params.num_groups + 1) for sequence in search.kept(lane)]
        kept.sort(key=search.score, reverse=True)
        if search.banks:  # a stop string may end an answer before all its phrases appear: such come last
            kept += sorted((s for s in request.finished if s not in kept), key=search.score, reverse=True)
        for sequence in kept:
            sequence.score = search.score(sequence)
        return kept[: search.params.num_answers]

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Advance every search by one token, those of one shape in one grid."""
        # The engine reads all this on the host, where sorting a few numbers costs least.
        columns = [column.cpu().numpy() for column in advance(logits, metadata, by_shape(self._searches, metadata))]
        order = columns[0].argsort(kind="stable")  # by request, and of a row's children first the one to go on
        parents, tokens, logprobs, scores, tags, ends = (torch.from_numpy(column[order]) for column in columns)
        return SamplerOutput(
            parents=parents, tokens=tokens[:, None], logprobs=logprobs[:, None], scores=scores, tags=tags, finished=ends
        )
