"""``min_tokens``: no stop token before an answer has that many tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from folo_sampling.ragged import Ragged, refuse_outside

if TYPE_CHECKING:
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams


class MinTokens:
    """Masks the model's end-of-sequence tokens and ``stop_token_ids`` while an answer is too short to stop.

    With ``ignore_eos`` an end-of-sequence token ends nothing, so it stays allowed.
    """

    argmax_invariant = False
    needs_history = False
    graph_safe = False

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Work on logits ``[rows, vocab_size]`` that live on ``device``."""
        self._device = device
        self._stops = Ragged(device, lambda params: _stop_ids(params, vocab_size))

    def applies(self, params: SamplingParams) -> bool:
        """Whether a least number of tokens is asked for."""
        return params.min_tokens > 0

    def validate_params(self, params: SamplingParams, vocab_size: int) -> None:
        """Raise ParamsError if a stop token is outside the vocabulary."""
        refuse_outside("stop_token_ids", params.stop_token_ids, vocab_size)

    def apply(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Mask in place the stop tokens of rows that are too short."""
        least = [n + params.min_tokens for n, params in zip(metadata.prompt_lengths, metadata.params, strict=True)]
        short = metadata.positions < torch.tensor(least, device=self._device)
        rows, ids, _ = self._stops.of(metadata.params)
        logits[rows, ids] = logits[rows, ids].masked_fill(short[rows], -math.inf)
        return logits


def _stop_ids(params: SamplingParams, vocab_size: int) -> list[int]:
    """Return the tokens that can end the answer. A model may name an end token that its logits do not cover."""
    ids = {*params.stop_token_ids, *(() if params.ignore_eos else params.resolved_eos)}
    return sorted(token for token in ids if token < vocab_size)
