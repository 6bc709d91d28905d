"""Entry point. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec

from folo_third_party_strategy.params import StochasticBeamParams

if TYPE_CHECKING:
    from folo_core.sampling.interface import SamplerContext

    from folo_third_party_strategy.sampler import StochasticBeamSampler


def _build(context: SamplerContext) -> StochasticBeamSampler:
    from folo_third_party_strategy.sampler import StochasticBeamSampler  # brings torch: only when chosen

    return StochasticBeamSampler()


@hookimpl
def folo_samplers() -> list[SamplerSpec]:
    """Offer ``stochastic-beam``, which serves StochasticBeamParams."""
    return [
        SamplerSpec(
            name="stochastic-beam",
            help="Stochastic beam search: different texts, drawn without replacement.",
            factory=_build,
            params_type=StochasticBeamParams,
            capabilities={"forks"},
            examples=lambda: [StochasticBeamParams(k=3, n=3, seed=1), StochasticBeamParams(k=1, seed=2)],
        )
    ]
