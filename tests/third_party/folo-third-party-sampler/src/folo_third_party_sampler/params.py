"""The strategy's own parameters."""

from __future__ import annotations

import attrs
from folo_core.sampling_params import SamplingParams
from folo_core.validation import as_float, number


@attrs.frozen(slots=True, kw_only=True)
class TypicalParams(SamplingParams):
    """SamplingParams for locally typical sampling. ``top_k``, ``top_p`` and ``min_p`` are not looked at."""

    typical_p: float = attrs.field(default=0.95, converter=as_float, metadata=number(above=0, high=1))
    """Probability mass to keep, taking the tokens whose surprise is nearest to the expected one first."""
