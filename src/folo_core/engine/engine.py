"""The step loop: schedule, execute, sample, update."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING

import attrs

from folo_core.engine.input_processor import InputProcessor
from folo_core.engine.observer import RequestEvent
from folo_core.engine.output_processor import OutputProcessor
from folo_core.engine.reporting import Reporter
from folo_core.engine.stall import StallWatchdog, describe, find_culprit
from folo_core.engine.watchdog import StepWatchdog
from folo_core.errors import FoloError, RequestError, StepOutOfMemoryError, StepTimeoutError
from folo_core.execution.interface import StepResult
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.scheduling.costs import PreemptionCosts
from folo_core.scheduling.interface import Fork, SchedulerOutput, SchedulerState, ServiceScheduler, StepBudget
from folo_core.sequence import SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from contextlib import AbstractContextManager

    from folo_core.components import Components
    from folo_core.engine.input_processor import Prompt
    from folo_core.engine.reporting import EngineStats
    from folo_core.execution.interface import RequestSample, StepHandle
    from folo_core.outputs import RequestOutput
    from folo_core.request import Request
    from folo_core.sampling_params import SamplingParams
    from folo_core.sequence import Sequence

logger = logging.getLogger(__name__)

STEPS_BEFORE_GROWTH = 32
"""Steps without running out of memory before a budget that was cut for it doubles again.

