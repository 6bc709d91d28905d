"""The hooks of folo-sampling. Importing this module imports no torch; a factory does when its part is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import LogitsProcessorSpec, SamplerSpec
from folo_core.sampling_params import SamplingType

if TYPE_CHECKING:
    import torch

    from folo_core.sampling.interface import LogitsProcessor, Sampler, SamplerContext


def _greedy(_context: SamplerContext) -> Sampler:
    from folo_sampling.greedy import GreedySampler

    return GreedySampler()


def _random(context: SamplerContext) -> Sampler:
    from folo_sampling.random import RandomSampler

    return RandomSampler(context.vocab_size, context.device)


def _penalties(vocab_size: int, device: torch.device) -> LogitsProcessor:
    from folo_sampling.penalties import Penalties

    return Penalties(vocab_size, device)


def _bias(_vocab_size: int, device: torch.device) -> LogitsProcessor:
    from folo_sampling.bias import LogitBias

    return LogitBias(device)


def _min_tokens(vocab_size: int, device: torch.device) -> LogitsProcessor:
    from folo_sampling.min_tokens import MinTokens

    return MinTokens(vocab_size, device)


def _bad_words(_vocab_size: int, device: torch.device) -> LogitsProcessor:
    from folo_sampling.bad_words import BadWords

    return BadWords(device)


def _allowed(_vocab_size: int, device: torch.device) -> LogitsProcessor:
    from folo_sampling.allowed import AllowedTokens

    return AllowedTokens(device)


@hookimpl
def folo_samplers() -> tuple[SamplerSpec, ...]:
    """Offer greedy and random decoding of one sequence per request."""
    return (
        SamplerSpec(
            name="greedy",
            help="the most likely token; of equals, the lowest id",
            factory=_greedy,
            sampling_types={SamplingType.GREEDY},
            capabilities={"greedy-invariant"},
        ),
        SamplerSpec(
            name="random",
            help="a random token after temperature, top-k, top-p and min-p",
            factory=_random,
            sampling_types={SamplingType.RANDOM},
            capabilities={"greedy-invariant"},
        ),
    )


@hookimpl
def folo_logits_processors() -> tuple[LogitsProcessorSpec, ...]:
    """Offer the edits of logits that SamplingParams can ask for."""
    return (
        LogitsProcessorSpec(
            name="penalties",
            help="repetition, presence and frequency penalties",
            factory=_penalties,
            stage=200,
            serves={"repetition_penalty", "presence_penalty", "frequency_penalty"},
        ),
        LogitsProcessorSpec(
            name="bias",
            help="logit_bias: raise or lower single tokens",
            factory=_bias,
            stage=300,
            serves={"logit_bias"},
        ),
        LogitsProcessorSpec(
            name="min-tokens",
            help="min_tokens: no stop token before that many tokens",
            factory=_min_tokens,
            stage=400,
            serves={"min_tokens"},
        ),
        LogitsProcessorSpec(
            name="bad-words",
            help="bad_words: words that are never generated",
            factory=_bad_words,
            stage=600,
            serves={"bad_words"},
        ),
        LogitsProcessorSpec(
            name="allowed-tokens",
            help="allowed_token_ids: only these tokens are generated",
            factory=_allowed,
            stage=800,
            serves={"allowed_token_ids"},
        ),
    )
