"""What a sampler, a logits processor and a proposer are: the contracts that plugins implement.

The one representation behind every decoding strategy is the pair ``(parents, tokens)``:
row ``i`` of the next step continues row ``parents[i]`` of this one and appends ``tokens[i]``.
Greedy decoding is the identity, best-of fans out once, beam search re-parents, tree search prunes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from folo_core.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from folo_core.config import EngineConfig
    from folo_core.execution.loading import Tokenizer
    from folo_core.execution.side_model import SideModel
    from folo_core.request import Request
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sampling_params import SamplingParams, SamplingType
    from folo_core.sequence import Sequence


def _nothing_to_choose_from(name: object) -> Any:  # noqa: ANN401 (it never returns)
    message = f"{name!r}: this sampler was built outside an engine, which alone offers other parts"
    raise PluginError(message)


@attrs.frozen(slots=True, kw_only=True)
class SamplerContext:
    """What the factory of a sampler or a proposer gets: the engine that the part will serve.

    The three functions build parts of other plugins, which a plugin never imports. Call them in the factory.
    """

    vocab_size: int
    """Width of a logits row, in tokens."""
    device: torch.device
    """Where logits live."""
    config: EngineConfig | None = None
    """The engine's configuration; its ``plugins`` hold the part's own section. None in tests of the part alone."""
    tokenizer: Tokenizer | None = None
    plain_sampler: Callable[[SamplingType], Sampler] = _nothing_to_choose_from
    """The sampler that serves plain SamplingParams of a sampling type, for strategies that build on it."""
    proposer: Callable[[str], Proposer] = _nothing_to_choose_from
    """A proposer by name."""
    side_model: Callable[[str], SideModel] = _nothing_to_choose_from
    """A second model by name or folder, which reads along with the engine's sequences."""


@attrs.frozen(slots=True, kw_only=True)
class SamplerOutput:
    """The rows that continue after one sampling step.

    ``m`` is the number of continuing rows. The rows of one request stay adjacent and in request order;
    a row of the input that no parent names is pruned and its blocks are returned.
    """

    parents: torch.Tensor
    """int64 ``[m]``: the row of this step's logits that each new row continues. Never leaves its request.
    A child of a row that follows drafted tokens keeps those tokens (see ``SamplingMetadata.drafts``)."""
    tokens: torch.Tensor
    """int64 ``[m, k]``: tokens appended to each row, left to right; -1 pads rows that append fewer than ``k``.
    A row that appends none is held: it waits as it is and is offered again, with the same logits, in the next step
    (and costs as much as a row that grows)."""
    logprobs: torch.Tensor | None = None
    """float32 ``[m, k]``: log probabilities of ``tokens`` as the strategy counts them. The engine adds them to
    ``cumulative_logprob``. None where the strategy does not compute any."""
    finished: torch.Tensor | None = None
    """bool ``[m]``: rows that the sampler itself declares finished after this step, or None for none."""
    scores: torch.Tensor | None = None
    """float32 ``[m]``: what the strategy ranks rows by. It stays with each row, through forks and preemption, as
    ``SamplingMetadata.scores`` and ``Sequence.score``. None leaves every row its parent's."""
    tags: torch.Tensor | None = None
    """int64 ``[m]``: a number by which the strategy knows each row again, carried like ``scores``."""
    drafts: torch.Tensor | None = None
    """int64 ``[m, d]``: guesses at the tokens that follow ``tokens``, -1 padded. The next step computes them too and
    offers a row of logits after each; see ``SamplingMetadata.drafts``. The engine may cut them short."""
    peaks: torch.Tensor | None = None
    """float32 ``[m]``: each row's largest logit as the sampler saw it, NaN if it holds one; spares the engine its own
    look. Only where the rows are those of the input, each once and in order."""
    errors: Mapping[str, Exception] | None = None
    """Requests that cannot go on, by id, and why: each ends in its error, its rows left out, and the others go on.
    A sampler that raises instead ends all of its requests."""


@runtime_checkable
class Sampler(Protocol):
    """Chooses next tokens for all rows of its requests, in one batched call per step.

    A sampler whose attribute ``needs_history`` is true gets every row's token ids in ``metadata.history``.

    A sampler may have a method ``steady_after(params) -> int | None``, asked once, at admission. A number promises that
    from so many output tokens on each row of a request goes on by exactly one token in every step, in place, and that
    ``step`` never waits for the device. Steps then run ahead: the next one starts from tokens that the host has not
    seen. None, as without the method, promises nothing. Where rows run ahead, a sampler whose attribute
    ``reads_any_dtype`` is true gets logits in the model's dtype, and leaves them as they are.

    Where the attribute ``reparents`` is true as well, the promise is another one: each request keeps as many rows as it
    has once they are its ``width``, and each goes on by one token, but may continue any of its request's rows. In a
    step whose ``metadata.runs_ahead`` is true the answer has then a fixed shape: first the rows of the next step, as
    many as of this one and in their order, a row in its parent's place wherever it is the parent's first child; then
    children that end, with -1 as the parent of those that are missing. A row that goes nowhere (its search is over)
    continues itself and is ``finished``.
    """

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
class Distribution(Protocol):
    """A sampler that can also state what it draws from, for strategies that compare distributions."""

    def probabilities(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return the probabilities that ``step`` draws each row's token by, float32 ``[rows, vocab]``."""


@runtime_checkable
class TokenScorer(Protocol):
    """A sampler whose ``step`` leaves the logits as they are, and that states what single tokens' chances were."""

    def log_probs_of(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log-softmax of each row, at temperature 1, at its ``tokens`` int64 ``[rows, k]``: float32."""


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


@attrs.frozen(slots=True, kw_only=True)
class Draft:
    """Guessed continuations of some rows."""

    tokens: torch.Tensor
    """int64 ``[rows, k]``; -1 pads shorter drafts."""
    probs: torch.Tensor | None = None
    """float32 ``[rows, k, vocab]``: the distribution each token was drawn from; None if each was the only choice."""


@runtime_checkable
class Proposer(Protocol):
    """Drafts tokens that a speculative sampler verifies in one forward pass."""

    def propose(self, metadata: SamplingMetadata, max_tokens: int) -> Draft:
        """Draft up to ``max_tokens`` tokens behind ``metadata.history[row]`` for each row.

        ``metadata`` is aligned with the rows that go on: parameters, seeds and positions are those of the first
        token to draft.
        """

    def remove_request(self, request_id: str) -> None:
        """Told once when the request has ended in any way; drop what is kept about it."""
