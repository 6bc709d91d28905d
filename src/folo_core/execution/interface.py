"""What runs a step: a loaded model, and an executor that owns it (in this process or in others)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    import torch

    from folo_core.attention.interface import AttentionBackend, AttentionMetadata, KVCacheSpec
    from folo_core.request import Request
    from folo_core.sampling_params import SamplingParams
    from folo_core.scheduling.interface import SchedulerOutput
    from folo_core.sequence import Sequence


@attrs.frozen(slots=True, kw_only=True)
class ModelInfo:
    """What the engine must know about a model; free of torch, so that schedulers may read it."""

    architecture: str
    """The transformers class name, such as ``LlamaForCausalLM``."""
    vocab_size: int
    """Width of a logits row."""
    max_model_len: int
    """Longest sequence the model's positions allow."""
    num_layers: int
    """Number of attention layers."""
    kv_bytes_per_token: int
    """Bytes of keys and values of one token over all layers."""
    dtype: str
    """Resolved dtype, such as ``float32``."""
    device: str
    """Resolved device, such as ``cpu`` or ``cuda:0``."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a generation unless ``ignore_eos``; from the generation config, else the config."""
    num_parameters: int = 0
    quantization: str | None = None
    """``int8`` or ``int4`` where the weights were rounded to it at load, else None."""
    kv_cache_dtype: str | None = None
    """``fp8`` where keys and values are stored in float8, None where they are in ``dtype``."""
    weight_bytes: int = 0
    """Bytes that all weights take in memory as they are stored; 0 where the loader does not say."""
    batch_invariant: bool = False
    """The bits of a token's logits depend on its own sequence alone, given attention of which that is true; never on
    the number, the order or the sequences of the step's other tokens. ``deterministic`` needs it."""


@runtime_checkable
class LoadedModel(Protocol):
    """A causal language model that attends through an AttentionBackend.

    One whose attribute ``supports_graphs`` is true can be recorded into a CUDA graph: its ``forward`` never waits for
    the device, and launches the same work for the same number of tokens.
    """

    info: ModelInfo
    kv_cache_specs: list[KVCacheSpec]
    """One per attention layer, in layer order."""
    device: torch.device

    def bind(self, backend: AttentionBackend) -> None:
        """Attach the backend that every attention layer calls from now on: one to measure a step, then the engine's."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Run the packed batch.

        Args:
            input_ids: int64 ``[num_tokens]``.
            positions: int64 ``[num_tokens]``: each token's position in its own sequence.
            logits_indices: int64 ``[rows]``: the packed tokens whose next-token logits are wanted.
            metadata: the step's packed batch, handed to every attention layer.

        Returns:
            Logits ``[rows, vocab_size]`` in the model's dtype.
        """


Candidates = tuple[list[int], list[float], int]
"""One position's candidates: token ids with the sampled one first, their log probabilities, the sampled one's rank."""


@attrs.define(slots=True)
class StepResult:
    """What one executed step brought to the host. Rows are sampled rows, requests adjacent."""

    samples: list[RequestSample] = attrs.field(factory=list)
    """One per request that sampled in this step."""
    prompt_logprobs: dict[str, list[Candidates]] = attrs.field(factory=dict)
    """Request id to the candidates of the prompt positions that this step computed, in order."""
    errors: dict[str, Exception] = attrs.field(factory=dict)
    """Request id to the error that ended it in this step (a NaN row, a plugin that raised)."""
    swap_seconds: float = 0.0
    """How long the step's copies to and from the host held it up."""


@attrs.define(slots=True)
class RequestSample:
    """One request's part of a SamplerOutput, on the host, with parents counted within the request."""

    request_id: str
    parents: list[int]
    """The request's sequence that each new row continues, counted from its first."""
    tokens: list[list[int]]
    """What each new row appends: drafted tokens that it keeps, then the sampler's own."""
    kept: list[int]
    """How many of these are drafted tokens."""
    num_drafts: int = 0
    """How many drafted tokens of the request were judged."""
    logprobs: list[list[Candidates]] | None = None
    """For each new row, the candidates that the request asked for, at every kept draft and the first new token."""
    finished: list[bool] | None = None
    scores: list[float] | None = None
    tags: list[int] | None = None
    drafts: list[list[int]] | None = None
    """What to try next; -1 pads."""
    stated: list[list[float]] | None = None
    """Log probabilities of the new tokens, as the sampler states them."""
    is_reparented: bool = False
    """That the device has run on from it already: the first rows are the request's sequences, each in its place, and
    those among them that ``finished`` names go nowhere; further ones are children that end."""
    is_plain: bool = False
    """That it is one token for the request's one sequence and nothing else, as nearly all are: a promise that spares
    the engine looking. False promises nothing."""

    def of_rows(self, kept: list[int]) -> RequestSample:
        """Return the sample of these rows alone, for one whose rows each go on in place."""
        names = ("tokens", "kept", "logprobs", "finished", "scores", "tags", "drafts", "stated")
        columns: dict[str, Any] = {
            name: [column[row] for row in kept] for name in names if (column := getattr(self, name)) is not None
        }
        return attrs.evolve(self, parents=list(range(len(kept))), **columns)


@runtime_checkable
class StepHandle(Protocol):
    """A step that was submitted; its result may still be on its way from the device."""

    def result(self) -> StepResult:
        """Wait for the step and return what it brought."""


@runtime_checkable
class Executor(Protocol):
    """Runs steps. ``max_steps_in_flight`` is the seam for scheduling ahead of the device."""

    max_steps_in_flight: int
    """How many submitted steps may be unfinished at once; 1 means schedule, run, update in lockstep."""
    model_info: ModelInfo

    def steady_after(self, sampler: str, params: SamplingParams) -> int | None:
        """Return from how many output tokens on a request needs no word of the host to go on; None if it always does.

        See ``Sampler.steady_after``; the logits processors that the request needs have a say in it, too.
        """

    def reparents(self, sampler: str) -> bool:
        """Return whether rows of this sampler that run ahead may continue one another (``Sampler.reparents``)."""

    def add_request(self, request: Request) -> None:
        """Make a request known before its first step."""

    def submit(self, scheduled: SchedulerOutput) -> StepHandle:
        """Start a step.

        Raises:
            StepOutOfMemoryError: here or from the handle: the device's memory could not hold it. Of the sequences that
                the executor knows all are released before they come again, so it may stop halfway.
        """

    def rank(self, request: Request) -> list[Sequence]:
        """Ask the request's sampler for its ended sequences, best first."""

    def remove_request(self, request_id: str) -> None:
        """Forget a request that has ended."""

    def current_part(self) -> str:
        """Name the part (model, sampler, processor) that runs now, for a watchdog's message."""

    def shutdown(self) -> None:
        """Release the model and every worker."""
