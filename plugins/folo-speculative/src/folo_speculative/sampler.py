"""Speculative decoding: drafted tokens are judged in one pass, and the output's distribution does not change.

Y. Leviathan, M. Kalman and Y. Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023;
C. Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023.

Let ``p`` be what the plain sampler draws the next token from after all filters, and ``x`` the drafted token.

**Certain drafts** (n-gram, greedy draft model): ``x`` is a function of the text before it. The plain sampler's own
draw ``y ~ p`` is made in every row, with the random number that it would use at that position. Where ``y = x`` the
draft is kept, and the first ``y != x`` takes its place; if all are kept, the ``y`` behind the last comes for free.
So every token is the plain sampler's own draw: by induction over positions, the text before a row that counts
consists of such draws, so its logits and random number are those of plain decoding, and so is its ``y``. The tokens
are the same one by one, whatever was drafted (as far as logits do not depend on the number of rows in the pass).

**Drawn drafts**, ``x ~ q``: keep ``x`` with probability ``min(1, p(x) / q(x))``, else draw from
``max(p - q, 0)``, normalised (theorem 1 of Leviathan et al.). A token is then ``x`` and kept with probability
``min(p, q)`` and a correction with ``max(p - q, 0)``, together ``p``. The random numbers of draft, judgement and
correction have keys of their own (``draws.py``), so they are independent. Behind the last kept draft ``y ~ p`` is
the plain draw. ``p`` and ``q`` are float32, which is as exact as this gets.

Which of the two rules holds is asked of each position: a ``q`` that is 1 on one token is certain.
How many tokens are drafted depends on earlier tokens only, so it changes no distribution.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import attrs
import torch

from folo_core.errors import ConfigError, ParamsError, PluginError
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling.rng import uniform
from folo_speculative.config import section_of
from folo_speculative.draws import ACCEPTING, CORRECTING, PlainDraws, draw

if TYPE_CHECKING:
    from folo_core.request import Request
    from folo_core.sampling.interface import Draft, Proposer, SamplerContext
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence
    from folo_speculative.params import SpeculativeParams

logger = logging.getLogger(__name__)

_ENDLESS = 1 << 40


@attrs.frozen(slots=True)
class _Drawn:
    """The distributions that a request's drafted tokens were drawn from."""

    position: int
    """Number of tokens before the first of them."""
    probs: torch.Tensor
    """float32 ``[k, vocab]``."""


