"""Engines around a fake model, and samplers that fork and re-parent, for the tests in this folder."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from folo_core import LLM
from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.plugins import hookimpl
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import ExecutorSpec, LogitsProcessorSpec, ObserverSpec, SamplerSpec, SchedulerSpec
from folo_core.sampling.interface import SamplerOutput
from folo_core.sampling_params import SamplingParams
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer, fake_components

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from folo_core.outputs import RequestOutput


def make_engine(model: FakeModel | None = None, **options: Any) -> tuple[Engine, FakeModel]:
    model = FakeModel() if model is None else model
    return Engine(fake_components(model, **options)), model


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 8} | fields))


def run(engine: Engine, *, most_steps: int = 2000) -> dict[str, RequestOutput]:
    """Step until nothing is left; check the books after every step."""
    final: dict[str, RequestOutput] = {}
    for _ in range(most_steps):
        if not engine.has_unfinished_requests:
            break
        for output in engine.step():
            if output.finished:
                assert output.request_id not in final, "a request finishes once"
                final[output.request_id] = output
        engine.check_integrity()
    assert not engine.has_unfinished_requests, f"not done after {most_steps} steps"
    return final


def assert_clean(engine: Engine) -> None:
    """Nothing of any request is left: blocks here and on the host, queues, the runner's slots, sampler state."""
    engine.step()
    while engine._in_flight:
        engine.step()
    assert_blocks_back(engine)
    engine.check_integrity()
    runner = engine.executor.runner
    assert not engine.requests
    assert not engine.state.running
    assert not engine.state.waiting
    assert len(runner.batch) == 0
    assert not runner.requests
    assert not engine.outputs._sent
    assert not engine._forks


def assert_blocks_back(engine: Engine) -> None:
    """All blocks of the device are free but for cached ones, and all of the host are free."""
    kv = engine.state.kv
    assert kv.pool.num_free == kv.pool.num_usable - kv.pool.num_cached
    assert kv.index is not None or kv.pool.num_cached == 0
    assert kv.swap is None or kv.swap.pool.num_free == kv.swap.pool.num_usable


@attrs.frozen(slots=True, kw_only=True)
class TreeParams(SamplingParams):
    """Random forks, re-parentings and prunings among at most ``width`` rows."""

    width: int = attrs.field(default=4)

    @property
    def num_sequences(self) -> int:
        return self.width


