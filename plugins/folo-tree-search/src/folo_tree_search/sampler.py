"""Every request's tree decides which rows wait, grow, branch or end; then all rows are drawn at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from folo_core.errors import ParamsError
from folo_core.sampling.interface import SamplerOutput
from folo_tree_search.params import Node

if TYPE_CHECKING:
    from folo_core.request import Request
    from folo_core.sampling.interface import Sampler
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence
    from folo_tree_search.params import TreeSearchParams

_HOLD, _PRUNE = -1, 0
_MOST_BRANCHES = 1 << 20


class _Point(NamedTuple):
    """A node: its length in tokens with the prompt's, cumulative log probability and value."""

    length: int
    logprob: float
    value: float


class _Rows(NamedTuple):
    """A request's rows, column by column."""

    lengths: list[int]
    choices: list[int]
    """How many tokens could come next."""
    tags: list[int]
    """Number of the last node."""
    scores: list[float]


class _Tree:
    """One request's search. Its state is the nodes; what a row needs goes with it through forks and preemption.

    A row as long as its last node is a leaf that waits, and its score is the node's value.
    A longer one grows from there, and its score is its cumulative log probability.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.params = request, cast("TreeSearchParams", request.params)
        self.stops = frozenset(self.params.segment_stop_token_ids)
        self.points: list[_Point] = []
        self.num_expanded = self.num_judged = 0
        self.is_closing = False

    def plan(self, rows: _Rows) -> list[int]:
        """Return how many branches each row grows, or hold or prune.

        Tags become those of the rows to come, and scores theirs less the log probability of the token to come.

        Raises:
            ParamsError: the scoring function raised or returned no number.
        """
        self.points = self.points or [_Point(rows.lengths[0], 0.0, math.inf)]
        self.judge_answers()
        for row, sequence in enumerate(self.request.live):
            grown = rows.lengths[row] - self.points[rows.tags[row]].length
            if grown and not self.is_closing and self._ends_segment(sequence, grown):
                value = self._value(sequence, rows.scores[row], is_complete=False)
                self.points.append(_Point(rows.lengths[row], rows.scores[row], value))
                rows.tags[row] = len(self.points) - 1
        ends = [self.points[tag] for tag in rows.tags]
        leaves = [row for row, point in enumerate(ends) if point.length == rows.lengths[row]]
        counts = [1] * len(ends) if self.is_closing else self._decide(rows, ends, leaves)
        for row in leaves:
            rows.scores[row] = ends[row].value if counts[row] == _HOLD else ends[row].logprob
        return counts

    def judge_answers(self) -> None:
        """Give each answer that has ended since the last call its value."""
        for sequence in self.request.finished[self.num_judged :]:
            sequence.score = self._value(sequence, sequence.score, is_complete=True)
            self.num_judged += 1

    def _ends_segment(self, sequence: Sequence, grown: int) -> bool:
        return grown >= self.params.segment_tokens or bool(self.stops and sequence.data.last_token_id in self.stops)

    def _decide(self, rows: _Rows, ends: list[_Point], leaves: list[int]) -> list[int]:
        """Branch from the best leaves, for which the worst ones make room, or end the search."""
        params = self.params
        answers = sorted((sequence.score for sequence in self.request.finished), reverse=True)[: params.best_of]
        if len(answers) == params.best_of and params.stopping != "never":
            limit = -math.inf if params.stopping == "first" else max(point.value for point in ends)
            if answers[-1] >= limit:
                return [_PRUNE] * len(ends)
        # The best leaf first; of equal ones the deepest, then the oldest.
        leaves = sorted(
            leaves, key=[(-p.value, -p.length, tag) for p, tag in zip(ends, rows.tags, strict=True)].__getitem__
        )
        counts = [1] * len(ends)
        for row in leaves:
            counts[row] = _HOLD
        busy = {tag for tag, count in zip(rows.tags, counts, strict=True) if count == 1}
        room = params.width - len(ends)
        while leaves and len(busy) < params.parallel_expansions and self.num_expanded != params.expansions:
            new = min(params.branching, rows.choices[leaves[0]]) - 1
            if new > room + len(leaves) - 1:
                break  # branches that grow are not pruned: wait for them
            best = leaves.pop(0)
            while room < new:
                counts[leaves.pop()] = _PRUNE
                room += 1
            room, counts[best] = room - new, new + 1
            busy.add(rows.tags[best])
            self.num_expanded += 1
        if not busy:  # The budget is spent. The best of leaves and answers are the result, so these leaves grow on.
            self.is_closing = True
            for place, row in enumerate(leaves):
                ahead = place + sum(answer >= ends[row].value for answer in answers)
                counts[row] = 1 if ahead < params.best_of else _PRUNE
        return counts

    def _value(self, sequence: Sequence, logprob: float, *, is_complete: bool) -> float:
        """Ask the scoring function."""
        node = Node(
            prompt_token_ids=self.request.prompt_token_ids,
            token_ids=tuple(sequence.data.output_token_ids),
            text=None if sequence.detokenizer is None else sequence.detokenizer.text,
            cumulative_logprob=logprob,
            is_complete=is_complete,
        )
        try:
            value = float(self.params.scorer(node))
            if not math.isnan(value):
                return value
            failure: Exception = ValueError("it returned NaN")
        except Exception as error:  # noqa: BLE001 (whatever the caller's function raises)
            failure = error
        name = getattr(self.params.scorer, "__qualname__", type(self.params.scorer).__qualname__)
        message = f"scorer: {name} failed after {len(node.token_ids)} tokens: {type(failure).__name__}: {failure}"
        raise ParamsError(f"{message}: return a number for every node") from failure


class TreeSearchSampler:
    """Best-first search (Hart, Nilsson and Raphael, 1968) over segments, as in Tree of Thoughts (Yao et al., 2023)."""

    def __init__(self, plain: Sampler) -> None:
        """Draw with ``plain``, the sampler of SamplingParams with a temperature."""
        self._plain = plain
        self._trees: dict[str, _Tree] = {}

    def add_request(self, request: Request) -> None:
        """Plant a tree."""
        self._trees[request.request_id] = _Tree(request)

    def remove_request(self, request_id: str) -> None:
        """Fell it."""
        self._trees.pop(request_id, None)

    def finish(self, request: Request) -> list[Sequence]:
        """Return the ``n`` answers of the highest value."""
        self._trees[request.request_id].judge_answers()
        return sorted(request.finished, key=lambda sequence: -sequence.score)[: request.params.n]

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Grow, branch, hold and prune; a request whose scoring function fails ends by itself."""
        device, counts, tags, scores = logits.device, [], [], []
        columns = (metadata.positions, (logits > -torch.inf).sum(1), metadata.tags, metadata.scores)
        everything = [column.tolist() for column in columns]
        errors: dict[str, Exception] = {}
        for request_id, group in metadata.groups:
            rows = _Rows(*(column[group.start : group.stop] for column in everything))
            try:
                counts += self._trees[request_id].plan(rows)
            except ParamsError as error:
                counts += [_PRUNE] * len(group)
                errors[request_id] = error
            tags += rows.tags
            scores += rows.scores
        children = [(row, place) for row, count in enumerate(counts) for place in range(abs(count))]
        parents, places = torch.tensor(children, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        tag = torch.tensor(tags, device=device)
        tokens, logprobs = (found[parents, places][:, None] for found in self._draw(logits, metadata, counts, tag))
        score = torch.tensor(scores, dtype=torch.float32, device=device)[parents] + logprobs[:, 0]
        return SamplerOutput(
            parents=parents, tokens=tokens, logprobs=logprobs, scores=score, tags=tag[parents], errors=errors
        )

    def _draw(
        self, logits: torch.Tensor, metadata: SamplingMetadata, counts: list[int], tags: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``counts`` different tokens for each row; return them and their log probabilities, ``[rows, most]``.

        The first is drawn as the plain sampler would, each further one from what is left, with filters anew and a
        random number of its own (no sequence has a negative index). Rows that draw fewer are filled up with -1.
        """
        log_probs = logits.log_softmax(-1)
        tokens = torch.full((len(counts), max(1, *counts)), -1, device=logits.device)
        for place in range(max(counts)):
            rows = [row for row, count in enumerate(counts) if count > place]
            picked, index = metadata.select(rows), torch.tensor(rows, device=logits.device)
            if place:
                picked.sequence_indices = -(tags[index] * _MOST_BRANCHES + place)
            tokens[index, place] = drawn = self._plain.step(logits[index], picked).tokens[:, 0]
            logits[index, drawn] = -torch.inf
        return tokens, log_probs.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, 0.0)