class SpeculativeSampler:
    """Judges each sequence's drafts, appends one more token and asks the request's proposer for new drafts.

    A row's tag is the number of tokens to draft at most, 0 as long as nothing was learnt about it.
    """

    needs_history = True

    def __init__(self, context: SamplerContext) -> None:
        self._context = context
        self._draws = PlainDraws(context)
        self._proposers: dict[str, Proposer] = {}
        self._drawn: dict[str, _Drawn] = {}
        self._complained: set[str] = set()
        if section_of(context.config).draft_model is not None:
            self._proposer("draft-model")  # a model is loaded when the engine starts, not when a request comes

    def add_request(self, request: Request) -> None:
        """Make sure that the request's proposer is there.

        Raises:
            ParamsError: no plugin offers it, or it lacks its configuration.
        """
        name = cast("SpeculativeParams", request.params).proposer
        try:
            self._proposer(name)
        except (ConfigError, PluginError) as error:
            message = f"proposer: {name!r}: {error}"
            raise ParamsError(message) from error

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Return one child of each sequence: of the row behind the last draft that is kept, with one token more."""
        drafts = metadata.drafts
        judged = None if drafts is None else self._judge_drawn(logits, metadata, drafts)
        tokens = self._draws.tokens(logits, metadata, [params.temperature == 0 for params in metadata.params])
        if drafts is None:
            parents, tags = torch.arange(metadata.num_rows, device=logits.device), None
            limits = _limits(metadata, parents)
        else:
            kept = tokens == drafts
            if judged is not None:
                rows, kept[rows], tokens[rows] = judged
            parents = first_rejected(kept, drafts)
            limits = _learn(_limits(metadata, parents), metadata, parents, drafts)
            tags = None if torch.equal(limits, metadata.tags[parents]) else limits
        tokens = tokens[parents]
        return SamplerOutput(
            parents=parents,
            tokens=tokens[:, None],
            tags=tags,
            drafts=self._propose(metadata, parents, tokens, limits),
        )

    def finish(self, request: Request) -> list[Sequence]:
        """Return the finished sequences as they are: there is one."""
        return list(request.finished)

    def remove_request(self, request_id: str) -> None:
        """Drop what is kept about the request, here and in every proposer."""
        self._drawn.pop(request_id, None)
        for proposer in self._proposers.values():
            proposer.remove_request(request_id)

    def _proposer(self, name: str) -> Proposer:
        if name not in self._proposers:
            self._proposers[name] = self._context.proposer(name)
        return self._proposers[name]

    def _judge_drawn(
        self, logits: torch.Tensor, metadata: SamplingMetadata, drafts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Judge the drafts that were drawn: rows, whether each is kept, and what follows if it is not."""
        rows, probs = self._drawn_rows(metadata)
        distribution = self._draws.distribution
        if not rows or distribution is None:
            return None
        part, index = metadata.select(rows), torch.tensor(rows, device=logits.device)
        target, drafted, drawn = distribution.probabilities(logits[index], part), drafts[index], torch.cat(probs)
        numbers = uniform(part.seeds, part.sequence_indices + ACCEPTING, part.positions)
        chosen = drafted[:, None]
        kept = numbers * drawn.gather(1, chosen)[:, 0] < target.gather(1, chosen)[:, 0]
        numbers = uniform(part.seeds, part.sequence_indices + CORRECTING, part.positions)
        residual = (target - drawn).clamp_(min=0)
        # Equal distributions reject nothing but what rounding rejects, and leave nothing to draw from.
        empty = residual.amax(1) == 0
        residual[empty] = target[empty]
        return index, kept, draw(residual, numbers)

    def _drawn_rows(self, metadata: SamplingMetadata) -> tuple[list[int], list[torch.Tensor]]:
        """Return the rows whose drafts are uncertain, and the distribution of each, float32 ``[rows, vocab]``.

        What was drafted before a preemption has no rows: it is forgotten.
        """
        if not self._drawn:
            return [], []
        positions = metadata.positions.tolist()
        chosen, probs = [], []
        for request_id, rows in metadata.groups:
            drawn = self._drawn.pop(request_id, None)
            if drawn is not None and len(rows) > 1 and positions[rows[0]] == drawn.position:
                found = drawn.probs[: len(rows) - 1]
                uncertain = found.amax(1) < 1
                chosen += [rows[place] for place in uncertain.nonzero()[:, 0].tolist()]
                probs.append(found[uncertain])
        return chosen, probs

    def _propose(
        self, metadata: SamplingMetadata, parents: torch.Tensor, tokens: torch.Tensor, limits: torch.Tensor
    ) -> torch.Tensor | None:
        """Return drafts for the sequences that go on, int64 ``[m, d]``, -1 padded; None if there are none."""
        rows, last = parents.tolist(), tokens.tolist()
        rooms = _rooms(metadata, parents, last, limits)
        groups: dict[str, list[int]] = {}
        for child, room in enumerate(rooms.tolist()):
            if room > 0:
                groups.setdefault(_own(metadata)[rows[child]].proposer, []).append(child)
        found = tokens.new_full((len(rows), max(int(rooms.max()), 0)), -1)
        for name, children in groups.items():
            view = _following(metadata, [rows[child] for child in children], [last[child] for child in children])
            index = torch.tensor(children, device=tokens.device)
            draft = self._ask(name, view, int(rooms[index].max()))
            if draft is None:
                continue
            width = min(draft.tokens.shape[1], found.shape[1])
            inside = torch.arange(width, device=tokens.device) < rooms[index, None]
            found[index, :width] = draft.tokens[:, :width].masked_fill(~inside, -1)
            if draft.probs is not None:
                positions = view.positions.tolist()
                for place, request_id in enumerate(view.request_ids):
                    self._drawn[request_id] = _Drawn(positions[place], draft.probs[place, :width])
        longest = int((found >= 0).sum(1).max()) if groups else 0
        return found[:, :longest] if longest else None

    def _ask(self, name: str, metadata: SamplingMetadata, count: int) -> Draft | None:
        """Return a proposer's drafts; one that fails costs speed, not the requests."""
        try:
            draft = self._proposers[name].propose(metadata, count)
            if draft.tokens.dtype != torch.int64 or len(draft.tokens) != metadata.num_rows:
                message = f"drafts {draft.tokens.dtype} {list(draft.tokens.shape)} for {metadata.num_rows} rows"
                raise ValueError(message)  # noqa: TRY301 (a wrong answer is a failure like any other)
        except Exception as error:  # noqa: BLE001 (a proposer may raise anything)
            if name not in self._complained:
                self._complained.add(name)
                logger.warning("proposer %r failed, its requests go on undrafted: %r", name, error)
            return None
        return draft