class TreeSampler:
    """Each step gives every request a random number of rows with random parents; the tokens are each row's best."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.reparented = 0
        self.open: set[str] = set()

    def add_request(self, request: Any) -> None:
        self.open.add(request.request_id)

    def remove_request(self, request_id: str) -> None:
        self.open.discard(request_id)

    def step(self, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        parents: list[int] = []
        rows_of: dict[str, list[int]] = {}
        for row, request_id in enumerate(metadata.request_ids):
            rows_of.setdefault(request_id, []).append(row)
        for rows in rows_of.values():
            width = self.random.randint(1, metadata.params[rows[0]].width)
            chosen = [self.random.choice(rows) for _ in range(width)]
            self.reparented += chosen != rows
            parents += chosen
        index = torch.tensor(parents)
        # Children of one parent differ: the first takes its best token, the next its second best, and so on.
        places = [parents[:i].count(p) for i, p in enumerate(parents)]
        ranked = logits.argsort(dim=1, descending=True)
        tokens = torch.stack([ranked[p, place] for p, place in zip(parents, places, strict=True)])
        return SamplerOutput(parents=index, tokens=tokens[:, None])

    def finish(self, request: Any) -> list[Any]:
        return sorted(request.finished, key=lambda s: s.data.output_token_ids)


class SamplerPlugin:
    """Offers one sampler object under a params class."""

    def __init__(self, sampler: Any, params_type: type[SamplingParams] = TreeParams, name: str = "test") -> None:
        self.sampler, self.params_type, self.name = sampler, params_type, name
        self.__name__ = f"{name}-sampler"

    @hookimpl
    def folo_samplers(self) -> list[SamplerSpec]:
        return [
            SamplerSpec(name=self.name, help="for tests", factory=lambda *_: self.sampler, params_type=self.params_type)
        ]


class ProcessorPlugin:
    """Offers one logits processor made of two functions."""

    __name__ = "test-processor"
    argmax_invariant = False
    needs_history = False
    graph_safe = False

    def __init__(self, applies: Callable[[Any], bool], apply: Callable[..., torch.Tensor]) -> None:
        self.applies, self._apply = applies, apply

    def validate_params(self, params: Any, vocab_size: int) -> None:
        pass

    def apply(self, logits: torch.Tensor, metadata: Any) -> torch.Tensor:
        return self._apply(logits, metadata)

    @hookimpl
    def folo_logits_processors(self) -> list[LogitsProcessorSpec]:
        return [LogitsProcessorSpec(name="test", help="for tests", factory=lambda *_: self)]


class SchedulerPlugin:
    """Offers one scheduler object under the name ``test``."""

    __name__ = "test-scheduler"

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @hookimpl
    def folo_schedulers(self) -> list[SchedulerSpec]:
        return [SchedulerSpec(name="test", help="for tests", factory=lambda *_: self.scheduler)]


class _DeferredStep:
    """Runs all that was asked for before it, then itself, and then the removals that came before the next step."""

    def __init__(self, run: Callable[[], Any], waiting: list[Any]) -> None:
        self._run, self._waiting = run, waiting
        self._outcome: Callable[[], Any] | None = None

    def __call__(self) -> None:
        try:
            self._outcome = self._run().result
        except Exception as error:  # noqa: BLE001 (it belongs to whoever asks for the result)
            self._outcome = partial(_raise, error)

    def result(self) -> Any:
        while self._outcome is None or (self._waiting and not isinstance(self._waiting[0], _DeferredStep)):
            self._waiting.pop(0)()
        return self._outcome()


def _raise(error: Exception) -> None:
    raise error


class DeferredExecutor:
    """Keeps up to ``depth`` steps in flight: a step runs when its result is asked for, or a later one is submitted."""

    __name__ = "deferred"

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.most_in_flight = 0

    def build(self, parts: Any) -> Any:
        from folo_core.plugins.builtin import _in_process

        self.inner = _in_process(parts)
        self.inner.max_steps_in_flight = self.depth
        self._submit, self._remove = self.inner.submit, self.inner.remove_request
        self._waiting: list[Any] = []
        """Steps and removals that were asked for and not done yet: a device does them in this order."""
        self.inner.submit, self.inner.remove_request = self._defer, self._remove_later
        return self.inner

    def _defer(self, scheduled: Any) -> Any:
        step = _DeferredStep(partial(self._submit, scheduled), self._waiting)
        self._waiting.append(step)
        self.most_in_flight = max(self.most_in_flight, sum(isinstance(a, _DeferredStep) for a in self._waiting))
        return step

    def _remove_later(self, request_id: str) -> None:
        requests = self.inner.runner.requests
        request = requests.get(request_id)

        def remove() -> None:
            if requests.get(request_id) is request:  # its name may have been given to a newer one
                self._remove(request_id)

        self._waiting.append(remove) if self._waiting else remove()

    @hookimpl
    def folo_executors(self) -> list[ExecutorSpec]:
        return [ExecutorSpec(name="deferred", help="for tests", factory=self.build)]


class ObserverPlugin:
    """Records every step."""

    __name__ = "test-observer"

    def __init__(self) -> None:
        self.records: list[Any] = []

    def on_step(self, record: Any) -> None:
        self.records.append(record)

    @hookimpl
    def folo_observers(self) -> list[ObserverSpec]:
        return [ObserverSpec(name="test", help="for tests", factory=lambda *_: self)]


def watch_pasts(model: FakeModel) -> list[list[int]]:
    """Collect what the model reads from the blocks for every row that samples, step by step."""
    seen: list[list[int]] = []

    def edit(logits: torch.Tensor, pasts: Sequence[list[int]]) -> torch.Tensor:
        seen.extend(pasts)
        return logits

    model.edit_logits = edit
    return seen


def make_llm(model: FakeModel | None = None, *, plugins: Any = (), tokenizer: Any = None, **options: Any) -> LLM:
    model = FakeModel() if model is None else model
    plugin = FakePlugin(model, FakeTokenizer() if tokenizer is None else tokenizer)
    settings = {"model": "fake", "loader": "fake", "attention": "fake", "num_blocks": 256, "block_size": 4}
    config = EngineConfig.from_options(**(settings | options))
    return LLM.from_config(config, load_registry(extra=[plugin, *plugins]))


class TemplateTokenizer(FakeTokenizer):
    chat_template = "{{ messages }}"

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        if any(message["content"] == "boom" for message in conversation):
            message = "roles must alternate"
            raise ValueError(message)
        opening = "assistant: " if options["add_generation_prompt"] else ""
        return super().apply_chat_template(conversation) + opening
