"""From logits to new rows: processors, the check of every row, then one batched call per sampler.

A fault stays with the requests it belongs to: their rows leave the batch, the others are sampled as if alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch

from folo_core.errors import FoloError
from folo_core.execution.interface import RequestSample
from folo_core.execution.logprobs import gather_logprobs
from folo_core.sampling.metadata import SamplingMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from folo_core.execution.input_batch import InputBatch
    from folo_core.execution.interface import Candidates, StepResult
    from folo_core.execution.parts import NamedPart
    from folo_core.request import Request
    from folo_core.sampling.interface import LogitsProcessor, SamplerOutput


class SamplingStage:
    """Owns the samplers and processors of an engine and applies them to a step's logits."""

    def __init__(self, samplers: Mapping[str, NamedPart], processors: Sequence[NamedPart], batch: InputBatch) -> None:
        self.samplers = dict(samplers)
        self.processors = list(processors)
        self.batch = batch
        self.current = "sampling"
        """What runs right now, for a watchdog's message."""
        self._sampler_ids = {name: number for number, name in enumerate(self.samplers)}
        self._slot_sampler = np.zeros(batch.capacity, dtype=np.int64)
        self._slot_uses = np.zeros((len(self.processors), batch.capacity), dtype=np.bool_)
        self._slot_logprobs = np.zeros(batch.capacity, dtype=np.bool_)
        self._cached: dict[bytes, SamplingMetadata] = {}
        self._cached_version = -1

    def needs_history(self, request: Request) -> bool:
        """Whether some processor reads this request's token ids."""
        return any(p.part.needs_history and p.part.applies(request.params) for p in self.processors)

    def assign(self, slot: int, request: Request) -> None:
        """Remember which sampler and processors serve the sequence in ``slot``."""
        self._slot_sampler[slot] = self._sampler_ids[request.sampler]
        self._slot_logprobs[slot] = request.params.logprobs is not None
        for row, processor in enumerate(self.processors):
            self._slot_uses[row, slot] = processor.part.applies(request.params)

    def run(self, logits: torch.Tensor, slots: NDArray[np.int64], result: StepResult) -> None:
        """Sample the next tokens of the sequences in ``slots`` and note what came of it in ``result``.

        Args:
            logits: ``[len(slots), vocab]`` in the model's dtype; written to.
            slots: batch slots, the rows of one request adjacent.
            result: gets ``samples`` and ``errors``.
        """
        logits = logits.float()
        raw = self._raw_log_probs(logits, slots)
        self._process(logits, slots, result.errors)
        self._reject_bad_rows(logits, slots, result.errors)
        for name, part in self.samplers.items():
            rows = np.flatnonzero(self._slot_sampler[slots] == self._sampler_ids[name])
            rows = self._without_failed(rows, slots, result.errors)
            if len(rows):
                call = partial(self._sample, part, logits, slots, rows, raw, result)
                self._guard("sampler", part, slots[rows], result.errors, call)
        self.current = "engine"

    def _raw_log_probs(self, logits: torch.Tensor, slots: NDArray[np.int64]) -> dict[int, torch.Tensor]:
        """Return log probabilities by row number, for the rows whose request wants them."""
        rows = np.flatnonzero(self._slot_logprobs[slots])
        if not len(rows):
            return {}
        log_probs = _take(logits, rows).log_softmax(-1)
        return dict(zip(rows.tolist(), log_probs, strict=True))

    def _process(self, logits: torch.Tensor, slots: NDArray[np.int64], errors: dict[str, Exception]) -> None:
        for number, processor in enumerate(self.processors):
            rows = self._without_failed(np.flatnonzero(self._slot_uses[number, slots]), slots, errors)
            if len(rows):
                call = partial(self._apply, processor.part, logits, slots, rows)
                self._guard("logits processor", processor, slots[rows], errors, call)

    def _apply(
        self, processor: LogitsProcessor, logits: torch.Tensor, slots: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> None:
        """Edit the processor's rows of ``logits`` in place."""
        given = _take(logits, rows)
        edited = processor.apply(given, self._metadata(slots[rows]))
        if edited.shape != given.shape:
            message = f"returned shape {tuple(edited.shape)}, expected {tuple(given.shape)}"
            raise ValueError(message)
        if len(rows) < len(logits):
            logits.index_copy_(0, torch.from_numpy(rows).to(logits.device), edited)
        elif edited.data_ptr() != logits.data_ptr():
            logits.copy_(edited)

    def _reject_bad_rows(self, logits: torch.Tensor, slots: NDArray[np.int64], errors: dict[str, Exception]) -> None:
        """End requests with a row that holds NaN or +inf, or that has no token left."""
        peaks = logits.amax(-1)
        good = torch.isfinite(peaks)
        if bool(good.all()):
            return
        for row in (~good).nonzero().flatten().tolist():
            request = self._request(int(slots[row]))
            peak = peaks[row].item()
            reason = "every token is masked" if peak == -np.inf else f"the largest logit is {peak}"
            message = f"request {request.request_id!r}: its logits cannot be sampled: {reason}"
            errors.setdefault(request.request_id, FoloError(message))

    def _sample(  # noqa: PLR0913, PLR0917 (one step's shared state)
        self,
        part: NamedPart,
        logits: torch.Tensor,
        slots: NDArray[np.int64],
        rows: NDArray[np.int64],
        raw: dict[int, torch.Tensor],
        result: StepResult,
    ) -> None:
        metadata = self._metadata(slots[rows])
        output = part.part.step(_take(logits, rows), metadata)
        host = _HostOutput.check(output, metadata, logits.shape[-1])
        self._advance(slots[rows], host)
        result.samples += self._split(host, metadata.request_ids, rows, raw)

    def _advance(self, slots: NDArray[np.int64], host: _HostOutput) -> None:
        """Store each parent's first child in the parent's slot; the engine sends the other children as forks."""
        if host.identity:
            self.batch.append(slots, host.tokens)
            return
        parents, first = np.unique(host.parents, return_index=True)
        self.batch.append(slots[parents], host.tokens[first])

    def _split(
        self, host: _HostOutput, request_ids: list[str], rows: NDArray[np.int64], raw: dict[int, torch.Tensor]
    ) -> list[RequestSample]:
        """Cut the output into one sample per request, with parents counted from the request's first row."""
        samples = []
        tokens, parents = host.tokens.tolist(), host.parents.tolist()
        candidates = self._candidates(host, rows, raw)
        children: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
        for child, parent in enumerate(parents):
            children[request_ids[parent]].append(child)
        first_rows = {request_id: row for row, request_id in reversed(list(enumerate(request_ids)))}
        for request_id, mine in children.items():
            first = first_rows[request_id]
            samples.append(
                RequestSample(
                    request_id,
                    [parents[child] - first for child in mine],
                    [[token for token in tokens[child] if token >= 0] for child in mine],
                    [candidates[child] for child in mine] if mine and mine[0] in candidates else None,
                    None if host.finished is None else [host.finished[child] for child in mine],
                )
            )
        return samples

    def _candidates(
        self, host: _HostOutput, rows: NDArray[np.int64], raw: dict[int, torch.Tensor]
    ) -> dict[int, Candidates]:
        """Return the log probability candidates of every child whose request wants them."""
        wanted = [
            (child, row) for child, parent in enumerate(host.parents.tolist()) if (row := int(rows[parent])) in raw
        ]
        if not wanted:
            return {}
        log_probs = torch.stack([raw[row] for _, row in wanted])
        tokens = torch.tensor([host.tokens[child, 0] for child, _ in wanted], device=log_probs.device)
        counts = [self._num_top(host, child) for child, _ in wanted]
        gathered = gather_logprobs(log_probs, tokens, counts)
        return {child: candidate for (child, _), candidate in zip(wanted, gathered, strict=True)}

    def _num_top(self, host: _HostOutput, child: int) -> int:
        count = host.metadata.params[int(host.parents[child])].logprobs
        return 0 if count is None else count

    def _metadata(self, slots: NDArray[np.int64]) -> SamplingMetadata:
        """Return the rows' metadata; while the batch keeps its composition only positions are read anew."""
        if self._cached_version != self.batch.version:
            self._cached.clear()
            self._cached_version = self.batch.version
        key = slots.tobytes()
        metadata = self._cached.get(key)
        positions = torch.from_numpy(self.batch.num_tokens[slots]).to(self.batch.device)
        if metadata is None:
            metadata = self._cached[key] = self._build_metadata(slots, positions)
        metadata.positions = positions
        return metadata

    def _build_metadata(self, slots: NDArray[np.int64], positions: torch.Tensor) -> SamplingMetadata:
        columns, host = self.batch.gather_columns(slots), self.batch.columns
        requests = [self._request(slot) for slot in slots.tolist()]
        histories = [self.batch.histories[slot] for slot in slots.tolist()]
        return SamplingMetadata(
            **columns,
            positions=positions,
            request_ids=[request.request_id for request in requests],
            params=[request.params for request in requests],
            prompt_lengths=[len(request.prompt_token_ids) for request in requests],
            history=None if any(h is None for h in histories) else histories,
            all_greedy=not host["temperature"][slots].any(),
            any_top_k=bool((host["top_k"][slots] < self.batch.vocab_size).any()),
            any_top_p=bool((host["top_p"][slots] < 1).any()),
            any_min_p=bool(host["min_p"][slots].any()),
            need_logprobs=bool(self._slot_logprobs[slots].any()),
        )

    def _guard(
        self,
        kind: str,
        part: NamedPart,
        slots: NDArray[np.int64],
        errors: dict[str, Exception],
        call: Callable[[], None],
    ) -> None:
        """Run a plugin's code; if it raises, its requests fail with an error that names it."""
        self.current = f"{kind} {part.name!r} of plugin {part.plugin!r} (distribution {part.distribution!r})"
        try:
            call()
        except Exception as error:  # noqa: BLE001 (a plugin may raise anything; it must not reach its neighbours)
            fault = part.fault(kind, error)
            for slot in slots.tolist():
                errors.setdefault(self._request(slot).request_id, fault)

    def _without_failed(
        self, rows: NDArray[np.int64], slots: NDArray[np.int64], errors: dict[str, Exception]
    ) -> NDArray[np.int64]:
        if not errors:
            return rows
        kept = [row for row in rows.tolist() if self._request(int(slots[row])).request_id not in errors]
        return np.array(kept, dtype=np.int64)

    def _request(self, slot: int) -> Request:
        request = self.batch.requests[slot]
        assert request is not None  # noqa: S101 (only slots in use are sampled)
        return request


@attrs.frozen(slots=True)
class _HostOutput:
    """A SamplerOutput, checked and brought to the host."""

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    finished: list[bool] | None
    identity: bool
    metadata: SamplingMetadata

    @classmethod
    def check(cls, output: SamplerOutput, metadata: SamplingMetadata, vocab_size: int) -> _HostOutput:
        """Refuse shapes and values that would corrupt the batch.

        Raises:
            ValueError: what is wrong, and what was expected.
        """
        parents, tokens = output.parents.cpu().numpy(), output.tokens.cpu().numpy()
        finished = None if output.finished is None else output.finished.tolist()
        rows = metadata.num_rows
        if parents.ndim != 1 or tokens.ndim != 2 or len(parents) != len(tokens) or tokens.shape[1] < 1:  # noqa: PLR2004 (matrix)
            message = f"parents {parents.shape} and tokens {tokens.shape}: expected [m] and [m, k] with k >= 1"
            raise ValueError(message)
        if finished is not None and len(finished) != len(parents):
            message = f"finished has {len(finished)} entries for {len(parents)} rows"
            raise ValueError(message)
        if len(parents) and not (parents.min() >= 0 and parents.max() < rows):
            message = f"parents {parents.tolist()} leave the {rows} rows of this step"
            raise ValueError(message)
        if tokens.size and not ((tokens[:, 0] >= 0).all() and tokens.max() < vocab_size):
            message = f"tokens {tokens.tolist()} leave the vocabulary of {vocab_size}"
            raise ValueError(message)
        identity = len(parents) == rows and bool((parents == np.arange(rows)).all())
        return cls(parents, tokens, finished, identity, metadata)


def _take(logits: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return these rows: the tensor itself if they are all of it, else a copy."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.from_numpy(rows).to(logits.device))
