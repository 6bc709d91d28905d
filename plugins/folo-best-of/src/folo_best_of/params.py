"""The parameters of best-of with a choice of ranking."""

from __future__ import annotations

from typing import ClassVar

import attrs

from folo_core.sampling_params import SamplingParams
from folo_core.validation import Relation, as_float, boolean, number

MOST_PENALTY = 10
"""Bound on ``length_penalty``: far past anything sensible, and no power of a length overflows below it."""


def _candidates_differ(params: BestOfParams) -> str | None:
    if params.temperature > 0:
        return None
    return f"temperature: {params.temperature}: candidates are drawn at random; use > 0, or greedy SamplingParams"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class BestOfParams(SamplingParams):
    """SamplingParams whose ``best_of`` candidates are ranked by a length-normalised score.

    Raises:
        ParamsError: one line for every bad field, at construction.
    """

    RELATIONS: ClassVar[tuple[Relation, ...]] = (
        *SamplingParams.RELATIONS,
        Relation(("temperature",), _candidates_differ),
    )

    length_penalty: float = attrs.field(
        default=0.0, converter=as_float, metadata=number(low=-MOST_PENALTY, high=MOST_PENALTY)
    )
    """A candidate's score is its log probability over its length in tokens to this power: 0 ranks by the log
    probability itself, 1 by its mean over the tokens; values above 0 favour long answers, below 0 short ones."""
    early_stop: bool = attrs.field(default=True, metadata=boolean())
    """Cancel a candidate as soon as it can no longer be among the ``n`` best. It never changes the answers."""

    @property
    def is_scored(self) -> bool:
        """Always: whoever chooses how to rank wants to see the scores."""
        return True
