"""From logits to new rows: processors, the check of every row, then one batched call per sampler.

A fault stays with the requests it belongs to: their rows leave the batch, the others are sampled as if alone.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from folo_core.errors import FoloError
from folo_core.execution.interface import RequestSample
from folo_core.execution.logprobs import gather_logprobs
from folo_core.execution.transfer import Milestone, to_device, to_host
from folo_core.sampling.identity import identity
from folo_core.sampling.metadata import SamplingMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from folo_core.execution.input_batch import InputBatch, Move, PackedStep
    from folo_core.execution.interface import Candidates, StepResult
    from folo_core.execution.parts import NamedPart
    from folo_core.request import Request
    from folo_core.sampling.interface import LogitsProcessor, SamplerOutput
    from folo_core.sampling_params import SamplingParams
    from folo_core.scheduling.interface import SchedulerOutput


@attrs.frozen(slots=True)
class SampledRows:
    """The rows of logits that are sampled, those of one request adjacent, those of one sequence in order."""

    slots: NDArray[np.int64]
    """``[rows]``: each row's batch slot."""
    offsets: NDArray[np.int64]
    """``[rows]``: how many of its sequence's drafted tokens come before the row's logits."""
    drafted: NDArray[np.int64]
    """``[rows]``: how many drafted tokens its sequence has."""

    @classmethod
    def of(cls, step: PackedStep) -> SampledRows:
        """Return a step's rows: one per sampling sequence, and one more for each drafted token."""
        counts = step.drafted[step.sampling] + 1
        starts = np.cumsum(counts) - counts
        offsets = np.arange(counts.sum()) - np.repeat(starts, counts)
        return cls(np.repeat(step.slots[step.sampling], counts), offsets, np.repeat(counts - 1, counts))

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, rows: NDArray[np.int64]) -> SampledRows:
        """Return some of the rows."""
        return SampledRows(self.slots[rows], self.offsets[rows], self.drafted[rows])


_OPTIONAL = ("logprobs", "finished", "scores", "tags", "drafts")
_NOUGHT = [0]
"""Shared by nearly all samples: a list of its own for each would keep the garbage collector busy."""
_HOST = torch.device("cpu")
_NEVER = np.iinfo(np.int64).max


@attrs.frozen(slots=True)
class _Drawn:
    """What one sampler was asked for in a launched step: copies of its answer, on their way to the host."""

    part: NamedPart
    rows: SampledRows
    claims: NDArray[np.int64]
    """Whose the batch slots were; likewise ``places``: where their new tokens belong."""
    places: NDArray[np.int64]
    metadata: SamplingMetadata
    output: SamplerOutput
    peaks: torch.Tensor
    move: Move | None
    """Who continues whom, if that is not certain."""


@attrs.frozen(slots=True)
class Launched:
    """A step whose tokens stay on the device, to be run on from there, and reach the host a step late."""

    drawn: list[_Drawn]
    errors: dict[str, Exception]
    arrival: Milestone
    """When the copies are complete."""


