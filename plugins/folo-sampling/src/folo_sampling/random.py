"""Random decoding: temperature, then top-k, top-p and min-p, then one draw per row by inverting its distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.sampling.identity import identity
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling.kernels import has_kernels
from folo_sampling.tensors import TensorDraws

if TYPE_CHECKING:
    import torch

    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams
    from folo_core.sequence import Sequence
    from folo_sampling.device import Drawn


class RandomSampler:
    """Draws each row's next token with a random number of its own (``folo_core.sampling.rng``). Keeps no state.

    A row's token depends on its own logits, parameters and random key only, bit for bit. On CUDA kernels draw it
    (``folo_sampling.device``), elsewhere tensor operations (``folo_sampling.tensors``).
    """

    reads_any_dtype = True

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Work on logits ``[rows, vocab_size]`` that live on ``device``."""
        self._by_kernels = has_kernels(device.type)
        self._waits = device.type != "cpu" and not self._by_kernels
        self._draws = TensorDraws(vocab_size, device)

    def steady_after(self, params: SamplingParams) -> int | None:
        """Return 0, each row goes on by one token; None on a device without kernels, which the host then waits for."""
        return None if self._waits else 0

    def add_request(self, request: Request) -> None:
        """Nothing to open."""

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Return the identity as parents and one drawn token for each row. Leaves ``logits`` as they are."""
        parents = identity(metadata.num_rows, logits.device)
        if self._by_kernels:
            drawn = _draw_by_kernels(logits, metadata)
            return SamplerOutput(parents=parents, tokens=drawn.tokens[:, None], peaks=drawn.peaks)
        return SamplerOutput(parents=parents, tokens=self._draws.tokens(logits.float(), metadata)[:, None])

    def log_probs_of(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log-softmax of each row, at temperature 1, at its ``tokens`` ``[rows, k]``: float32."""
        if self._by_kernels:
            from folo_sampling.device import log_probs_of

            return log_probs_of(logits, tokens)
        return logits.float().log_softmax(-1).gather(1, tokens)

    def probabilities(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return the distribution that ``step`` draws each row's token from, float32 ``[rows, vocab_size]``."""
        return self._draws.probabilities(logits.float(), metadata)

    def finish(self, request: Request) -> list[Sequence]:
        """Return the finished sequences as they are: there is one."""
        return list(request.finished)

    def remove_request(self, request_id: str) -> None:
        """Nothing to drop."""


def _draw_by_kernels(logits: torch.Tensor, metadata: SamplingMetadata) -> Drawn:
    from folo_sampling.device import draw_tokens

    return draw_tokens(
        logits,
        metadata.temperature,
        metadata.top_k,
        metadata.top_p,
        metadata.min_p,
        metadata.seeds,
        metadata.sequence_indices,
        metadata.positions,
        filtered=metadata.any_top_k or metadata.any_top_p,
    )