Twice as many each time that what had grown had to be cut: all that runs is then computed anew, and must come further.
"""


class Engine:
    """Runs requests to their end, many at a time. Not thread-safe: one thread owns an engine."""

    def __init__(self, components: Components) -> None:
        self.components = components
        config = components.config
        self.executor = components.executor
        self.scheduler = components.scheduler.part
        kv = KVCacheManager(
            components.kv_blocks,
            config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            prefix_cache_size=config.cache.prefix_cache_size,
            num_host_blocks=components.host_blocks,
            block_bytes=components.block_bytes,
        )
        self.inputs = InputProcessor(components, kv)
        self.outputs = OutputProcessor(components.tokenizer, self.inputs.max_model_len)
        self.state = SchedulerState.empty(kv, self.scheduler.order, PreemptionCosts(config.scheduler.preemption))
        self.budget = StepBudget(
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_chunk_tokens=config.scheduler.long_prefill_token_threshold or self.inputs.max_model_len,
            chunked_prefill=config.scheduler.enable_chunked_prefill,
        )
        self._full_budget = self.budget
        self._steps_in_memory, self._steps_before_growth = 0, STEPS_BEFORE_GROWTH
        self._has_grown = False
        """Whether a budget that was cut has doubled since."""
        self.requests: dict[str, Request] = {}
        self.reporter = Reporter(components.observers, self.state)
        self._serves = self.scheduler if isinstance(self.scheduler, ServiceScheduler) else None
        self._watchdog = None if config.step_timeout_s is None else StepWatchdog(config.step_timeout_s)
        self._in_flight: deque[_Flight] = deque()
        self._seq_ids = itertools.count()
        self._arrivals = itertools.count()
        self._released: list[int] = []
        self._forks: dict[int, Fork] = {}
        """Forks that the executor has not seen, by the child's id."""
        self._zero_blocks: list[int] = []
        self._stall = StallWatchdog()

    @property
    def step_count(self) -> int:
        """Number of steps that have come back."""
        return self.reporter.step

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting, running or swapped."""
        return bool(self.requests)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
    ) -> None:
        """Admit a request to the queue.

        Args:
            request_id: unique among the unfinished requests.
            prompt: a text or token ids (see ``Prompt``).
            params: their class picks the sampler.
            priority: lower runs earlier, under schedulers that look at it.
            tenant: whom it serves, under schedulers that share out fairly. Prompts of different tenants never share
                what was computed for one of them; a ``cache_salt`` in the prompt keeps a tenant's own apart.

        Raises:
            RequestError: the id is in use, the queue is full, or the prompt cannot be served.
            ParamsError: the parameters do not fit the model, or no sampler serves them.
        """
        self._check_new(request_id)
        arrival = next(self._arrivals)
        request = self.inputs.process(request_id, prompt, params, priority=priority, arrival=arrival, tenant=tenant)
        self.executor.add_request(request)
        self.outputs.open(request, request.open_sequence(next(self._seq_ids)))
        self.requests[request_id] = request
        self.state.waiting.push(request)
        self.reporter.on_request(request, RequestEvent.QUEUED)

    def fork(
        self,
        request_id: str,
        new_request_id: str,
        *,
        at: int | None = None,
        row: int = 0,
        params: SamplingParams | None = None,
    ) -> None:
        """Branch a generation: a new request goes on from another one's tokens, which keeps running.

        The two share the KV blocks of what they have in common. The new request's answer begins with the tokens
        that it takes over, and its limits (``max_tokens``) count them. Its strategy starts anew: a fork of one beam is
        not that beam's search. If no place is free, or the source holds no memory, the fork waits in the queue
        and is computed anew when its turn comes.

        Args:
            request_id: the request to branch; it must not have finished.
            new_request_id: the branch's id, for its outputs and for ``abort``.
            at: how many output tokens to take over; None for all there are.
            row: which of the request's live sequences to branch, in row order.
            params: the branch's own parameters; None for the source's with a seed of its own, since with the same
                seed the branch would draw the same tokens.

        Raises:
            RequestError: an id is unknown or in use, ``at`` or ``row`` names what is not there, or the queue is full.
            ParamsError: ``params`` do not fit.
        """
        self._check_new(new_request_id)
        source = self.requests.get(request_id)
        if source is None:
            message = f"request_id: {request_id!r}: no such request is running: fork it before it has finished"
            raise RequestError(message, code="unknown_request_id")
        request = self.inputs.branch(new_request_id, source, row, at, params, arrival=next(self._arrivals))
        self.executor.add_request(request)
        self.outputs.open(request, request.branch_from(source.live[row], at, next(self._seq_ids)))
        self.requests[new_request_id] = request
        self.reporter.on_request(request, RequestEvent.QUEUED)
        # Whose blocks a row has that may just have been re-parented, nobody knows yet: the branch is computed anew.
        unsure = source.reparents and source.live[row].num_pending
        if unsure or not self._share_memory(source.live[row], request):
            self.state.waiting.push(request)

    def _check_new(self, request_id: str) -> None:
        if request_id in self.requests:
            message = f"request_id: {request_id!r}: a request of this id is not finished yet: choose another"
            raise RequestError(message, code="duplicate_request_id")
        limit = self.components.config.scheduler.max_waiting_requests
        if limit is not None and len(self.state.waiting) >= limit:
            message = f"request {request_id!r}: the queue holds max_waiting_requests={limit}: try again later"
            raise RequestError(message, code="queue_full")

    def _share_memory(self, parent: Sequence, request: Request) -> bool:
        """Let a branch start on its parent's blocks, at once; False if it cannot."""
        places = self.budget.max_num_seqs - self.state.num_running_seqs
        if parent.block_table is None or request.width > places or request.wants_prompt_logprobs:
            return False
        child = request.live[0]
        child.block_table = parent.block_table.fork()
        self.state.kv.truncate(child, min(parent.num_computed_tokens, child.num_tokens - 1))
        child.transition(SequenceStatus.RUNNING)
        self.state.start(request, self.scheduler.order)
        self.reporter.on_request(request, RequestEvent.STARTED)
        # A parent that the executor has not seen yet is itself a fork: both start from the same sequence.
        pending = self._forks.get(parent.seq_id)
        known_id = parent.seq_id if pending is None else pending.parent_id
        known = parent.num_tokens if pending is None else pending.num_tokens
        known = min(known, child.num_tokens)
        self._note_fork(request, known_id, child, known)
        return True

    def abort(self, request_ids: str | Iterable[str]) -> list[RequestOutput]:
        """End requests wherever they are and return their last outputs; unknown ids are ignored."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        found = [self.requests[request_id] for request_id in ids if request_id in self.requests]
        return self._end_all(found, SequenceStatus.FINISHED_ABORTED)

    def step(self) -> list[RequestOutput]:
        """Run one step and return what changed for callers.

        With an executor that keeps several steps in flight, the next step is submitted before the oldest
        one's result is awaited.
        """
        started = time.perf_counter()
        outputs: list[RequestOutput] = []
        try:
            scheduled = SchedulerOutput() if self._must_wait() else self._schedule()
        except Exception as error:  # noqa: BLE001 (a scheduler plugin may raise anything)
            fault = self.components.scheduler.fault("scheduler", error)
            return self._end_all(list(self.requests.values()), SequenceStatus.FINISHED_ERROR, fault)
        if not scheduled.is_empty:
            self._submit(scheduled)
        outputs += self._check_progress(scheduled)
        if len(self._in_flight) >= self.executor.max_steps_in_flight or (self._in_flight and not scheduled.seq_ids):
            flight = self._in_flight.popleft()
            outputs += self._update(flight, self._await(flight), started)
        return outputs

    def stats(self) -> EngineStats:
        """Return queues, memory and prefix cache as they are now."""
        return self.reporter.stats()

    def reset_prefix_cache(self) -> None:
        """Forget what blocks hold, as after a change of the model's weights. Running requests go on undisturbed."""
        self.state.kv.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Check the books of all memory against all live sequences.

        Raises:
            BlockPoolError: they do not balance.
        """
        self.state.kv.check_integrity(s for request in self.requests.values() for s in request.live)

    def _must_wait(self) -> bool:
        """Whether all there is to do depends on the step in flight: then asking the scheduler would be in vain.

        Nothing builds on a step that could not be submitted: it would run without what that one was to compute.
        """
        if self._in_flight and isinstance(self._in_flight[-1].handle, _FailedStep):
            return True
        if not self._in_flight or self.state.waiting or self._released or self._forks or self._zero_blocks:
            return False
        scheduled = self._in_flight[-1].scheduled
        if scheduled.scheduled != self.state.running or not all(scheduled.samples):
            return False
        return all(request.steady_after is None for request in self.state.running)

    def _schedule(self) -> SchedulerOutput:
        self.state.kv.begin_step()
        scheduled: SchedulerOutput = self.scheduler.schedule(self.state, self.budget)
        scheduled.forks, self._forks = list(self._forks.values()), {}
        scheduled.released = self._released + scheduled.released
        self._released = []
        scheduled.zero_blocks, self._zero_blocks = self._zero_blocks, []
        now = time.monotonic()
        for request in scheduled.scheduled:
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now
        for request in scheduled.preempted:
            self._forget_in_flight(request)
            if request.wants_prompt_logprobs:
                request.prompt_logprobs.clear()
        self.reporter.on_scheduled(scheduled)
        return scheduled

    def _submit(self, scheduled: SchedulerOutput) -> None:
        """Start a step; whatever it raises becomes the error of the requests in it."""
        try:
            with self._guard():
                handle: StepHandle = self.executor.submit(scheduled)
        except Exception as error:  # noqa: BLE001 (a model may raise anything; the engine lives on)
            handle = _FailedStep(self._step_error(error))
        except BaseException:
            # Ctrl-C: the caller will abort its own requests; those of others go on.
            self._take_back(_Flight(scheduled, _FailedStep(FoloError("interrupted")), []))
            raise
        self._in_flight.append(_Flight(scheduled, handle, self._progress(scheduled), self._groups(scheduled)))

    def _progress(self, scheduled: SchedulerOutput) -> list[tuple[Request, Sequence, int]]:
        """Return what will be computed when a step is back, for the prefix cache."""
        if self.state.kv.index is None:
            return []
        return [(r, s, s.num_computed_tokens) for r in scheduled.scheduled for s in r.live]

    def _groups(self, scheduled: SchedulerOutput) -> dict[str, list[Sequence]]:
        """Return the rows of requests that may lose some to a step in flight before this one is back."""
        if self.executor.max_steps_in_flight == 1:
            return {}
        several = [r for r in scheduled.scheduled if len(r.live) > 1 and r.live[0].num_pending and not r.reparents]
        return {request.request_id: request.live.copy() for request in several}

    def _forget_in_flight(self, request: Request) -> None:
        """Ignore what steps in flight will bring for a request that has left: if it returns, it is computed anew."""
        for flight in self._in_flight:
            flight.dropped.add(request.request_id)

    def _await(self, flight: _Flight) -> StepResult:
        try:
            result = flight.handle.result()
        except StepOutOfMemoryError as error:
            return self._retreat(flight, error)
        except Exception as error:
            logger.warning("step %d failed: %s", self.step_count, error, exc_info=logger.isEnabledFor(logging.DEBUG))
            fault = self._step_error(error)
            self._take_back(flight, ending=flight.scheduled.scheduled)
            return StepResult(errors={request.request_id: fault for request in flight.scheduled.scheduled})
        except BaseException:
            self._take_back(flight)
            raise
        self._steps_in_memory += 1
        if self.budget is not self._full_budget and self._steps_in_memory >= self._steps_before_growth:
            self._set_token_budget(2 * self.budget.max_num_batched_tokens)
            self._has_grown = True
        return result

    def _retreat(self, flight: _Flight, error: StepOutOfMemoryError) -> StepResult:
        """Take back a step that the device's memory could not hold, and go on with steps of half its size.

        If the step was of one request alone and as small as a step can be, that request ends in the error. One that
        moved blocks as well was not: computed anew, they need not be moved.
        """
        scheduled = flight.scheduled
        logger.warning("a step of %d tokens ran out of memory: %s", scheduled.num_tokens, error)
        self._take_back(flight)
        if self._has_grown:
            self._steps_before_growth, self._has_grown = 2 * self._steps_before_growth, False
        least = max((request.width for request in scheduled.scheduled), default=1)
        alone, moved = len(scheduled.scheduled) == 1, bool(scheduled.swap_in or scheduled.swap_out)
        if alone and not moved and scheduled.num_tokens <= least:
            return StepResult(errors={scheduled.scheduled[0].request_id: error})
        # A step of several requests is cut even below the width of one: for those before it there is room yet.
        most = max(least, scheduled.num_tokens // 2)
        self._set_token_budget(most if alone else max(1, min(most, scheduled.num_tokens - 1)))
        return StepResult()

    def _take_back(self, flight: _Flight, ending: Collection[Request] = ()) -> None:
        """Undo a step of which nobody knows how far it came: all that runs is computed anew, but for what will end.

        So are those whose keys and values it was to move, and those that have left it since, if they go on.
        """
        scheduled = flight.scheduled
        left = [self.requests[request_id] for request_id in flight.dropped if request_id in self.requests]
        others = (*scheduled.preempted, *scheduled.resumed, *self.state.running)
        for request in dict.fromkeys([*left, *(request for request in others if request not in ending)]):
            if request.is_swapped or request in self.state.running:
                self._compute_anew(request)
        self._released = scheduled.released + self._released
        self._zero_blocks = scheduled.zero_blocks + self._zero_blocks

    def _compute_anew(self, request: Request) -> None:
        """Take all memory of a running or swapped request and queue it again."""
        own = {sequence.seq_id for sequence in request.live}
        if not request.is_swapped:
            # A fork that the executor has not seen yet is none of its sequences.
            self._released += own - self._forks.keys()
            self._forks = {child_id: fork for child_id, fork in self._forks.items() if child_id not in own}
            request.metrics.num_preemptions += 1
            self.reporter.num_preemptions += 1
            self._forget_in_flight(request)
            if request.wants_prompt_logprobs:
                request.prompt_logprobs.clear()
        self.state.requeue(request)
        self.reporter.on_request(request, RequestEvent.PREEMPTED)

    def _set_token_budget(self, num_tokens: int) -> None:
        full = self._full_budget
        self._steps_in_memory = 0
        cut = attrs.evolve(full, max_num_batched_tokens=num_tokens, chunked_prefill=True)
        self.budget = cut if num_tokens < full.max_num_batched_tokens else full

    def _guard(self) -> AbstractContextManager[object]:
        return nullcontext() if self._watchdog is None else self._watchdog

    def _step_error(self, error: Exception) -> Exception:
        if isinstance(error, FoloError) and not isinstance(error, StepTimeoutError):
            return error
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, StepTimeoutError):
            detail = f"it ran past step_timeout_s={self.components.config.step_timeout_s}"
        wrapped = FoloError(f"the step failed in {self.executor.current_part()}: {detail}")
        wrapped.__cause__ = error
        return wrapped

    def _update(self, flight: _Flight, result: StepResult, started: float) -> list[RequestOutput]:
        """Bring requests up to date with a step's result."""
        self.reporter.step += 1
        outputs = []
        for request_id, error in result.errors.items():
            if self._concerns(flight, request_id):
                outputs.append(self._end_early(self.requests[request_id], SequenceStatus.FINISHED_ERROR, error))
        for request, sequence, num_computed in flight.progress:
            if self._concerns(flight, request.request_id):
                self.state.kv.commit(sequence, num_computed)
        for request_id, candidates in result.prompt_logprobs.items():
            if self._concerns(flight, request_id):
                request = self.requests[request_id]
                found = [self.outputs.decode_candidates(c) for c in candidates]
                request.prompt_logprobs.extend(found if request.prompt_logprobs else [None, *found])
        now = time.monotonic()
        requests, dropped = self.requests, flight.dropped
        known = [s for s in result.samples if s.request_id in requests and s.request_id not in dropped]
        if flight.groups:
            known = [flight.remaining(sample) for sample in known]
        outputs += [self._apply(requests[sample.request_id], sample, now) for sample in known]
        self._learn_costs(flight.scheduled, result, time.perf_counter() - started)
        self.reporter.on_step(flight.scheduled, result, started)
        return [output for output in outputs if output is not None]

    def _learn_costs(self, scheduled: SchedulerOutput, result: StepResult, seconds: float) -> None:
        costs = self.state.costs
        if scheduled.num_tokens and not result.errors:
            costs.observe_step(scheduled.num_tokens, seconds - result.swap_seconds)
        costs.observe_swap(len(scheduled.swap_out) + len(scheduled.swap_in), result.swap_seconds)

    def _concerns(self, flight: _Flight, request_id: str) -> bool:
        return request_id in self.requests and request_id not in flight.dropped

    def _apply(self, request: Request, sample: RequestSample, now: float) -> RequestOutput | None:
        """Give a request's sequences their new tokens, end those that are done, and report."""
        if sample.is_plain and not self.reporter.follows_branches and not request.live[0].draft_token_ids:
            return self._apply_token(request, request.live[0], sample.tokens[0][0], now)
        before = request.live.copy()
        _arrive(before)
        if sample.is_reparented:
            return self._apply_reparented(request, sample, now)
        rows = self._reparent(request, sample)
        lengths = [len(sequence.data.output_token_ids) for sequence in rows] if self.reporter.follows_branches else []
        self._count_tokens(request, sample, now)
        request.metrics.num_draft_tokens += sample.num_drafts
        request.metrics.num_accepted_tokens += sum(sample.kept)
        for row, sequence in enumerate(rows):
            status = self.outputs.append(request, sequence, sample, row)
            if status is None and sample.finished is not None and sample.finished[row]:
                status = SequenceStatus.FINISHED_STOPPED
            if status is not None:
                self._close(request, sequence, status)
            elif sample.drafts is not None and row == sample.parents.index(sample.parents[row]):
                self._take_drafts(request, sequence, sample.drafts[row])
        if self.reporter.follows_branches:
            self.reporter.on_branches(request, sample, before, rows, lengths)
        if request.is_finished:
            return self._finish(request)
        if len(request.live) > request.width:
            return self._end_early(request, SequenceStatus.FINISHED_ERROR, self._too_wide(request))
        return self.outputs.output(request, rows, finished=False)

    def _count_tokens(self, request: Request, sample: RequestSample, now: float) -> None:
        request.metrics.record_tokens(now, max((len(tokens) for tokens in sample.tokens), default=0))
        if self._serves is not None:
            self._serves.on_tokens(request, sum(map(len, sample.tokens)))

    def _apply_token(self, request: Request, sequence: Sequence, token: int, now: float) -> RequestOutput | None:
        """Do what ``_apply`` does where a request's one sequence gets one token, and there is nothing else to it."""
        request.metrics.record_tokens(now, 1)
        if self._serves is not None:
            self._serves.on_tokens(request, 1)
        if sequence.num_pending:
            sequence.num_pending -= 1
        status = self.outputs.append_token(request, sequence, token)
        if status is not None:
            self._close(request, sequence, status)
            return self._finish(request)
        return self.outputs.output(request, [sequence], finished=False)

    def _apply_reparented(self, request: Request, sample: RequestSample, now: float) -> RequestOutput | None:
        """Do what ``_apply`` does where rows have been re-parented on the device, which may be a step ahead by now.

        Each sequence stands for a row. Where fewer rows go on than there were, a step that has begun with all of them
        is taken back, and the request is computed anew.
        """
        live, count = request.live, len(request.live)
        self._count_tokens(request, sample, now)
        ended = [self._end_child(request, sample, row) for row in range(count, len(sample.parents))]
        gone = [row for row in range(count) if sample.finished is not None and sample.finished[row]]
        sequences = live.copy()
        if len(gone) < count:
            self._continue_rows(request, sample)
        for row, sequence in enumerate(sequences):
            if row in gone:
                sequence.transition(SequenceStatus.FINISHED_ABORTED)
                self._release(sequence)
                live.remove(sequence)
            elif (status := self.outputs.append(request, sequence, sample, row)) is not None:
                self._close(request, sequence, status)
        if request.is_finished:
            return self._finish(request)
        if len(live) < count and live[0].num_pending:
            self._compute_anew(request)
        return self.outputs.output(request, [*live, *ended], finished=False)

    def _continue_rows(self, request: Request, sample: RequestSample) -> None:
        """Make each row of a request the one that it continues."""
        live = request.live
        parents = sample.parents[: len(live)]
        moved = [(row, parent) for row, parent in enumerate(parents) if row != parent]
        pasts = [live[parent].fork(seq_id=-1, index=-1, with_memory=False) for _, parent in moved]
        self.state.kv.regroup(live, parents, is_late=live[0].num_pending > 0)
        for (row, _), past in zip(moved, pasts, strict=True):
            live[row].continue_from(past)
        for row, sequence in enumerate(live):
            self._keep_numbers(sequence, sample, row)

    def _end_child(self, request: Request, sample: RequestSample, row: int) -> Sequence:
        """Make a sequence of a child that ends at once, and needs no memory."""
        parent = request.live[sample.parents[row]]
        child = request.fork_sequence(parent, next(self._seq_ids), with_memory=False)
        self._keep_numbers(child, sample, row)
        status = self.outputs.append(request, child, sample, row) or SequenceStatus.FINISHED_STOPPED
        child.transition(status)
        request.finished.append(child)
        return child

    def _too_wide(self, request: Request) -> FoloError:
        message = (
            f"request {request.request_id!r}: sampler {request.sampler!r} goes on with {len(request.live)} rows, "
            f"num_sequences of its {type(request.params).__name__} reserved {request.width}"
        )
        return FoloError(message)

    def _reparent(self, request: Request, sample: RequestSample) -> list[Sequence]:
        """Arrange the live sequences as the sampler says: each new row continues the row it names.

        The first child of a row goes on in its parent's place, further ones are forks, rows without a child end.
        Every row is settled then.
        """
        old = request.live.copy()
        if sample.parents == list(range(len(old))):
            for row, sequence in enumerate(old):
                self._settle_row(sequence, sample, row)
            return old
        rows: list[Sequence] = []
        first_child: dict[int, int] = {}
        for row, parent in enumerate(sample.parents):
            goes_on = first_child.setdefault(parent, row) == row
            rows.append(old[parent] if goes_on else self._fork(request, old[parent], sample, row))
        for row, sequence in enumerate(old):
            if row in first_child:  # not before its forks are made, which may keep more of what it has computed
                self._settle_row(sequence, sample, first_child[row])
            else:
                sequence.transition(SequenceStatus.FINISHED_ABORTED)
                self._release(sequence)
        request.live[:] = rows
        return rows.copy()

    def _fork(self, request: Request, parent: Sequence, sample: RequestSample, row: int) -> Sequence:
        """Return a new sequence that goes on as ``sample`` says of ``row``, and note it for the executor."""
        child = request.fork_sequence(parent, next(self._seq_ids))
        self._settle_row(child, sample, row)
        self._note_fork(request, parent.seq_id, child, child.num_tokens, sample.tokens[row])
        return child

    def _take_drafts(self, request: Request, sequence: Sequence, drafts: list[int]) -> None:
        """Have these guesses tried in the next step, as many as the answer has room for beside one more token."""
        length = len(sequence.data.output_token_ids)
        room = min((request.params.max_tokens or 0) - length, self.inputs.max_model_len - sequence.num_tokens) - 1
        sequence.draft_token_ids = list(itertools.takewhile(lambda token: token >= 0, drafts[: max(room, 0)]))

    def _note_fork(
        self, request: Request, parent_id: int, child: Sequence, num_tokens: int, tail: list[int] | None = None
    ) -> None:
        """Have the executor start ``child`` from ``num_tokens`` of its parent's tokens and a tail of its own."""
        fork = Fork(
            parent_id=parent_id,
            child_id=child.seq_id,
            request_id=request.request_id,
            index=child.index,
            num_tokens=num_tokens,
            tail=child.data.token_ids[num_tokens:] if tail is None else tail,
            num_computed=child.num_computed_tokens,
            blocks=[] if child.block_table is None else child.block_table.blocks.copy(),
            score=child.score,
            tag=child.tag,
        )
        self._forks[child.seq_id] = fork

    def _settle_row(self, sequence: Sequence, sample: RequestSample, row: int) -> None:
        """Keep of what was computed what holds with the row's tokens, and the strategy's numbers.

        Drafts that were not kept are forgotten; a row that appends nothing will run its newest token again. What
        steps in flight compute beyond this one stays.
        """
        valid = sequence.data.num_tokens + sequence.num_pending + sample.kept[row] - (not sample.tokens[row])
        if valid < sequence.num_computed_tokens:
            self.state.kv.truncate(sequence, valid)
        self._keep_numbers(sequence, sample, row)
        sequence.draft_token_ids.clear()

    @staticmethod
    def _keep_numbers(sequence: Sequence, sample: RequestSample, row: int) -> None:
        """Note the strategy's numbers of a row."""
        if sample.scores is not None:
            sequence.score = sample.scores[row]
        if sample.tags is not None:
            sequence.tag = sample.tags[row]

    def _close(self, request: Request, sequence: Sequence, status: SequenceStatus) -> list[int]:
        """End one sequence and return the blocks it held."""
        request.close_sequence(sequence, status)
        return self._release(sequence)

    def _release(self, sequence: Sequence) -> list[int]:
        # A fork that ends at once never was the executor's: it takes no place there.
        if self._forks.pop(sequence.seq_id, None) is None:
            self._released.append(sequence.seq_id)
        return self.state.kv.release(sequence)

    def _end_early(
        self, request: Request, status: SequenceStatus, error: Exception | None = None
    ) -> RequestOutput | None:
        """End all of a request's live sequences in ``status``."""
        held = []
        for sequence in request.live.copy():
            held += self._close(request, sequence, status)
        if status is SequenceStatus.FINISHED_ERROR:
            # A NaN in a freed block would reach its next owner through masked attention (0 * NaN).
            pool = self.state.kv.pool
            own = [block for block in dict.fromkeys(held) if pool.references(block) == 0]
            for block in own:
                pool.forget(block)
            self._zero_blocks += own
        return self._finish(request, error)

    def _finish(self, request: Request, error: Exception | None = None) -> RequestOutput | None:
        """Take a request whose sequences have all ended off the books and report it."""
        ranked = request.get_seqs()
        if all(s.status in (SequenceStatus.FINISHED_STOPPED, SequenceStatus.FINISHED_LENGTH_CAPPED) for s in ranked):
            try:
                ranked = self.executor.rank(request)
            except Exception as fault:  # noqa: BLE001 (a sampler plugin may raise anything)
                error = self._step_error(fault)
        self.state.waiting.remove(request.request_id)
        if request in self.state.running:
            self.state.running.remove(request)
        del self.requests[request.request_id]
        self._forget_in_flight(request)
        self.executor.remove_request(request.request_id)
        request.metrics.finished_time = time.monotonic()
        self.reporter.on_request(request, RequestEvent.FINISHED)
        output = self.outputs.output(request, ranked, finished=True, error=error)
        for sequence in request.get_seqs():
            self.outputs.forget(sequence)
        return output

    def _end_all(
        self, requests: Iterable[Request], status: SequenceStatus, error: Exception | None = None
    ) -> list[RequestOutput]:
        """End requests early and return the outputs that their callers want."""
        ended = [self._end_early(request, status, error) for request in requests]
        return [output for output in ended if output is not None]

    def _check_progress(self, scheduled: SchedulerOutput) -> list[RequestOutput]:
        """Fail one request by name if steps keep leading nowhere, so that the rest can go on."""
        if self._in_flight and not scheduled.seq_ids:
            return []  # the next step depends on what is on its way
        if not scheduled.seq_ids and self.budget is not self._full_budget:
            self._set_token_budget(2 * self.budget.max_num_batched_tokens)  # cut below the width of what is left to run
        if not self.requests or not self._stall.is_stalled(scheduled):
            return []
        culprit = find_culprit(self.state, scheduled)
        error = FoloError(describe(self.state, culprit, self.components.scheduler.name))
        return self._end_all([culprit], SequenceStatus.FINISHED_ERROR, error)


def _arrive(sequences: list[Sequence]) -> None:
    """Note that a token which was on its way for each sequence, if any was, is here."""
    for sequence in sequences:
        sequence.num_pending -= sequence.num_pending > 0


@attrs.frozen(slots=True)
class _Flight:
    """A submitted step, and the requests that have left it since."""

    scheduled: SchedulerOutput
    handle: StepHandle
    progress: list[tuple[Request, Sequence, int]]
    """Tokens of each sequence that are computed once the step is back."""
    groups: dict[str, list[Sequence]] = attrs.field(factory=dict)
    """The rows of requests that have several and run ahead."""
    dropped: set[str] = attrs.field(factory=set)

    def remaining(self, sample: RequestSample) -> RequestSample:
        """Return what a sample says of the rows that have not ended since the step was submitted."""
        rows = self.groups.get(sample.request_id)
        if rows is None or not any(sequence.is_finished for sequence in rows):
            return sample
        return sample.of_rows([row for row, sequence in enumerate(rows) if not sequence.is_finished])


class _FailedStep:
    """A step that could not even be submitted."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self) -> StepResult:
        raise self.error
