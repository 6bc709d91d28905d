"""What a tree search is asked for, and what its scoring function sees."""

from __future__ import annotations

from collections.abc import Callable, Collection  # noqa: TC003 (the configuration resolves annotations)
from typing import Any

import attrs

from folo_core.sampling_params import SamplingParams
from folo_core.validation import Relation, as_int, integer, one_of, rule


@attrs.frozen(slots=True, kw_only=True)
class Node:
    """A point of the tree, where a segment or the whole answer ends."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The answer's tokens so far."""
    text: str | None
    """The answer's text so far; None if the request has ``detokenize=False``."""
    cumulative_logprob: float
    """Sum of the log probabilities of ``token_ids``, after logits processors, before temperature and filters."""
    is_complete: bool
    """Whether the answer has ended."""


def mean_logprob(node: Node) -> float:
    """Return the answer's mean log probability per token."""
    return node.cumulative_logprob / max(len(node.token_ids), 1)


_IDS: Any = attrs.fields(SamplingParams).stop_token_ids


def _as_ids(value: Collection[int]) -> tuple[int, ...]:
    ids: tuple[int, ...] = _IDS.converter(value)
    return ids


def _fits_width(name: str) -> Relation:
    def judge(params: TreeSearchParams) -> str | None:
        value = getattr(params, name)
        return None if value <= params.width else f"{name}: {value}: must be <= width ({params.width})"

    return Relation((name, "width"), judge)


@attrs.frozen(slots=True, kw_only=True, repr=False)
class TreeSearchParams(SamplingParams):
    """Best-first search for ``best_of`` answers, of which ``n`` are returned: the best open leaf grows branches.

    Temperature, filters, penalties and the rest of SamplingParams shape every draw.
    """

    WIDTH_FIELD = "width"
    RELATIONS = (*SamplingParams.RELATIONS, *map(_fits_width, ("n", "best_of", "branching")))

    width: int = attrs.field(default=8, converter=as_int, metadata=integer(low=1))
    """Most rows at once, waiting leaves and growing branches together; the worst leaves make room for new branches."""
    branching: int = attrs.field(default=3, converter=as_int, metadata=integer(low=1))
    """Branches grown from a leaf; their first tokens all differ."""
    expansions: int | None = attrs.field(default=32, metadata=integer(low=1, optional=True))
    """Most leaves to grow branches from; the best leaves are then written to their ends. None for no limit."""
    parallel_expansions: int = attrs.field(default=1, converter=as_int, metadata=integer(low=1))
    """Most leaves whose branches grow at once: 1 is strictly best-first, more takes fewer steps."""
    segment_tokens: int = attrs.field(default=16, converter=as_int, metadata=integer(low=1))
    """A segment ends after this many tokens."""
    segment_stop_token_ids: tuple[int, ...] = attrs.field(default=(), converter=_as_ids, metadata=_IDS.metadata)
    """A segment also ends after one of these tokens, such as newlines."""
    stopping: str = attrs.field(default="bound", metadata=one_of("first", "bound", "never"))
    """When to end before ``expansions`` are spent. ``first``: as soon as the answers are complete. ``bound``: when,
    besides, no leaf is worth more than they: exact if no answer is worth more than the leaves that it grew from.
    ``never``: not before the whole tree was searched."""
    scorer: Callable[[Node], float] = attrs.field(
        default=mean_logprob, hash=False, metadata=rule(callable, "must be a function from Node to a number")
    )
    """Value of a segment's end or of an answer, higher is better; called once for each, never for a token.
    For programs in Python only."""

    @property
    def grows_in_place(self) -> bool:
        """False: any leaf may be pruned."""
        return False

    @property
    def is_scored(self) -> bool:
        """True: an answer's score is its value."""
        return True
