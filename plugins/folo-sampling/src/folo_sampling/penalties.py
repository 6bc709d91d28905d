"""Penalties on tokens that occurred before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_sampling.ragged import lay_out

if TYPE_CHECKING:
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams


class Penalties:
    """Repetition penalty over prompt and output, then frequency and presence penalty over the output.

    A logit of a token that occurred is divided by the repetition penalty if positive, else multiplied by it
    (Keskar et al., "CTRL", 2019, section 4.1, with the sign handled as is usual since). Frequency penalty is
    subtracted as often as the token was generated, presence penalty once (OpenAI's API).
    """

    argmax_invariant = False
    needs_history = True
    graph_safe = False

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Work on logits ``[rows, vocab_size]`` that live on ``device``."""
        self._vocab_size = vocab_size
        self._device = device

    def applies(self, params: SamplingParams) -> bool:
        """Whether one of the three penalties has an effect."""
        return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0

    def validate_params(self, params: SamplingParams, vocab_size: int) -> None:
        """Accept all: their ranges do not depend on the model."""

    def apply(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Penalise in place. A penalty that is off leaves a row's bits alone."""
        history = metadata.history or []
        repetition = [params.repetition_penalty for params in metadata.params]
        if any(penalty != 1 for penalty in repetition):
            occurred = [ids if on != 1 else [] for ids, on in zip(history, repetition, strict=True)]
            self._penalise_repetition(logits, occurred, repetition)
        frequency = [params.frequency_penalty for params in metadata.params]
        presence = [params.presence_penalty for params in metadata.params]
        if any(frequency) or any(presence):
            rows = zip(history, metadata.prompt_lengths, frequency, presence, strict=True)
            generated = [ids[start:] if often or once else [] for ids, start, often, once in rows]
            self._penalise_output(logits, generated, frequency, presence)
        return logits

    def _penalise_repetition(self, logits: torch.Tensor, occurred: list[list[int]], penalties: list[float]) -> None:
        rows, ids = lay_out(occurred, self._device)
        penalty = torch.tensor(penalties, device=self._device)[rows]
        scores = logits[rows, ids]
        # An id that occurs twice is written twice, with one value, since its old score was read before.
        logits[rows, ids] = torch.where(scores > 0, scores / penalty, scores * penalty)

    def _penalise_output(
        self, logits: torch.Tensor, generated: list[list[int]], frequency: list[float], presence: list[float]
    ) -> None:
        rows, ids = lay_out(generated, self._device)
        places, counts = torch.unique(rows * self._vocab_size + ids, return_counts=True)
        rows, ids = places // self._vocab_size, places % self._vocab_size
        scores = logits[rows, ids] - torch.tensor(frequency, device=self._device)[rows] * counts
        logits[rows, ids] = scores - torch.tensor(presence, device=self._device)[rows]
