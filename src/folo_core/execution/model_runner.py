"""Runs one scheduled step: edit the batch, forward, sample. On a device it is only asked to; the result comes later."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from folo_core.attention.interface import RegroupingBackend, SwappingBackend
from folo_core.errors import ConfigError
from folo_core.execution.graphs import decode_graphs
from folo_core.execution.input_batch import InputBatch
from folo_core.execution.interface import StepResult
from folo_core.execution.logprobs import gather_logprobs
from folo_core.execution.regrouping import regroup, regroup_on_host
from folo_core.execution.sampling_stage import SampledRows, SamplingStage, take_rows
from folo_core.execution.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from folo_core.attention.interface import AttentionBackend, Regrouping
    from folo_core.config import EngineConfig
    from folo_core.execution.input_batch import PackedStep
    from folo_core.execution.interface import LoadedModel
    from folo_core.execution.parts import NamedPart
    from folo_core.request import Request
    from folo_core.sampling_params import SamplingParams
    from folo_core.scheduling.interface import Fork, SchedulerOutput


class ModelRunner:
    """Owns the model, its KV tensors and the persistent batch. One per device."""

    def __init__(  # noqa: PLR0913 (a step's parts, each given by name)
        self,
        *,
        model: LoadedModel,
        backend: AttentionBackend,
        samplers: Mapping[str, NamedPart],
        processors: Sequence[NamedPart],
        config: EngineConfig,
        num_blocks: int,
        num_host_blocks: int = 0,
    ) -> None:
        self.model = model
        self.backend = backend
        block_size = config.cache.block_size
        backend.allocate(model.kv_cache_specs, num_blocks, block_size, model.device)
        if num_host_blocks:
            self._swapping.allocate_host(num_host_blocks)
        model.bind(backend)
        assert config.scheduler.max_model_len is not None  # noqa: S101 (a resolved config)
        self.batch = InputBatch(
            # Forks take their slots before the sequences they replace leave theirs.
            capacity=2 * config.scheduler.max_num_seqs,
            max_model_len=config.scheduler.max_model_len,
            block_size=block_size,
            vocab_size=model.info.vocab_size,
            device=model.device,
        )
        self.stage = SamplingStage(samplers, processors, self.batch)
        self.requests: dict[str, Request] = {}
        self.graphs = decode_graphs(model, backend, self.batch, config)
        # Asked once: to look through a protocol's methods takes a while.
        self._regroups = isinstance(backend, RegroupingBackend)
        self.current = "engine"

    def current_part(self) -> str:
        """Name what runs right now."""
        return self.stage.current if self.current == "sampling" else self.current

    def steady_after(self, sampler: str, params: SamplingParams) -> int | None:
        """Return from how many output tokens on such a request's tokens may stay on the device (see ``Executor``)."""
        able = self.model.device.type != "cuda" or self._regroups
        return self.stage.steady_after(sampler, params) if able or not self.stage.reparents(sampler) else None

    @torch.inference_mode()
    def start(self, scheduled: SchedulerOutput) -> Callable[[], StepResult]:
        """Have the device run a step.

        Returns:
            What waits for the step and returns what it brought to the host.
        """
        result = StepResult()
        self._edit_batch(scheduled, result)
        if not scheduled.seq_ids:
            return lambda: result
        step = self.batch.pack(scheduled)
        step.regrouping = self._regrouping(step, scheduled.unseen) if scheduled.unseen else None
        rows = SampledRows.of(step)
        wanted, prompt_rows = self._logits_wanted(step, rows)
        self.current = f"model {self.model.info.architecture!r}"
        logits = self._forward(step, wanted, replay=step.is_decode and not prompt_rows)
        self.current = "sampling"
        if prompt_rows:
            self._prompt_logprobs(logits[len(rows) :].float(), step, prompt_rows, result)
        wait = self._sample(logits[: len(rows)], rows, scheduled, result)
        self.current = "engine"
        return wait

    def _sample(
        self, logits: torch.Tensor, rows: SampledRows, scheduled: SchedulerOutput, result: StepResult
    ) -> Callable[[], StepResult]:
        """Sample rows, and return what brings the result: some tokens may stay on the device for now."""
        stage, ahead = self.stage, self.stage.run_ahead(rows, scheduled)
        if not ahead.any():
            if len(rows):
                stage.run(logits, rows, result)
            return lambda: result
        if ahead.all():
            return partial(stage.finish, stage.launch(logits, rows, scheduled.unseen), result)
        first, second = np.flatnonzero(ahead), np.flatnonzero(~ahead)
        launched = stage.launch(take_rows(logits, first), rows.take(first), scheduled.unseen)
        stage.run(take_rows(logits, second), rows.take(second), result)
        return partial(stage.finish, launched, result)

    def _regrouping(self, step: PackedStep, unseen: list[str]) -> Regrouping | None:
        """Return whose blocks rows go on with, where the backend sees to it; else the host has done so."""
        regrouping = self.batch.regrouping(step, self.stage.of_requests(step.slots, unseen))
        if self._regroups:
            return regrouping
        regroup_on_host(step, regrouping, self.backend, self.batch.block_size)
        return None

    def warm_up(self) -> None:
        """Record what is replayed later, where graphs are on, so that no request waits for it."""
        if self.graphs is not None:
            self.graphs.record_all()

    def _forward(self, step: PackedStep, wanted: NDArray[np.int64], *, replay: bool) -> torch.Tensor:
        """Return the logits of the packed tokens ``wanted``: from a recorded graph if the step is like one."""
        if replay and self.graphs is not None and self.graphs.covers(len(step.slots)):
            return self.graphs.replay(step)
        device = self.model.device
        tokens = to_device(step.tokens, device)
        metadata = step.metadata(tokens[2], self.batch.block_size)
        if self.backend.wants_device_metadata:
            metadata.to_device(device)
        metadata.plan = self.backend.plan(metadata)
        regroup(self.backend, metadata)
        ids = self.batch.input_ids(tokens) if step.tokens[0].min() < 0 else tokens[0]
        return self.model.forward(ids, tokens[1], to_device(wanted, device), metadata)

    @property
    def _swapping(self) -> SwappingBackend:
        if not isinstance(self.backend, SwappingBackend):
            message = f"swap_space: attention backend {type(self.backend).__name__} cannot move blocks to the host"
            raise ConfigError(message)
        return self.backend

    def _swap(self, scheduled: SchedulerOutput, result: StepResult) -> None:
        """Copy blocks out; zero what nobody may see; copy blocks in: in this order, since blocks change hands."""
        started = time.perf_counter()
        if scheduled.swap_out:
            self._swapping.swap_out(*_columns(scheduled.swap_out))
        if scheduled.zero_blocks:
            self.backend.zero_blocks(scheduled.zero_blocks)
        if scheduled.swap_in:
            self._swapping.swap_in(*_columns(scheduled.swap_in))
        if scheduled.swap_out or scheduled.swap_in:
            result.swap_seconds = time.perf_counter() - started

    def _edit_batch(self, scheduled: SchedulerOutput, result: StepResult) -> None:
        """Bring slots, block tables and blocks up to date, in the order that SchedulerOutput promises."""
        if self.batch.moves:
            slots = self.batch.slots_of([seq_id for seq_id in scheduled.seq_ids if seq_id in self.batch])
            self.batch.begin_step(slots, self.stage.of_requests(slots, scheduled.unseen))
        if scheduled.forks:
            self._fork(scheduled.forks)
        for seq_id in scheduled.released:
            self.batch.remove(seq_id)
        self._swap(scheduled, result)
        for new in scheduled.new_sequences:
            request = self.requests[new.request_id]
            self.batch.add(new, request, keep_history=self.stage.needs_history(request))
            self.stage.assign(int(self.batch.slots_of([new.seq_id])[0]), request)
        if scheduled.new_blocks:
            self.batch.set_blocks(scheduled.new_blocks)
        if scheduled.spares:
            self.batch.set_spares(scheduled.spares)
        if scheduled.copy_sources:
            self.backend.copy_blocks(scheduled.copy_sources, scheduled.copy_destinations)

    def _fork(self, forks: list[Fork]) -> None:
        """Give forks slots: nearly all go on as rows of their parent's request, some as requests of their own."""
        parents, slots = self.batch.fork(forks)
        self.stage.inherit(slots, parents)
        for fork, slot in zip(forks, slots.tolist(), strict=True):
            request = self.requests[fork.request_id]
            if self.batch.requests[slot] is not request:
                self.batch.give(slot, request, fork, keep_history=self.stage.needs_history(request))
                self.stage.assign(slot, request)

    def _logits_wanted(self, step: PackedStep, rows: SampledRows) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """Return the packed tokens whose logits are wanted, and (row of the step, count) for prompt logprobs.

        Sampled rows come first. A prompt position's logits judge the next prompt token, so the last position
        is no one's to judge.
        """
        ends = step.query_start[1:].astype(np.int64)
        wanted = [np.repeat(ends[step.sampling], step.drafted[step.sampling] + 1) - 1 - rows.drafted + rows.offsets]
        prompt_rows = []
        for row in np.flatnonzero(self.batch.judges_prompt[step.slots]).tolist():
            request = self.batch.requests[int(step.slots[row])]
            if request is None or not request.wants_prompt_logprobs:
                continue
            start = int(step.starts[row])
            count = min(int(step.counts[row]), len(request.prompt_token_ids) - 1 - start)
            if count > 0:
                first = int(step.query_start[row])
                wanted.append(np.arange(first, first + count))
                prompt_rows.append((row, count))
        return np.concatenate(wanted), prompt_rows

    def _prompt_logprobs(
        self, logits: torch.Tensor, step: PackedStep, rows: list[tuple[int, int]], result: StepResult
    ) -> None:
        offset = 0
        for row, count in rows:
            request = self.batch.requests[int(step.slots[row])]
            assert request is not None  # noqa: S101 (it was there when the rows were chosen)
            assert request.params.prompt_logprobs is not None  # noqa: S101 (likewise)
            start = int(step.starts[row])
            targets = torch.tensor(request.prompt_token_ids[start + 1 : start + 1 + count], device=logits.device)
            log_probs = logits[offset : offset + count].log_softmax(-1)
            tops = [request.params.prompt_logprobs] * count
            result.prompt_logprobs.setdefault(request.request_id, []).extend(gather_logprobs(log_probs, targets, tops))
            offset += count


def _columns(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
