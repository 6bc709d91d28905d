"""The hook of folo-best-of. Importing this module imports no torch; the factory does when a sampler is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_best_of.params import BestOfParams
from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec
from folo_core.sampling_params import SamplingType

if TYPE_CHECKING:
    from folo_core.sampling.interface import Sampler, SamplerContext


def _best_of(context: SamplerContext) -> Sampler:
    from folo_best_of.sampler import BestOfSampler

    return BestOfSampler(context.plain_sampler(SamplingType.RANDOM))


@hookimpl
def folo_samplers() -> tuple[SamplerSpec, ...]:
    """Offer best-of to plain SamplingParams and, with a choice of ranking, to BestOfParams."""
    return (
        SamplerSpec(
            name="fan-out",
            help="n and best_of: several random answers that share the prompt, the most likely ones returned",
            factory=_best_of,
            capabilities={"forks"},
            sampling_types={SamplingType.FAN_OUT},
        ),
        SamplerSpec(
            name="best-of",
            help="the same, ranked by a length-normalised log probability if so chosen",
            factory=_best_of,
            capabilities={"forks"},
            params_type=BestOfParams,
        ),
    )
