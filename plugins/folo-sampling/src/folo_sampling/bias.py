"""``logit_bias``: raise or lower single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_sampling.ragged import Ragged, refuse_outside

if TYPE_CHECKING:
    import torch

    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams


class LogitBias:
    """Adds each request's bias to the logits of the tokens it names. A masked token stays masked."""

    argmax_invariant = False
    needs_history = False
    graph_safe = False

    def __init__(self, device: torch.device) -> None:
        """Work on logits that live on ``device``."""
        self._biases = Ragged(
            device, lambda params: params.logit_bias or {}, lambda params: (params.logit_bias or {}).values()
        )

    def applies(self, params: SamplingParams) -> bool:
        """Whether a bias is given."""
        return bool(params.logit_bias)

    def validate_params(self, params: SamplingParams, vocab_size: int) -> None:
        """Raise ParamsError if a biased token is outside the vocabulary."""
        refuse_outside("logit_bias", params.logit_bias or {}, vocab_size)

    def apply(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Add the biases in place."""
        rows, ids, biases = self._biases.of(metadata.params)
        logits[rows, ids] += biases
        return logits
