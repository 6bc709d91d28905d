"""The hook of folo-best-of. Importing this module imports no torch; the factory does when a sampler is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_best_of.params import BestOfParams
from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec
from folo_core.sampling_params import SamplingParams, SamplingType

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
            examples=lambda: [
                SamplingParams(n=2, best_of=5),
                SamplingParams(n=4, top_k=5, seed=1),
                SamplingParams(best_of=3, top_p=0.8, temperature=1.5, logprobs=2),
            ],
        ),
        SamplerSpec(
            name="best-of",
            help="the same, ranked by a length-normalised log probability if so chosen",
            factory=_best_of,
            capabilities={"forks"},
            params_type=BestOfParams,
            examples=lambda: [
                BestOfParams(n=2, best_of=5, length_penalty=1.0, seed=9),
                BestOfParams(n=3, best_of=4, length_penalty=-0.5, early_stop=False),
                BestOfParams(best_of=3, length_penalty=2.0, min_p=0.1),
            ],
        ),
    )
