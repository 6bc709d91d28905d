"""``allowed_token_ids``: only these tokens may be generated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from folo_sampling.ragged import Ragged, refuse_outside

if TYPE_CHECKING:
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams


class AllowedTokens:
    """Masks every token but those that the request allows."""

    argmax_invariant = False
    needs_history = False
    graph_safe = False

    def __init__(self, device: torch.device) -> None:
        """Work on logits that live on ``device``."""
        self._allowed = Ragged(device, lambda params: params.allowed_token_ids or ())

    def applies(self, params: SamplingParams) -> bool:
        """Whether the tokens are limited."""
        return params.allowed_token_ids is not None

    def validate_params(self, params: SamplingParams, vocab_size: int) -> None:
        """Raise ParamsError if an allowed token is outside the vocabulary."""
        refuse_outside("allowed_token_ids", params.allowed_token_ids or (), vocab_size)

    def apply(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return new logits that are -inf except for the allowed tokens."""
        rows, ids, _ = self._allowed.of(metadata.params)
        masked = torch.full_like(logits, -math.inf)
        masked[rows, ids] = logits[rows, ids]
        return masked
