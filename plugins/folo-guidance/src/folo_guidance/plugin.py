"""The hooks of folo-guidance. Importing this module imports no torch; the factory does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ConfigSectionSpec, SamplerSpec
from folo_guidance.params import SECTION, GuidanceConfig, GuidanceParams

if TYPE_CHECKING:
    from folo_core.sampling.interface import Sampler, SamplerContext


def _build(context: SamplerContext) -> Sampler:
    from folo_guidance.sampler import GuidanceSampler

    return GuidanceSampler(context)


@hookimpl
def folo_samplers() -> list[SamplerSpec]:
    """Offer ``guidance``."""
    return [
        SamplerSpec(
            name="guidance",
            help="classifier-free guidance and contrastive decoding with a second model",
            capabilities={"needs-model"},
            factory=_build,
            params_type=GuidanceParams,
            examples=lambda: [
                GuidanceParams(scale=2.0, temperature=0.0),
                GuidanceParams(scale=0.5, plausibility=0.1, top_p=0.9),
            ],
            example_sections={SECTION: {"guide": "fake"}},
        )
    ]


@hookimpl
def folo_config_sections() -> list[ConfigSectionSpec]:
    """Offer ``[plugins.folo-guidance]``."""
    return [ConfigSectionSpec(name=SECTION, help="guidance: the guiding model", section_type=GuidanceConfig)]
