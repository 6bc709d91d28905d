"""What a guided request asks for, and the guide that the configuration names."""

from __future__ import annotations

import attrs

from folo_core.sampling_params import SamplingParams
from folo_core.validation import Checked, Relation, as_float, number, text

SECTION = "folo-guidance"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class GuidanceConfig(Checked):
    """The configuration's section ``[plugins.folo-guidance]``."""

    guide: str | None = attrs.field(
        default=None, metadata=text(optional=True, mend="must be a model: a folder, a GGUF file, a hub id or an alias")
    )
    """The guiding model, opened by the first request that needs it; it must share the main model's tokenizer."""


def _single(params: GuidanceParams) -> str | None:
    if params.best_of == 1:
        return None
    return f"n: {params.n}: guidance gives one answer (best_of={params.best_of}): send a request for each"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class GuidanceParams(SamplingParams):
    """Sampling from ``log p_guide + scale * (log p_main - log p_guide)``.

    Logits processors edit the main model's logits before, temperature and filters apply after.
    """

    RELATIONS = (*SamplingParams.RELATIONS, Relation(("n", "best_of"), _single))

    scale: float = attrs.field(default=1.5, converter=as_float, metadata=number(low=0))
    """How far to go from the guide to the main model and beyond: 0 is the guide, 1 the main model, which needs none."""
    plausibility: float = attrs.field(default=0.0, converter=as_float, metadata=number(low=0, high=1))
    """Drop tokens less likely than this share of the main model's most likely one; 0 drops none."""