def first_rejected(kept: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """Return each sequence's first row whose draft is not kept, int64 ``[sequences]``: the last one if all are.

    Args:
        kept: bool ``[rows]``; False where nothing is drafted.
        drafts: int64 ``[rows]``: -1 in the last row of each sequence.
    """
    last = drafts < 0
    sequences = last.cumsum(0) - last.long()
    rows = torch.arange(len(kept), device=kept.device).masked_fill_(kept, len(kept))
    return rows.new_full((int(last.sum()),), len(kept)).scatter_reduce_(0, sequences, rows, "amin")


def _own(metadata: SamplingMetadata) -> list[SpeculativeParams]:
    """Return the rows' parameters as what they are: their class picked this sampler."""
    return cast("list[SpeculativeParams]", metadata.params)


def _most(metadata: SamplingMetadata, parents: torch.Tensor) -> torch.Tensor:
    """Return how many tokens each sequence may draft, int64 ``[m]``."""
    own = _own(metadata)
    return torch.tensor([own[row].num_draft_tokens for row in parents.tolist()], device=parents.device)


def _limits(metadata: SamplingMetadata, parents: torch.Tensor) -> torch.Tensor:
    """Return how many tokens each sequence drafted at most so far, int64 ``[m]``."""
    tags = metadata.tags[parents]
    return torch.where(tags > 0, tags, _most(metadata, parents))


def _learn(
    limits: torch.Tensor, metadata: SamplingMetadata, parents: torch.Tensor, drafts: torch.Tensor
) -> torch.Tensor:
    """Return how many tokens each sequence should draft at most from now on, int64 ``[m]``."""
    ends = (drafts < 0).nonzero()[:, 0]
    starts = torch.cat((ends.new_zeros(1), ends[:-1] + 1))
    drafted, kept = ends - starts, parents - starts
    halved, doubled = (limits // 2).clamp_(min=1), torch.minimum(limits * 2, _most(metadata, parents))
    learnt = torch.where(kept == 0, halved, torch.where(kept == drafted, doubled, limits))
    return torch.where(drafted > 0, learnt, limits)


def _rooms(metadata: SamplingMetadata, parents: torch.Tensor, tokens: list[int], limits: torch.Tensor) -> torch.Tensor:
    """Return how many drafts are worth while behind the rows' new tokens, int64 ``[m]``: none behind the last one."""
    chosen = [(metadata.params[row], metadata.prompt_lengths[row]) for row in parents.tolist()]
    ends = [
        token in params.stop_token_ids or (token in params.resolved_eos and not params.ignore_eos)
        for (params, _), token in zip(chosen, tokens, strict=True)
    ]
    # The length that the answer must not reach with drafts, and the one from which it may end by a token.
    most = [start + (_ENDLESS if params.max_tokens is None else params.max_tokens) - 1 for params, start in chosen]
    least = [start + params.min_tokens for params, start in chosen]
    ending, most_, least_ = torch.tensor([ends, most, least], dtype=torch.int64, device=parents.device)
    lengths = metadata.positions[parents] + 1
    rooms = torch.minimum(limits, most_ - lengths)
    return rooms.masked_fill_((ending > 0) & (lengths >= least_), 0)


def _following(metadata: SamplingMetadata, rows: list[int], tokens: list[int]) -> SamplingMetadata:
    """Return the metadata of the position behind each row's new token."""
    view = metadata.select(rows)
    view.positions = view.positions + 1
    histories = metadata.history or []
    view.history = [[*histories[row], token] for row, token in zip(rows, tokens, strict=True)]
    return view
