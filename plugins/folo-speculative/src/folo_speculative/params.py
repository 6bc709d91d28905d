"""What a request says about its speculation."""

from __future__ import annotations

from typing import ClassVar

import attrs

from folo_core.sampling_params import SamplingParams
from folo_core.validation import Relation, as_int, boolean, integer, text


def _ngrams_fit(params: SpeculativeParams) -> str | None:
    if params.min_ngram <= params.max_ngram:
        return None
    return f"min_ngram: {params.min_ngram}: must be <= max_ngram ({params.max_ngram})"


def _is_single(params: SpeculativeParams) -> str | None:
    if params.best_of == 1:
        return None
    name = "n" if params.best_of == params.n else "best_of"
    return (
        f"{name}: {getattr(params, name)}: speculation follows one answer: its drafted tokens continue a single "
        "sequence, while best-of and beams fork theirs: send n requests with seeds of their own, or use SamplingParams"
    )


@attrs.frozen(slots=True, kw_only=True, repr=False)
class SpeculativeParams(SamplingParams):
    """Decoding that drafts the next tokens and judges them in one pass. The result is as without it, but faster."""

    RELATIONS: ClassVar[tuple[Relation, ...]] = (
        *SamplingParams.RELATIONS,
        Relation(("min_ngram", "max_ngram"), _ngrams_fit),
        Relation(("n", "best_of"), _is_single),
    )

    num_draft_tokens: int = attrs.field(default=7, converter=as_int, metadata=integer(low=1, high=64))
    """Most tokens drafted at a time. Fewer are while guesses fail: the number halves when none holds, and doubles
    up to this when all do."""
    proposer: str = attrs.field(
        default="ngram",
        metadata=text(pattern=r"[A-Za-z0-9][\w.:-]*", mend="must be the name of a proposer: ngram or draft-model"),
    )
    """Who drafts: ``ngram`` looks the last tokens up in the text so far, ``draft-model`` asks a small model."""
    max_ngram: int = attrs.field(default=4, converter=as_int, metadata=integer(low=1, high=32))
    """``ngram``: the longest end of the text to look up; shorter ones follow if it has not occurred."""
    min_ngram: int = attrs.field(default=2, converter=as_int, metadata=integer(low=1, high=32))
    """``ngram``: the shortest end of the text to look up."""
    greedy_draft: bool = attrs.field(default=False, metadata=boolean())
    """``draft-model``: draft the most likely tokens even where the request samples. Tokens are then the same as
    without speculation, one by one; drafts that are sampled, too, are kept more often at high temperatures."""
