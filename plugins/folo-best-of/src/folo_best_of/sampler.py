"""Best-of: one row fans out into candidates, each is drawn by itself, and the most likely ones are the answer.

A candidate's score is its log probability under the model, the sum over its tokens of their log-softmax at
temperature 1, whatever it was drawn with. Divided by a power of the length it is the normalised score of
Y. Wu et al., "Google's Neural Machine Translation System", 2016, section 7, with the plain length as in
K. Murray and D. Chiang, "Correcting Length Bias in Neural Machine Translation", WMT 2018.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import attrs
import torch

from folo_best_of.params import BestOfParams
from folo_core.sampling.identity import identity
from folo_core.sampling.interface import SamplerOutput, TokenScorer

if TYPE_CHECKING:
    from folo_core.request import Request
    from folo_core.sampling.interface import Sampler
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams
    from folo_core.sequence import Sequence

_MARGIN = 1 - 1e-9
"""Lifts a bound, which is never above 0, past what rounding the powers of two lengths could do to it."""


class BestOfSampler:
    """Fans a request's first row out into ``best_of`` candidates, scores them and returns the ``n`` best.

    A row's tag is 0 until it has fanned out; a candidate's is 1 more than the tokens that its request began with,
    which are none unless it branched off another. A row's score is its log probability since then, in float32.
    """

    def __init__(self, draw: Sampler) -> None:
        """Draw tokens with ``draw``, which continues each row by one token."""
        self.needs_history = getattr(draw, "needs_history", False)
        self.reads_any_dtype = getattr(draw, "reads_any_dtype", False) and isinstance(draw, TokenScorer)
        self._draw = draw
        self._scorer = draw if isinstance(draw, TokenScorer) else None
        self._requests: dict[str, Request] = {}
        self._fanned_out: set[str] = set()

    def steady_after(self, params: SamplingParams) -> int | None:
        """Return 1 if all candidates are kept to their ends: then only the fan-out is no plain step."""
        steady = getattr(self._draw, "steady_after", None)
        return 1 if _keeps_all(params) and steady is not None and steady(params) == 0 else None

    def add_request(self, request: Request) -> None:
        """Remember the request: its candidates that have ended decide which of the others can still win."""
        self._requests[request.request_id] = request
        self._fanned_out.discard(request.request_id)
        self._draw.add_request(request)

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Fan out rows that are new, draw a token for every candidate, and drop candidates that can win no more."""
        scorer = self._scorer
        log_probs = logits if scorer else logits.log_softmax(-1)  # before the draw, which may write to the logits
        parents = identity(metadata.num_rows, logits.device)
        copies = self._copies(metadata)
        if copies is not None:
            metadata = _fan_out(metadata, copies)
            parents = parents.repeat_interleave(torch.tensor(copies, device=logits.device))
            logits = logits[parents]
        tokens = self._draw.step(logits, metadata).tokens
        logprobs = scorer.log_probs_of(logits, tokens) if scorer else log_probs[parents[:, None], tokens]
        scores = metadata.scores + logprobs.sum(1)
        kept = self._contenders(scores, metadata)
        return SamplerOutput(
            parents=parents[kept],
            tokens=tokens[kept],
            logprobs=logprobs[kept],
            scores=scores[kept],
            tags=metadata.tags[kept],
        )

    def finish(self, request: Request) -> list[Sequence]:
        """Return the ``n`` candidates of the highest score, best first; of equal ones, the one drawn first."""
        for sequence in request.finished:
            sequence.score = _score(sequence, _length_penalty(request.params))
        return sorted(request.finished, key=lambda s: (-s.score, s.index))[: request.params.n]

    def remove_request(self, request_id: str) -> None:
        """Forget the request."""
        self._requests.pop(request_id, None)
        self._fanned_out.discard(request_id)
        self._draw.remove_request(request_id)

    def _copies(self, metadata: SamplingMetadata) -> list[int] | None:
        """Return how many candidates each row becomes; None if no row is new. Only a request's one row can be new.

        Tags say which rows are, but reading them waits for the device: once per request is enough.
        """
        single = [(name, rows.start) for name, rows in metadata.groups if len(rows) == 1]
        unsure = [row for name, row in single if name not in self._fanned_out]
        self._fanned_out.update(name for name, _ in metadata.groups)  # they all have, after this step
        tags = metadata.tags[unsure].tolist() if unsure else []
        new = {row for row, tag in zip(unsure, tags, strict=True) if tag == 0}
        return [params.best_of if row in new else 1 for row, params in enumerate(metadata.params)] if new else None

    def _contenders(self, scores: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor | slice:
        """Return what selects the candidates that may yet be among the best of their request.

        A log probability only falls, in float32 too. So the final score is at most what the candidate has now, over
        the largest power of a length that it may still end with: the longest one's, or, if short answers are
        favoured, that of its length now. Those whose bound is below the ``n``-th best finished score are out.
        A bound that equals it stays in, as ranking may prefer either.
        """
        targets = {request_id: _target(self._requests[request_id]) for request_id, _ in metadata.groups}
        if max(targets.values()) == -math.inf:
            return slice(None)
        rows = [
            (targets[request_id], _length_penalty(params), length - 1, params.max_tokens or math.inf)
            for request_id, params, length in zip(
                metadata.request_ids, metadata.params, metadata.prompt_lengths, strict=True
            )
        ]
        target, penalty, before, longest = torch.tensor(rows, dtype=torch.float64, device=scores.device).T
        taken_over = metadata.tags - 1
        length = torch.where(penalty > 0, longest, metadata.positions - before) - taken_over
        return torch.ge(scores.double() / length.pow(penalty) * _MARGIN, target)


def _fan_out(metadata: SamplingMetadata, copies: list[int]) -> SamplingMetadata:
    """Return the metadata of the candidates: a new row's get the sequence indices that follow its own."""
    candidates = metadata.select([row for row, count in enumerate(copies) for _ in range(count)])
    device = candidates.tags.device
    places = torch.tensor([place for count in copies for place in range(count)], device=device)
    taken_over = candidates.positions - torch.tensor(candidates.prompt_lengths, device=device)
    return attrs.evolve(
        candidates,
        sequence_indices=candidates.sequence_indices + places,
        tags=torch.where(candidates.tags == 0, taken_over + 1, candidates.tags),
    )


def _keeps_all(params: SamplingParams) -> bool:
    """Return whether no candidate is cancelled early."""
    return params.best_of == params.n or (isinstance(params, BestOfParams) and not params.early_stop)


def _target(request: Request) -> float:
    """Return the score that a candidate must reach to be returned, as far as is known; -inf while all can win."""
    params = request.params
    if _keeps_all(params) or len(request.finished) < params.n:
        return -math.inf
    penalty = _length_penalty(params)
    return heapq.nlargest(params.n, (_score(sequence, penalty) for sequence in request.finished))[-1]


def _score(sequence: Sequence, length_penalty: float) -> float:
    """Return a finished candidate's score: its log probability, normalised by the length that it is made of."""
    taken_over = max(sequence.tag - 1, 0)
    length = len(sequence.data.output_token_ids) - taken_over
    return sequence.score / math.pow(max(length, 1), length_penalty)


def _length_penalty(params: SamplingParams) -> float:
    return params.length_penalty if isinstance(params, BestOfParams) else 0.0
