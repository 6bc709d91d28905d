"""What a sampler, a logits processor and a proposer are: the contracts that plugins implement.

The one representation behind every decoding strategy is the pair ``(parents, tokens)``:
row ``i`` of the next step continues row ``parents[i]`` of this one and appends ``tokens[i]``.
Greedy decoding is the identity, best-of fans out once, beam search re-parents, tree search prunes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    import torch

    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams
    from folo_core.sequence import Sequence


@attrs.frozen(slots=True, kw_only=True)
class SamplerOutput:
    """The rows that continue after one sampling step.

    ``m`` is the number of continuing rows. The rows of one request stay adjacent and in request order;
    a row of the input that no parent names is pruned and its blocks are returned.
    """

    parents: torch.Tensor
    """int64 ``[m]``: the row of this step's logits that each new row continues. Never leaves its request."""
    tokens: torch.Tensor
    """int64 ``[m, k]``: tokens appended to each row, left to right; -1 pads rows that append fewer than ``k``."""
    logprobs: torch.Tensor | None = None
    """float32 ``[m, k]``: log probabilities of ``tokens`` under the sampler's own distribution, or None."""
    finished: torch.Tensor | None = None
    """bool ``[m]``: rows that the sampler itself declares finished after this step, or None for none."""


@runtime_checkable
class Sampler(Protocol):
    """Chooses next tokens for all rows of its requests, in one batched call per step."""

    def add_request(self, request: Request) -> None:
        """Told once when ``request`` is admitted; a place to open per-request state."""

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Choose the next tokens.

        Args:
            logits: float32 ``[rows, vocab]``; the sampler owns this tensor and may write to it.
            metadata: whole-batch parameter tensors and the requests' row ranges, row for row with ``logits``.
        """

    def finish(self, request: Request) -> list[Sequence]:
        """Rank and return the request's finished sequences; the engine reports them in this order."""

    def remove_request(self, request_id: str) -> None:
        """Told once when the request has ended in any way; drop per-request state."""


@runtime_checkable
class LogitsProcessor(Protocol):
    """Edits logits before sampling, for the rows whose parameters ask for it.

    Class attributes declare what the engine may assume.
    """

    argmax_invariant: bool
    """True if the processor never changes which token is the most likely one."""
    needs_history: bool
    """True if the processor reads ``metadata.history`` (the token ids of each row)."""
    graph_safe: bool
    """True if ``apply`` has no data-dependent shapes and never synchronises with the device."""

    def applies(self, params: SamplingParams) -> bool:
        """Whether a request with these parameters needs this processor. Called once, at admission."""

    def validate_params(self, params: SamplingParams, vocab_size: int) -> None:
        """Raise ParamsError if the parameters do not fit the model. Called once, at admission."""

    def apply(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return edited logits, float32 ``[rows, vocab]``, for the rows in ``metadata`` (in place is fine)."""


@runtime_checkable
class Proposer(Protocol):
    """Drafts tokens that a speculative sampler verifies in one forward pass."""

    def propose(self, metadata: SamplingMetadata, max_tokens: int) -> torch.Tensor:
        """Return int64 ``[rows, k]`` drafted tokens, ``k <= max_tokens``; -1 pads shorter drafts."""
