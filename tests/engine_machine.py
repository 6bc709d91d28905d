"""A whole engine under every operation there is, over a model that can be computed without any memory.

The fake model reads its past through the block tables and the next token is a function of it. So the oracle is dense:
what the model read for a row must be that row's tokens, and a greedy answer must be what the model says of the prompt
alone. Nothing else in the engine is replaced.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from engines import DeferredExecutor, SamplerPlugin, TreeParams, TreeSampler, make_engine
from folo_core.errors import RequestError
from folo_core.sampling_params import SamplingParams
from searches import Beams, SearchParams, dense

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from folo_core.outputs import RequestOutput

TENANTS = ("", "a", "b")


class EngineMachine:
    """An engine short of memory, its requests and what should come of them."""

    def __init__(self, *, seed: int = 0, steps_in_flight: int = 1, **options: Any) -> None:
        self.random = random.Random(seed)
        self.sampler = TreeSampler()
        settings = {
            "num_blocks": 11,
            "block_size": 4,
            "max_model_len": 36,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 24,
            "swap_space": str(8 * 32),
            "enable_prefix_caching": True,
        }
        self.beams = Beams()
        plugins: list[object] = [SamplerPlugin(self.sampler), SamplerPlugin(self.beams, SearchParams, "beams")]
        if steps_in_flight > 1:
            plugins.append(DeferredExecutor(steps_in_flight))
            settings["executor"] = "deferred"
        self.engine, self.model = make_engine(plugins=plugins, **settings | options)
        if steps_in_flight == 1:  # else the model is ahead of what the engine knows
            self.model.edit_logits = self._check_pasts
        self.model.before_forward = self._fail
        self.failures = 0
        """Forward passes that are still to run out of memory."""
        self.expected: dict[str, tuple[list[int], int]] = {}
        """Prompt and length of the requests whose answers are known beforehand."""
        self.searches: dict[str, tuple[list[int], SearchParams]] = {}
        """Likewise prompt and parameters of searches."""
        self.stepped_after_abort: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self._ids = 0

    # --- operations -------------------------------------------------------------------------------------------------

    def add(self, prompt: list[int], max_tokens: int, priority: int, tenant: str) -> None:
        """Admit a greedy request, whose answer the model can tell."""
        name = self._name("g")
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(name, prompt, params, priority=priority, tenant=tenant)
        self.expected[name] = (prompt, max_tokens)
        self._note("add")

    def add_tree(self, prompt: list[int], width: int, max_tokens: int) -> None:
        """Admit a request that forks, re-parents and prunes at random."""
        params = TreeParams(width=width, max_tokens=max_tokens, ignore_eos=True)
        try:
            self.engine.add_request(self._name("t"), prompt, params)
        except RequestError as error:
            self._note(f"refused: {error.code}")
        else:
            self._note("add tree")

    def add_search(self, prompt: list[int], width: int, max_tokens: int) -> None:
        """Admit a beam search, of which the model can tell what it finds."""
        params, name = SearchParams(width=width, max_tokens=max_tokens, ignore_eos=True), self._name("s")
        try:
            self.engine.add_request(name, prompt, params)
        except RequestError as error:
            self._note(f"refused: {error.code}")
        else:
            self.searches[name] = prompt, params
            self._note("add search")

    def step(self) -> None:
        """Run a step; what ends is what was expected."""
        outputs = self.engine.step()
        for output in outputs:
            if output.finished:
                self._judge(output)

    def fork(self, number: int) -> None:
        """Branch a running request where it stands."""
        source = self._pick(number)
        if source is None or len(self.engine.requests) > 12:
            return
        request = self.engine.requests[source]
        row = number % len(request.live)
        taken = len(request.live[row].data.output_token_ids)
        if taken + 1 >= (request.params.max_tokens or 0):
            return
        name = self._name("f")
        self.engine.fork(source, name, at=number % (taken + 1), row=row)
        if source in self.expected:
            self.expected[name] = self.expected[source]
        self._note("fork")

    def abort(self, number: int) -> None:
        """End a request wherever it is; once more changes nothing."""
        name = self._pick(number)
        if name is not None:
            state = "swapped" if self.engine.requests[name].is_swapped else "other"
            outputs = self.engine.abort(name)
            assert [output.request_id for output in outputs] == [name]
            assert outputs[0].outputs[0].finish_reason in {"abort", "stop", "length"}
            assert self.engine.abort(name) == []
            self.expected.pop(name, None)
            self.searches.pop(name, None)
            self._note(f"abort {state}")

    def run_out(self, times: int) -> None:
        """Have the next forward passes run out of memory."""
        self.failures = times

    def reset(self) -> None:
        """Forget all beginnings."""
        self.engine.reset_prefix_cache()

    # --- what must hold ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The books of device and host, the queues, and the limits of a step."""
        engine, state = self.engine, self.engine.state
        engine.check_integrity()
        running, waiting = list(state.running), list(state.waiting)
        ids = [request.request_id for request in (*running, *waiting)]
        assert len(ids) == len(set(ids)), "a request is in one queue"
        assert set(ids) == set(engine.requests)
        assert state.num_running_seqs <= engine.budget.max_num_seqs
        assert running == sorted(running, key=engine.scheduler.order)
        for request in waiting:
            on_host = any(sequence.host_blocks for sequence in request.live)
            assert on_host == request.is_swapped
            assert all(sequence.block_table is None for sequence in request.live)
        assert not any(sequence.host_blocks for request in running for sequence in request.live)

    def finish(self, most_steps: int = 4000) -> None:
        """Everything ends, and all memory is back."""
        self.failures = 0
        for _ in range(most_steps):
            if not self.engine.has_unfinished_requests:
                break
            self.step()
            self.check()
        assert not self.engine.has_unfinished_requests, "the oldest request always finishes"
        for _ in range(3):
            self.engine.step()
        kv, runner = self.engine.state.kv, self.engine.executor.runner
        kv.begin_step()
        assert kv.pool.num_available == kv.pool.num_usable
        assert kv.swap is None or kv.swap.pool.num_free == kv.swap.pool.num_usable
        assert len(runner.batch) == 0
        assert not runner.requests
        assert not self.sampler.open
        assert not self.expected
        assert not self.searches

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _judge(self, output: RequestOutput) -> None:
        reasons = {completion.finish_reason for completion in output.outputs}
        known = self.expected.pop(output.request_id, None)
        search = self.searches.pop(output.request_id, None)
        if output.error is not None:
            assert "ran out" in str(output.error) or "no room" in str(output.error), output.error
            self._note("ended for want of memory")
            return
        assert reasons <= {"length", "stop"}, reasons
        if known is not None:
            prompt, length = known
            answer, tokens = output.outputs[0].token_ids, list(prompt)
            for token in answer:
                assert token == int(self.model.logits_after(tokens).argmax()), "the dense model's token"
                tokens.append(token)
            assert len(answer) == length
        if search is not None:
            found = [(completion.token_ids, completion.score) for completion in output.outputs]
            assert found == dense(self.beams, self.model.logits_after, *search), "what the search finds"
            self._note("search found")
        self._note("finished")

    def _check_pasts(self, logits: torch.Tensor, pasts: list[list[int]]) -> torch.Tensor:
        live = {tuple(s.data.token_ids) for request in self.engine.requests.values() for s in request.live}
        for past in pasts:
            assert tuple(past) in live, "the model reads some sequence's tokens, in order, and nothing else"
        return logits

    def _fail(self, input_ids: torch.Tensor) -> None:
        if self.failures:
            self.failures -= 1
            self._note("out of memory")
            raise MemoryError(f"no room for {len(input_ids)} tokens")

    def _pick(self, number: int) -> str | None:
        names = list(self.engine.requests)
        return names[number % len(names)] if names else None

    def _name(self, kind: str) -> str:
        self._ids += 1
        return f"{kind}{self._ids}"

    def _note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def _prompt(r: random.Random) -> list[int]:
    """Return a prompt; half of them begin like one of two others."""
    own = [r.randrange(60) for _ in range(r.randint(1, 10))]
    return own if r.random() < 0.5 else [r.randrange(2) + 1] * r.choice([4, 8, 12]) + own


OPERATIONS: list[tuple[int, Callable[[EngineMachine, random.Random], None]]] = [
    (10, lambda m, r: m.add(_prompt(r), r.randint(1, 12), r.randrange(3), r.choice(TENANTS))),
    (4, lambda m, r: m.add_tree(_prompt(r), r.randint(1, 3), r.randint(1, 6))),
    (4, lambda m, r: m.add_search(_prompt(r), r.randint(1, 3), r.randint(1, 9))),
    (60, lambda m, r: m.step()),
    (3, lambda m, r: m.fork(r.randrange(64))),
    (3, lambda m, r: m.abort(r.randrange(64))),
    (1, lambda m, r: m.run_out(r.randint(1, 2))),
    (1, lambda m, r: m.reset()),
]


def run_randomly(machine: EngineMachine, count: int, seed: int) -> None:
    """Make ``count`` random operations, each followed by a check of everything."""
    generator = random.Random(seed)
    weights = [weight for weight, _ in OPERATIONS]
    operations = [operation for _, operation in OPERATIONS]
    for operation in generator.choices(operations, weights, k=count):
        if len(machine.engine.requests) > 20:
            machine.step()
        else:
            operation(machine, generator)
        machine.check()
