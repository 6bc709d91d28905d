"""The strategy's own parameters."""

from __future__ import annotations

import attrs
from folo_core.sampling_params import SamplingParams
from folo_core.validation import Relation, as_int, integer


def _n_fits_k(params: StochasticBeamParams) -> str | None:
    return None if params.best_of <= params.k else f"n: {params.n}: must be <= k ({params.k}): k texts are drawn"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class StochasticBeamParams(SamplingParams):
    """SamplingParams for texts drawn without replacement. ``temperature`` and the filters are not looked at."""

    RELATIONS = (*SamplingParams.RELATIONS, Relation(("n", "best_of", "k"), _n_fits_k))

    k: int = attrs.field(default=4, converter=as_int, metadata=integer(low=1))
    """How many different texts to draw; the first ``n`` drawn are returned."""

    @property
    def num_sequences(self) -> int:
        """Rows at once."""
        return self.k

    @property
    def grows_in_place(self) -> bool:
        """False: a text is dropped when others are drawn before it."""
        return False

    @property
    def is_scored(self) -> bool:
        """True: the score is the perturbed log probability."""
        return True
