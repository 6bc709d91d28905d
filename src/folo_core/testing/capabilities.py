"""What a sampler may declare in ``SamplerSpec.capabilities``, and what the conformance kit makes of each word.

Other words are allowed and mean nothing to the kit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLER_CAPABILITIES: Mapping[str, str] = {
    "forks": "a row may have several children or none; undeclared, every row must go on as itself",
    "holds": "a row may wait: a step may append nothing to it; undeclared, every row must grow",
    "drafts": "the sampler drafts tokens for the next step to verify; undeclared, it must not",
    "greedy-invariant": "at temperature 0 the best answer is the model's most likely tokens, and that is checked",
    "needs-tokenizer": "the factory needs context.tokenizer; undeclared, the kit gives it none",
    "needs-model": "the factory or a step needs context.side_model; undeclared, the kit gives it none",
    "per-row-work": "a step works through its rows one by one, so its cost is not checked; say why in the README",
}
"""Capability to what it says and changes."""
