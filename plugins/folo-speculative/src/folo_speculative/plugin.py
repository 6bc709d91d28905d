"""The hooks of folo-speculative. Importing this module imports no torch; a factory does when its part is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ConfigSectionSpec, ProposerSpec, SamplerSpec
from folo_speculative.config import SECTION, SpeculativeConfig
from folo_speculative.params import SpeculativeParams

if TYPE_CHECKING:
    from folo_core.sampling.interface import Proposer, Sampler, SamplerContext


def _speculative(context: SamplerContext) -> Sampler:
    from folo_speculative.sampler import SpeculativeSampler

    return SpeculativeSampler(context)


def _ngram(_context: SamplerContext) -> Proposer:
    from folo_speculative.ngram import NgramProposer

    return NgramProposer()


def _draft_model(context: SamplerContext) -> Proposer:
    from folo_speculative.draft_model import DraftModelProposer

    return DraftModelProposer(context)


@hookimpl
def folo_samplers() -> tuple[SamplerSpec, ...]:
    """Offer speculative decoding under SpeculativeParams."""
    return (
        SamplerSpec(
            name="speculative",
            help="drafts tokens and judges them in one pass; the result is unchanged",
            factory=_speculative,
            params_type=SpeculativeParams,
            capabilities={"drafts", "greedy-invariant"},
        ),
    )


@hookimpl
def folo_proposers() -> tuple[ProposerSpec, ...]:
    """Offer prompt lookup and a draft model."""
    return (
        ProposerSpec(name="ngram", help="what followed the last tokens when they came up before", factory=_ngram),
        ProposerSpec(name="draft-model", help="what a small model of the same tokenizer says", factory=_draft_model),
    )


@hookimpl
def folo_config_sections() -> tuple[ConfigSectionSpec, ...]:
    """Offer ``[plugins.folo-speculative]``."""
    return (
        ConfigSectionSpec(
            name=SECTION, help="speculative decoding: which draft model to open", section_type=SpeculativeConfig
        ),
    )
