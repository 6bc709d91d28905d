"""Entry point. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec

from folo_third_party_sampler.params import TypicalParams

if TYPE_CHECKING:
    from folo_core.sampling.interface import SamplerContext

    from folo_third_party_sampler.sampler import TypicalSampler


def _build(context: SamplerContext) -> TypicalSampler:
    from folo_third_party_sampler.sampler import TypicalSampler  # brings torch: only when chosen

    return TypicalSampler(context.vocab_size, context.device)


@hookimpl
def folo_samplers() -> list[SamplerSpec]:
    """Offer ``typical``, which serves TypicalParams."""
    return [
        SamplerSpec(
            name="typical",
            help="Locally typical sampling: tokens about as surprising as expected.",
            factory=_build,
            params_type=TypicalParams,
            capabilities={"logprobs"},
        )
    ]
