"""Greedy decoding: every row continues itself with its most likely token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from folo_core.sampling.identity import identity
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling.kernels import has_kernels

if TYPE_CHECKING:
    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams
    from folo_core.sequence import Sequence


class GreedySampler:
    """Takes each row's largest logit; of equal ones the lowest token id. Keeps no state."""

    reads_any_dtype = True

    def steady_after(self, params: SamplingParams) -> int | None:
        """Return 0: from the first step on each row goes on by one token, in place."""
        return 0

    def add_request(self, request: Request) -> None:
        """Nothing to open."""

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Return the identity as parents and ``lowest_argmax`` of each row as its token."""
        parents = identity(metadata.num_rows, logits.device)
        if has_kernels(logits.device.type):
            from folo_sampling.device import greedy_tokens

            drawn = greedy_tokens(logits)
            return SamplerOutput(parents=parents, tokens=drawn.tokens[:, None], peaks=drawn.peaks)
        return SamplerOutput(parents=parents, tokens=lowest_argmax(logits)[:, None])

    def finish(self, request: Request) -> list[Sequence]:
        """Return the finished sequences as they are: there is one."""
        return list(request.finished)

    def remove_request(self, request_id: str) -> None:
        """Nothing to drop."""


def lowest_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest entry of each row, int64 ``[rows]``, the lowest where several are equal.

    PyTorch's argmax does so, but on the CPU it is not vectorised, and numpy's is.

    Args:
        logits: float ``[rows, vocab]`` with ``vocab >= 1``.
    """
    if logits.device.type != "cpu":
        return logits.argmax(1)
    # numpy knows no bfloat16, and float32 holds all of its values.
    return torch.from_numpy((logits.float() if logits.itemsize < 4 else logits).numpy().argmax(1))  # noqa: PLR2004
