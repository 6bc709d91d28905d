"""The hooks of folo-beam. Importing this module imports no torch; the factory does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_beam.params import BeamParams
from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec

if TYPE_CHECKING:
    from folo_core.sampling.interface import Sampler, SamplerContext


def _beam(context: SamplerContext) -> Sampler:
    from folo_beam.steps import sampler_on

    return sampler_on(context.device.type, context.tokenizer)


def _examples() -> list[BeamParams]:
    return [BeamParams(n=3, length_penalty=0.5), BeamParams(n=3, num_groups=2, diversity_penalty=0.5)]


@hookimpl
def folo_samplers() -> tuple[SamplerSpec, ...]:
    """Offer beam search, picked by BeamParams."""
    text = "beam search: plain, diverse (groups) and constrained (phrases that must appear)"
    return (SamplerSpec(
        name="beam", help=text, factory=_beam, params_type=BeamParams, capabilities={"forks"}, examples=_examples
    ),)  # fmt: skip
