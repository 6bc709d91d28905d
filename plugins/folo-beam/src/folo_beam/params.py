"""What a request says about its beam search."""

from __future__ import annotations

from typing import ClassVar

import attrs

from folo_beam.constraints import are_phrases, as_phrases, given_tokens, phrases_fit
from folo_core.sampling_params import SamplingParams
from folo_core.validation import Relation, as_float, as_int, as_optional_int, integer, number, rule, show


def _answers_fit(params: BeamParams) -> str | None:
    name = "n" if params.num_return_sequences is None else "num_return_sequences"
    if params.num_answers > params.width:
        return f"{name}: {params.num_answers}: must be <= width ({params.width}): a search keeps no more"
    if params.n not in {1, params.num_answers}:
        return f"n: {params.n}: num_return_sequences={params.num_answers} says otherwise: give one of them"
    return None


def _groups_fit(params: BeamParams) -> str | None:
    if params.width % params.num_groups:
        return f"num_groups: {params.num_groups}: must divide width ({params.width}): groups are equally wide"
    if (params.num_groups > 1) != (params.diversity_penalty > 0):
        shown = f"diversity_penalty: {params.diversity_penalty} with num_groups={params.num_groups}"
        return f"{shown}: without a penalty groups are equal, and one group has no other: set both or neither"
    if params.num_groups > 1 and params.must_include:
        return f"must_include: {show(params.must_include)}: does not combine with num_groups > 1: leave one out"
    return None


def _nothing_is_drawn(params: BeamParams) -> str | None:
    for name, usual in (("temperature", (0.0, 1.0)), ("top_k", (0,)), ("top_p", (1.0,)), ("min_p", (0.0,))):
        if (value := getattr(params, name)) not in usual:
            return f"{name}: {value}: beam search draws nothing, so it would have no effect: leave it out"
    if params.best_of != params.n:
        return f"best_of: {params.best_of}: beam search has no candidates beside its beams: set width"
    return None


@attrs.frozen(slots=True, kw_only=True, repr=False)
class BeamParams(SamplingParams):
    """Beam search: the ``width`` likeliest beginnings of an answer grow side by side. It is deterministic."""

    WIDTH_FIELD: ClassVar[str] = "width"
    RELATIONS: ClassVar[tuple[Relation, ...]] = (
        *SamplingParams.RELATIONS,
        Relation(("n", "num_return_sequences", "width"), _answers_fit),
        Relation(("width", "num_groups", "diversity_penalty", "must_include"), _groups_fit),
        Relation(("must_include", "max_tokens"), phrases_fit),
        Relation(("temperature", "top_k", "top_p", "min_p", "n", "best_of"), _nothing_is_drawn),
    )

    width: int = attrs.field(default=4, converter=as_int, metadata=integer(low=1))
    """How many hypotheses live at once, and how many finished ones are kept."""
    length_penalty: float = attrs.field(default=1.0, converter=as_float, metadata=number(low=-16, high=16))
    """Scores are log probability / length ** length_penalty: above 0 favours longer answers, below 0 shorter ones."""
    early_stopping: bool | str = attrs.field(
        default=False, metadata=rule(lambda v: type(v) is bool or v == "never", 'must be True, False or "never"')
    )
    """When ``width`` have finished: True stops; False stops once the best live one scores no better at its present
    length; "never" once it could not even at the length that suits it best."""
    num_return_sequences: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """How many answers to return, best first: another name of ``n``, as transformers calls it."""
    num_groups: int = attrs.field(default=1, converter=as_int, metadata=integer(low=1))
    """Diverse beam search: groups of ``width / num_groups`` beams that avoid each other's tokens."""
    diversity_penalty: float = attrs.field(default=0.0, converter=as_float, metadata=number(low=0))
    """Subtracted from a token's log probability for each beam of earlier groups that takes it in the same step."""
    must_include: tuple[str | tuple[int, ...], ...] = attrs.field(
        default=(), converter=as_phrases, metadata=are_phrases()
    )
    """Phrases that must appear: texts, encoded exactly as they stand, or lists of token ids."""

    @property
    def num_answers(self) -> int:
        """How many answers are returned: ``n`` or ``num_return_sequences``, whichever is given."""
        return self.n if self.num_return_sequences is None else self.num_return_sequences

    @property
    def grows_in_place(self) -> bool:
        """False: a beam may be dropped at any step."""
        return False

    @property
    def is_scored(self) -> bool:
        """True: callers see the score that ranks the answers."""
        return True

    def problems_for(self, vocab_size: int, max_logprobs: int = 20, max_sequences: int = 256) -> list[str]:
        """Add what only the model can tell of ``must_include``."""
        problems = super().problems_for(vocab_size, max_logprobs, max_sequences)
        largest = max(map(max, given_tokens(self.must_include)), default=0)
        if largest >= vocab_size:
            problems.append(f"must_include: {largest}: outside the vocabulary; token ids end at {vocab_size - 1}")
        return problems