class SamplingStage:
    """Owns the samplers and processors of an engine and applies them to a step's logits."""

    def __init__(self, samplers: Mapping[str, NamedPart], processors: Sequence[NamedPart], batch: InputBatch) -> None:
        self.samplers = dict(samplers)
        self.processors = list(processors)
        self.batch = batch
        self.current = "sampling"
        """What runs right now, for a watchdog's message."""
        self._sampler_ids = {name: number for number, name in enumerate(self.samplers)}
        self._parts = list(self.samplers.values())
        self._slot_sampler = np.zeros(batch.capacity, dtype=np.int64)
        self._slot_uses = np.zeros((len(self.processors), batch.capacity), dtype=np.bool_)
        self._slot_logprobs = np.zeros(batch.capacity, dtype=np.bool_)
        self._steady_from = np.full(batch.capacity, _NEVER)
        """From how many tokens on a slot's sequence may run ahead."""
        self._cached: dict[bytes, SamplingMetadata] = {}
        self._cached_version = -1

    def needs_history(self, request: Request) -> bool:
        """Whether its sampler or some processor reads this request's token ids."""
        if getattr(self.samplers[request.sampler].part, "needs_history", False):
            return True
        return any(p.part.needs_history and p.part.applies(request.params) for p in self.processors)

    def assign(self, slot: int, request: Request) -> None:
        """Remember which sampler and processors serve the sequence in ``slot``."""
        self._slot_sampler[slot] = self._sampler_ids[request.sampler]
        self._slot_logprobs[slot] = request.params.logprobs is not None
        after = request.steady_after
        # Whether rows that are re-parented may run ahead depends on how many they are: each step says so.
        never = after is None or request.reparents
        self._steady_from[slot] = _NEVER if never else len(request.prompt_token_ids) + (after or 0)
        for row, processor in enumerate(self.processors):
            self._slot_uses[row, slot] = processor.part.applies(request.params)

    def inherit(self, slots: NDArray[np.int64], parents: NDArray[np.int64]) -> None:
        """Have the sequences in ``slots`` served as those in ``parents`` are."""
        for known in (self._slot_sampler, self._slot_logprobs, self._steady_from):
            known[slots] = known[parents]
        self._slot_uses[:, slots] = self._slot_uses[:, parents]

    def steady_after(self, sampler: str, params: SamplingParams) -> int | None:
        """Return from how many output tokens on requests of these parameters may run ahead; None for never."""
        part = self.samplers[sampler].part
        promise = getattr(part, "steady_after", None)
        if promise is None or params.logprobs is not None or params.prompt_logprobs is not None:
            return None
        used = [p.part for p in self.processors if p.part.applies(params)]
        if getattr(part, "needs_history", False) or any(p.needs_history or not p.graph_safe for p in used):
            return None
        after: int | None = promise(params)
        return after

    def reparents(self, sampler: str) -> bool:
        """Return whether rows of a sampler that run ahead may continue one another."""
        return getattr(self.samplers[sampler].part, "reparents", False)

    def of_requests(self, slots: NDArray[np.int64], request_ids: list[str]) -> NDArray[np.bool_]:
        """Return which slots belong to some requests, bool ``[len(slots)]``."""
        wanted = set(request_ids)
        return np.array([self._request(slot).request_id in wanted for slot in slots.tolist()], dtype=np.bool_)

    def run_ahead(self, sampled: SampledRows, scheduled: SchedulerOutput) -> NDArray[np.bool_]:
        """Return which rows are to be launched, bool ``[rows]``: all that may run ahead, if all of them may.

        Else only those of requests that are ``reparented``: the step before has left them on the device.
        """
        slots = sampled.slots
        steady: NDArray[np.bool_] = self._steady_from[slots] <= self.batch.num_tokens[slots]
        if not scheduled.reparented:
            return steady if steady.all() else np.zeros_like(steady)
        reparented = self.of_requests(slots, scheduled.reparented)
        return steady | reparented if (steady | reparented).all() else reparented

    def launch(self, logits: torch.Tensor, sampled: SampledRows, unseen: Collection[str] = ()) -> Launched:
        """Have the device sample rows that ``run_ahead``, without waiting for it. Pass what comes to ``finish``.

        Args:
            logits: ``[len(sampled), vocab]`` in the model's dtype; may be written to.
            sampled: what each row of logits belongs to.
            unseen: requests of which the host has not seen what came of the step before.
        """
        slots, drawn, errors = sampled.slots, list[_Drawn](), dict[str, Exception]()
        if self._slot_uses[:, slots].any():
            logits = logits.float()
            self._process(logits, sampled, errors)
        for part, rows in self._by_sampler(slots):
            call = partial(self._draw, part, take_rows(logits, rows), sampled.take(rows), unseen, drawn)
            self._guard("sampler", part, slots[rows], errors, call)
        self.batch.advance(slots)
        self.current = "engine"
        return Launched(drawn, errors, Milestone(logits.device))

    def _draw(
        self,
        part: NamedPart,
        given: torch.Tensor,
        rows: SampledRows,
        unseen: Collection[str],
        drawn: list[_Drawn],
    ) -> None:
        batch, sampler = self.batch, part.part
        metadata = self._metadata(rows)
        # Only samplers that read logits as they are leave them so, and can be judged by what they have read.
        as_they_are = getattr(sampler, "reads_any_dtype", False)
        given = given if as_they_are else given.float()
        peaks = None if as_they_are else given.amax(1)
        reparented = bool(getattr(sampler, "reparents", False))
        metadata.runs_ahead = True
        metadata.is_behind = np.array([name in unseen for name in metadata.request_ids]) if reparented else None
        output = sampler.step(given, metadata)
        _check_ahead(output, len(rows), reparented=reparented)
        peaks = output.peaks if output.peaks is not None else peaks if peaks is not None else given.amax(1)
        batch.last_tokens.index_copy_(0, metadata.slots, output.tokens[: len(rows), 0])
        self._keep_state(rows, metadata, output)
        claims, places = batch.claims[rows.slots], batch.num_tokens[rows.slots]
        move = batch.reparent(rows.slots, metadata.slots, output.parents[: len(rows)]) if reparented else None
        copies = _copies(output, in_place=not reparented)
        drawn.append(_Drawn(part, rows, claims, places, metadata, copies, to_host(peaks), move))

    def _keep_state(self, rows: SampledRows, metadata: SamplingMetadata, output: SamplerOutput) -> None:
        """Leave what a strategy keeps with its rows on the device, for the next step."""
        if output.scores is None and output.tags is None:
            return
        scores, tags = (None if c is None else c[: len(rows)] for c in (output.scores, output.tags))
        self.batch.keep_state(metadata.slots, scores, tags)
        self._cached = {rows.slots.tobytes(): metadata}  # the other compositions have the old numbers
        metadata.scores = metadata.scores if scores is None else scores
        metadata.tags = metadata.tags if tags is None else tags

    def finish(self, launched: Launched, result: StepResult) -> StepResult:
        """Wait for a launched step, and note what came of it in ``result``, which is returned."""
        launched.arrival.wait()
        result.errors |= launched.errors
        for drawn in launched.drawn:
            try:
                samples = self._arrived(drawn, result.errors)
            except Exception as error:  # noqa: BLE001 (an answer that cannot be true must not reach other samplers' rows)
                fault = drawn.part.fault("sampler", error)
                result.errors |= {name: result.errors.get(name, fault) for name in drawn.metadata.request_ids}
                continue
            result.samples += [s for s in samples if s.request_id not in result.errors] if result.errors else samples
        return result

    def _arrived(self, drawn: _Drawn, errors: dict[str, Exception]) -> list[RequestSample]:
        """Judge what one sampler drew, bring the host's batch up to date, and cut it into samples."""
        peaks = drawn.peaks.float().numpy()
        for row in np.flatnonzero(~np.isfinite(peaks)).tolist():
            name = drawn.metadata.request_ids[row]
            errors.setdefault(name, _unusable(name, float(peaks[row])))
        slots, count = drawn.rows.slots, len(drawn.rows)
        host = _HostOutput.check(drawn.output, drawn.metadata, self.batch.vocab_size, padded=drawn.move is not None)
        if drawn.move is not None:
            self.batch.learn(drawn.move, host.parents[:count])
        same = self.batch.settle(slots, drawn.claims, drawn.places, host.tokens[:count, 0])
        if host.lists:
            scores, tags = (None if column is None else column[:count][same] for column in (host.scores, host.tags))
            self.batch.note_state(slots[same], drawn.places[same] + 1, scores, tags)  # type: ignore[arg-type]
        return self._split(host, drawn.rows, []) if drawn.move is None else host.reparented()

    def run(self, logits: torch.Tensor, sampled: SampledRows, result: StepResult) -> None:
        """Sample the next tokens of the sequences that ``sampled`` names and note what came of it in ``result``.

        Args:
            logits: ``[len(sampled), vocab]`` in the model's dtype; written to.
            sampled: what each row of logits belongs to.
            result: gets ``samples`` and ``errors``.
        """
        logits = logits.float()
        slots = sampled.slots
        raw = self._raw_log_probs(logits, slots)
        self._process(logits, sampled, result.errors)
        usable = self._reject_bad_rows(logits, sampled, result.errors)
        for part, mine in self._by_sampler(slots):
            rows = self._without_failed(mine[usable[mine]], slots, result.errors)
            if len(rows):
                call = partial(self._sample, part, logits, sampled, rows, raw, result)
                self._guard("sampler", part, slots[rows], result.errors, call)
        self.current = "engine"

    def _by_sampler(self, slots: NDArray[np.int64]) -> Iterator[tuple[NamedPart, NDArray[np.int64]]]:
        """Yield each sampler that serves some of the rows, and these."""
        wanted = self._slot_sampler[slots]
        first = wanted[0]
        numbers = [first] if (wanted == first).all() else np.unique(wanted)
        for number in numbers:
            yield self._parts[number], np.flatnonzero(wanted == number)

    def _raw_log_probs(self, logits: torch.Tensor, slots: NDArray[np.int64]) -> dict[int, torch.Tensor]:
        """Return log probabilities by row number, for the rows whose request wants them."""
        rows = np.flatnonzero(self._slot_logprobs[slots])
        if not len(rows):
            return {}
        log_probs = take_rows(logits, rows).log_softmax(-1)
        return dict(zip(rows.tolist(), log_probs, strict=True))

    def _process(self, logits: torch.Tensor, sampled: SampledRows, errors: dict[str, Exception]) -> None:
        slots = sampled.slots
        for number, processor in enumerate(self.processors):
            rows = self._without_failed(np.flatnonzero(self._slot_uses[number, slots]), slots, errors)
            if len(rows):
                call = partial(self._apply, processor.part, logits, sampled, rows)
                self._guard("logits processor", processor, slots[rows], errors, call)

    def _apply(
        self, processor: LogitsProcessor, logits: torch.Tensor, sampled: SampledRows, rows: NDArray[np.int64]
    ) -> None:
        """Edit the processor's rows of ``logits`` in place."""
        given = take_rows(logits, rows)
        edited = processor.apply(given, self._metadata(sampled.take(rows)))
        if edited.shape != given.shape:
            message = f"returned shape {tuple(edited.shape)}, expected {tuple(given.shape)}"
            raise ValueError(message)
        if len(rows) < len(logits):
            logits.index_copy_(0, to_device(rows, logits.device), edited)
        elif edited.data_ptr() != logits.data_ptr():
            logits.copy_(edited)

    def _reject_bad_rows(
        self, logits: torch.Tensor, sampled: SampledRows, errors: dict[str, Exception]
    ) -> NDArray[np.bool_]:
        """End requests with a row that holds NaN or +inf, or that has no token left.

        A drafted token after which everything is masked is only a bad guess: it is taken back with those behind it.

        Returns:
            bool ``[rows]``: the rows that are offered to samplers.
        """
        usable = np.ones(len(sampled), dtype=np.bool_)
        peaks = self._row_maxima(logits, sampled)
        good = np.isfinite(peaks)
        if good.all():
            return usable
        for row in np.flatnonzero(~good).tolist():
            if not usable[row]:
                continue
            request = self._request(int(sampled.slots[row]))
            peak = float(peaks[row])
            offset, drafted = int(sampled.offsets[row]), int(sampled.drafted[row])
            if peak == -np.inf and offset:
                usable[row : row - offset + drafted + 1] = False
                sampled.drafted[row - offset : row] = offset - 1
                continue
            errors.setdefault(request.request_id, _unusable(request.request_id, peak))
        return usable

    def _row_maxima(self, logits: torch.Tensor, sampled: SampledRows) -> NDArray[np.float32]:
        """Return each row's largest entry, NaN if it holds one."""
        if logits.device.type == "cpu":
            return logits.numpy().max(1)  # type: ignore[no-any-return]  # torch's threads would cost more than they spare
        peaks = to_host(logits.amax(1))
        arrival = Milestone(logits.device)
        # What samplers are told is gathered while the device computes.
        for _, rows in self._by_sampler(sampled.slots):
            self._metadata(sampled.take(rows))
        arrival.wait()
        return peaks.numpy()

    def _sample(  # noqa: PLR0913, PLR0917 (one step's shared state)
        self,
        part: NamedPart,
        logits: torch.Tensor,
        sampled: SampledRows,
        rows: NDArray[np.int64],
        raw: dict[int, torch.Tensor],
        result: StepResult,
    ) -> None:
        mine = sampled.take(rows)
        metadata = self._metadata(mine)
        metadata.runs_ahead = False
        output = part.part.step(take_rows(logits, rows), metadata)
        if output.errors:
            own = set(metadata.request_ids)
            result.errors |= {name: error for name, error in output.errors.items() if name in own}
        host = _HostOutput.check(output, metadata, logits.shape[-1])
        raw_rows = [raw.get(row) for row in rows.tolist()] if raw else []
        samples = self._split(host, mine, raw_rows)
        self._advance(mine, host)
        result.samples += samples

    def _advance(self, rows: SampledRows, host: _HostOutput) -> None:
        """Store each sequence's first child in the sequence's slot; the engine sends the other children as forks."""
        if host.identity:
            slots, first = rows.slots, np.arange(len(rows))
        else:
            slots, first = np.unique(rows.slots[host.parents], return_index=True)
            kept = rows.offsets[host.parents][first]
            if kept.any():
                self.batch.accept(slots, kept)
        self.batch.append(slots, host.tokens[first])
        if host.drafts is not None:
            self.batch.set_drafts(slots, host.drafts[first])
        self.batch.set_state(
            slots,
            None if host.scores is None else host.scores[first],
            None if host.tags is None else host.tags[first],
        )

    def _split(self, host: _HostOutput, rows: SampledRows, raw: list[torch.Tensor | None]) -> list[RequestSample]:
        """Cut the output into one sample per request, with parents counted in sequences from the request's first."""
        request_ids = host.metadata.request_ids
        if host.is_plain and not raw:
            plain = zip(request_ids, host.tokens.tolist(), strict=True)
            return [RequestSample(name, _NOUGHT, [row], _NOUGHT, is_plain=True) for name, row in plain]
        if not raw and host.metadata.drafts is None and (samples := host.samples()) is not None:
            return samples
        kept = self._kept_drafts(host, rows)
        tokens = [
            mine + [token for token in row if token >= 0] for mine, row in zip(kept, host.tokens.tolist(), strict=True)
        ]
        candidates = self._candidates(host, kept, raw)
        children: dict[str, list[int]] = {request_id: [] for request_id in request_ids}
        for child, parent in enumerate(host.parents.tolist()):
            children[request_ids[parent]].append(child)
        idle = [request_id for request_id, mine in children.items() if mine and not any(tokens[row] for row in mine)]
        _check_none_is_idle(idle)
        sequences = (np.cumsum(rows.offsets == 0) - 1).tolist()
        firsts = {request_id: sequences[row] for row, request_id in reversed(list(enumerate(request_ids)))}
        parents = [sequences[row] for row in host.parents.tolist()]
        drafted = np.where(rows.offsets == 0, rows.drafted, 0)
        num_drafts: Counter[str] = Counter()
        for row in drafted.nonzero()[0].tolist():
            num_drafts[request_ids[row]] += int(drafted[row])
        return [
            RequestSample(
                request_id,
                parents=[parents[child] - firsts[request_id] for child in mine],
                tokens=[tokens[child] for child in mine],
                kept=[len(kept[child]) for child in mine],
                num_drafts=num_drafts[request_id],
                logprobs=[candidates.get(child, []) for child in mine] if candidates.keys() & mine else None,
                **host.columns(mine),
            )
            for request_id, mine in children.items()
        ]

    def _kept_drafts(self, host: _HostOutput, rows: SampledRows) -> list[list[int]]:
        """Return the drafted tokens that each child keeps."""
        if host.identity or not rows.drafted.any():
            return [[] for _ in range(len(host.parents))]
        batch, kept = self.batch, []
        for row in host.parents.tolist():
            slot, count = int(rows.slots[row]), int(rows.offsets[row])
            start = int(batch.num_tokens[slot])
            kept.append(batch.token_ids[slot, start : start + count].tolist())
        return kept

    def _candidates(
        self, host: _HostOutput, kept: list[list[int]], raw: list[torch.Tensor | None]
    ) -> dict[int, list[Candidates]]:
        """Return the candidates at each kept draft and the first new token of every child that wants them."""
        judged = [
            (child, row, token)
            for child, parent in enumerate(host.parents.tolist())
            if raw and raw[parent] is not None and host.tokens[child, 0] >= 0
            for row, token in enumerate([*kept[child], int(host.tokens[child, 0])], start=parent - len(kept[child]))
        ]
        if not judged:
            return {}
        log_probs = torch.stack([found for _, row, _ in judged if (found := raw[row]) is not None])
        tokens = torch.tensor([token for _, _, token in judged], device=log_probs.device)
        gathered = gather_logprobs(log_probs, tokens, [host.metadata.params[row].logprobs or 0 for _, row, _ in judged])
        found_of: dict[int, list[Candidates]] = {}
        for (child, _, _), candidates in zip(judged, gathered, strict=True):
            found_of.setdefault(child, []).append(candidates)
        return found_of

    def _metadata(self, rows: SampledRows) -> SamplingMetadata:
        """Return the rows' metadata; while the batch keeps its composition only positions are read anew."""
        places = self.batch.num_tokens[rows.slots] + rows.offsets
        positions = to_device(places, self.batch.device)
        if rows.drafted.any():
            return self._with_drafts(rows, self._build_metadata(rows.slots, positions, places))
        if self._cached_version != self.batch.version:
            self._cached.clear()
            self._cached_version = self.batch.version
        key = rows.slots.tobytes()
        metadata = self._cached.get(key)
        if metadata is None:
            metadata = self._cached[key] = self._build_metadata(rows.slots, positions, places)
        metadata.positions, metadata.places = positions, places
        return metadata

    def _with_drafts(self, rows: SampledRows, metadata: SamplingMetadata) -> SamplingMetadata:
        """Add each row's next drafted token, and to its history those before it."""
        batch = self.batch
        places = batch.num_tokens[rows.slots] + rows.offsets
        behind = batch.token_ids[rows.slots, np.minimum(places, batch.token_ids.shape[1] - 1)]
        following = np.where(rows.offsets < rows.drafted, behind, -1).astype(np.int64)
        metadata.drafts = torch.from_numpy(following).to(batch.device)
        if metadata.history is not None:
            metadata.history = [
                [*history, *batch.token_ids[slot, len(history) : len(history) + offset].tolist()]
                for history, slot, offset in zip(metadata.history, rows.slots, rows.offsets, strict=True)
            ]
        return metadata

    def _build_metadata(
        self, slots: NDArray[np.int64], positions: torch.Tensor, places: NDArray[np.int64]
    ) -> SamplingMetadata:
        columns, host = self.batch.gather_columns(slots), self.batch.columns
        requests = [self._request(slot) for slot in slots.tolist()]
        histories = [self.batch.histories[slot] for slot in slots.tolist()]
        return SamplingMetadata(
            **columns,  # type: ignore[arg-type]  # tensors by name
            positions=positions,
            places=places,
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


@attrs.frozen(slots=True, kw_only=True)
class _HostOutput:
    """A SamplerOutput, checked and brought to the host."""

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None
    finished: NDArray[np.bool_] | None
    scores: NDArray[np.float32] | None
    tags: NDArray[np.int64] | None
    drafts: NDArray[np.int64] | None
    identity: bool
    metadata: SamplingMetadata
    lists: dict[str, list[Any]] = attrs.field(init=False)
    """The optional columns that the sampler gave, as Python lists."""

    @lists.default
    def _to_lists(self) -> dict[str, list[Any]]:
        given = {name: getattr(self, name) for name in _OPTIONAL}
        return {name: column.tolist() for name, column in given.items() if column is not None}

    @property
    def is_plain(self) -> bool:
        """Whether the step gave every request one token for its one row, and nothing else: as nearly all steps do."""
        if not self.identity or self.lists or self.tokens.shape[1] != 1 or self.tokens.min() < 0:
            return False
        return len(set(self.metadata.request_ids)) == len(self.tokens)

    @classmethod
    def check(
        cls, output: SamplerOutput, metadata: SamplingMetadata, vocab_size: int, *, padded: bool = False
    ) -> _HostOutput:
        """Refuse shapes and values that would corrupt the batch.

        Args:
            output: what a sampler answered.
            metadata: what it was asked of.
            vocab_size: width of a row of logits.
            padded: whether children behind as many as there are rows may be missing, with -1 as their parent.

        Raises:
            ValueError: what is wrong, and what was expected.
        """
        parents, tokens = output.parents.cpu().numpy(), output.tokens.cpu().numpy()
        rows = metadata.num_rows
        if parents.ndim != 1 or tokens.ndim != 2 or len(parents) != len(tokens) or tokens.shape[1] < 1:  # noqa: PLR2004 (matrix)
            message = f"parents {parents.shape} and tokens {tokens.shape}: expected [m] and [m, k] with k >= 1"
            raise ValueError(message)
        must_be = parents[:rows] if padded else parents
        if len(parents) and not (must_be.min() >= 0 and parents.min() >= -1 and parents.max() < rows):
            message = f"parents {parents.tolist()} leave the {rows} rows of this step"
            raise ValueError(message)
        if tokens.size and not (tokens.min() >= -1 and tokens.max() < vocab_size):
            message = f"tokens {tokens.tolist()} leave the vocabulary of {vocab_size}"
            raise ValueError(message)
        columns: dict[str, Any] = {
            name: None if (column := getattr(output, name)) is None else column.cpu().numpy() for name in _OPTIONAL
        }
        for name, column in columns.items():
            if column is not None and len(column) != len(parents):
                message = f"{name} has {len(column)} entries for {len(parents)} rows"
                raise ValueError(message)
        identity = metadata.drafts is None and len(parents) == rows and bool((parents == np.arange(rows)).all())
        return cls(parents=parents, tokens=tokens, identity=identity, metadata=metadata, **columns)

    def samples(self) -> list[RequestSample] | None:
        """Return one sample for each request of a step without drafts; None if a request's rows are not together."""
        spans = self.metadata.groups
        request_of = np.repeat(np.arange(len(spans)), [len(span) for _, span in spans])[self.parents]
        if (request_of[1:] < request_of[:-1]).any():
            return None
        ends = np.searchsorted(request_of, np.arange(len(spans)), side="right").tolist()
        parents, tokens, nought = self.parents.tolist(), self.tokens.tolist(), [0] * len(self.parents)
        if self.tokens.min(initial=0) < 0:
            tokens = [[token for token in row if token >= 0] for row in tokens]
        lists = {"stated" if name == "logprobs" else name: column for name, column in self.lists.items()}
        samples, start = [], 0
        for (request_id, span), end in zip(spans, ends, strict=True):
            mine = [parent - span.start for parent in parents[start:end]]
            columns: dict[str, Any] = {name: column[start:end] for name, column in lists.items()}
            samples.append(RequestSample(request_id, mine, tokens[start:end], nought[start:end], **columns))
            start = end
        _check_none_is_idle([s.request_id for s in samples if s.tokens and not any(s.tokens)])
        return samples

    def reparented(self) -> list[RequestSample]:
        """Return one sample for each request of a step whose rows have gone on already (see ``RequestSample``)."""
        rows, spans = self.metadata.num_rows, self.metadata.groups
        ending = np.flatnonzero(self.parents[rows:] >= 0) + rows
        owners = np.searchsorted([span.start for _, span in spans], self.parents[ending], side="right") - 1
        ending_of: list[list[int]] = [[] for _ in spans]
        for child, owner in zip(ending.tolist(), owners.tolist(), strict=True):
            ending_of[owner].append(child)
        parents, tokens, samples = self.parents.tolist(), self.tokens.tolist(), []
        for (request_id, span), ended in zip(spans, ending_of, strict=True):
            children = [*span, *ended]
            mine = [parents[child] - span.start for child in children]
            if not all(place in range(len(span)) for place in mine):
                message = f"rows of request {request_id!r} continue rows {mine} of its {len(span)}"
                raise ValueError(message)
            columns = self.columns(children)
            samples.append(
                RequestSample(
                    request_id, mine, [tokens[c] for c in children], [0] * len(mine), is_reparented=True, **columns
                )
            )
        return samples

    def columns(self, children: list[int]) -> dict[str, Any]:
        """Return what a sample keeps of the optional columns, for these rows."""
        found = {name: [column[child] for child in children] for name, column in self.lists.items()}
        if "logprobs" in found:
            found["stated"] = found.pop("logprobs")
        return found


def _check_none_is_idle(request_ids: list[str]) -> None:
    if request_ids:
        message = f"requests {request_ids}: no row appends a token, so they would never end: hold some rows, not all"
        raise ValueError(message)


def _check_ahead(output: SamplerOutput, rows: int, *, reparented: bool) -> None:
    """Refuse an answer that steps cannot run on from.

    Raises:
        ValueError: what it is, and for how many rows.
    """
    shape = tuple(output.tokens.shape)
    fits = shape[0] >= rows if reparented else shape[0] == rows
    if not fits or shape[1:] != (1,) or output.drafts is not None or output.errors:
        message = f"tokens {shape} for {rows} rows, or drafts or errors: it is not steady"
        raise ValueError(message)


def _copies(output: SamplerOutput, *, in_place: bool) -> SamplerOutput:
    """Return the answer of a step that was run on from, on its way to the host."""
    columns: dict[str, Any] = {
        name: to_host(column) for name in _OPTIONAL if (column := getattr(output, name)) is not None
    }
    parents = identity(len(output.tokens), _HOST) if in_place else to_host(output.parents)
    return attrs.evolve(output, tokens=to_host(output.tokens), parents=parents, **columns)


def _unusable(request_id: str, peak: float) -> FoloError:
    reason = "every token is masked" if peak == -np.inf else f"the largest logit is {peak}"
    return FoloError(f"request {request_id!r}: its logits cannot be sampled: {reason}")


def take_rows(logits: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
    """Return these rows: the tensor itself if they are all of it, else a copy."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, to_device(rows, logits.device))
