"""Beam search of the simplest kind, for tests: what it finds depends on logits alone, and not on how rows lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from engines import TreeParams
from folo_core.sampling.interface import SamplerOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OVER, NARROWER = 3, 5
"""Likeliest tokens, the second of every eight, at which a search is over, or goes on with a row less."""


@attrs.frozen(slots=True, kw_only=True)
class SearchParams(TreeParams):
    """Beams of a ``width``."""

    @property
    def is_scored(self) -> bool:
        return True


class Beams:
    """Keeps each request's likeliest rows; every tenth token or so ends a child."""

    reparents = True

    def __init__(self, *, is_steady: bool = True, dies: bool = True) -> None:
        self.is_steady, self.dies = is_steady, dies
        self.moved_ahead = self.narrowed = self.ran_behind = 0

    def steady_after(self, params: Any) -> int | None:
        return 1 if self.is_steady and not params.stop else None

    def add_request(self, request: Any) -> None:
        """Nothing to open."""

    def remove_request(self, request_id: str) -> None:
        """Nothing to drop."""

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        log_probs = logits.float().log_softmax(1)
        answers = [self._choose(log_probs, metadata, span) for _, span in metadata.groups]
        if not metadata.runs_ahead:
            return _packed([child for going, ending in answers for child in [*sorted(going), *ending]])
        self.ran_behind += int(metadata.is_behind.sum())
        return self._padded(answers, metadata)

    def _choose(self, log_probs: torch.Tensor, metadata: Any, span: range) -> tuple[list[Any], list[Any]]:
        """Return (parent, token, score, ends) of the children of a request that go on, and of those that end."""
        rows = slice(span.start, span.stop)
        length = int(metadata.places[span.start]) - metadata.prompt_lengths[span.start] + 1
        total = metadata.scores[rows, None] + log_probs[rows]
        chosen = self.choose(total, metadata.params[span.start], length)
        going, ending = ([(span.start + row, *rest) for row, *rest in children] for children in chosen)
        return going, ending

    def choose(self, total: torch.Tensor, params: SearchParams, length: int) -> tuple[list[Any], list[Any]]:
        """As ``_choose``, for the scores ``[rows, vocab]`` of all candidates, and answers of ``length`` tokens."""
        vocab = total.shape[1]
        ranked = total.flatten().argsort(descending=True)[: 2 * params.width].tolist()
        found = [(c // vocab, c % vocab, float(total.flatten()[c])) for c in ranked]
        if length >= params.max_tokens:
            return [], [(*child, True) for child in found[: params.width]]
        going = [(*child, False) for child in found if child[1] % 10][: params.width]
        ending = [(*child, True) for child in found[: params.width] if not child[1] % 10]
        if self.dies and found[0][1] == OVER:
            return [], [(*found[0], True)]
        if self.dies and found[0][1] % 8 == NARROWER and len(going) > 1:
            self.narrowed += 1
            going.pop()
        return going, ending

    def _padded(self, answers: list[Any], metadata: Any) -> SamplerOutput:
        rows = [(row, 0, -np.inf, True) for row in range(metadata.num_rows)]
        ends = [(-1, 0, 0.0, True)] * metadata.num_rows
        for (_, span), (going, ending) in zip(metadata.groups, answers, strict=True):
            ends[span.start : span.start + len(ending)] = ending
            left = []
            for child in going:
                if rows[child[0]][3]:
                    rows[child[0]] = child
                else:
                    left.append(child)
            for child in left:
                rows[next(row for row in span if rows[row][3])] = child
        self.moved_ahead += sum(child[0] != row for row, child in enumerate(rows))
        return _packed([*rows, *ends])

    def finish(self, request: Any) -> list[Any]:
        return sorted(request.finished, key=lambda s: (-s.score, s.data.output_token_ids))


def _packed(children: list[Any]) -> SamplerOutput:
    parents, tokens, scores, ends = zip(*children, strict=True)
    return SamplerOutput(
        parents=torch.tensor(parents),
        tokens=torch.tensor(tokens)[:, None],
        scores=torch.tensor(scores, dtype=torch.float32),
        finished=torch.tensor(ends),
    )


def dense(
    sampler: Beams, logits_after: Callable[[Sequence[int]], torch.Tensor], prompt: list[int], params: SearchParams
) -> list[tuple[list[int], float]]:
    """Return what a search finds, tokens and scores, best first, computed without any memory."""
    rows: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    while rows:
        log_probs = torch.stack([logits_after([*prompt, *tokens]).float().log_softmax(0) for tokens, _ in rows])
        total = torch.tensor([score for _, score in rows], dtype=torch.float32)[:, None] + log_probs
        going, ending = sampler.choose(total, params, len(rows[0][0]) + 1)
        finished += [([*rows[row][0], token], score) for row, token, score, _ in ending]
        rows = [([*rows[row][0], token], score) for row, token, score, _ in going]
    return sorted(finished, key=lambda found: (-found[1], found[0]))
