"""Conformance checks that a plugin's author runs unchanged: subclass, name the part, and let pytest collect it.

    from folo_core.testing.conformance import PluginConformance, SamplerConformance

    class TestPlugin(PluginConformance):
        plugin = "folo-dice"

    class TestSampler(SamplerConformance):
        plugin = "folo-dice"
        name = "dice"

The checks test what the engine relies on and cannot see from outside in time; that a strategy decodes *well*
remains for the author's own tests.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import subprocess
import sys
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest
import torch

from folo_core.errors import ParamsError
from folo_core.kv_cache.manager import KVCacheManager
from folo_core.plugins.fields import own_fields
from folo_core.plugins.hookspecs import PROJECT
from folo_core.plugins.manager import load_registry
from folo_core.sampling.interface import LogitsProcessor, Sampler
from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.interface import Scheduler, SchedulerState, StepBudget
from folo_core.scheduling.queue import RequestQueue
from folo_core.testing.builders import logits_of, make_context, make_metadata, make_request
from folo_core.testing.harness import SamplerHarness, require

if TYPE_CHECKING:
    from folo_core.plugins.registry import Part, Registry

HEAVY = ("torch", "transformers", "triton", "ray")
"""Modules that an entry point must not import."""
FORBIDDEN = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
"""Modules that run code from data; nothing in a plugin imports them."""
_HELP_LENGTH = 120


class _Installed:
    """What every check starts from: the plugin as it is installed."""

    plugin: ClassVar[str]
    """The entry point's name."""

    @pytest.fixture
    def registry(self) -> Registry:
        """All installed plugins, with this one loaded even where autoload is off."""
        return _load(self.plugin)


class _PartConformance(_Installed):
    kind: ClassVar[str]
    name: ClassVar[str]
    """The part's bare name."""
    vocab_size: ClassVar[int] = 37

    @pytest.fixture
    def part(self, registry: Registry) -> Part:
        """The part under test."""
        return registry.get(self.kind, f"{self.plugin}:{self.name}")


class PluginConformance(_Installed):
    """A plugin as a whole: it loads, it is light, it is described, and it runs no code from data."""

    def test_every_part_is_described(self, registry: Registry) -> None:
        """Help is one line; capabilities are words."""
        parts = [part for plugin in registry.plugins if plugin.name == self.plugin for part in plugin.parts]
        require(parts, f"{self.plugin}: offers no part")
        for part in parts:
            text = part.spec.help
            one_line = text == text.strip() and "\n" not in text and len(text) <= _HELP_LENGTH
            require(one_line, f"{part.qualified_name}: help: {text!r}: use one line, {_HELP_LENGTH} characters at most")
            words = sorted(map(repr, part.spec.capabilities))
            strings = all(isinstance(word, str) for word in part.spec.capabilities)
            require(strings, f"{part.qualified_name}: capabilities: {words}: use strings")

    def test_every_hook_has_a_docstring(self, registry: Registry) -> None:
        """Each hook implementation says what it offers."""
        for plugin in registry.plugins:
            for caller in registry.plugin_manager.get_hookcallers(plugin.plugin_object) or []:
                if plugin.name == self.plugin:
                    function = getattr(plugin.plugin_object, caller.name)
                    require((function.__doc__ or "").strip(), f"{caller.name}: add a docstring")

    def test_import_is_light(self) -> None:
        """The entry point's module leaves heavy modules to the factories."""
        code = (
            "import sys; from importlib.metadata import entry_points\n"
            f"entries = entry_points(group={PROJECT!r}, name={self.plugin!r}); assert entries\n"
            "[entry.load() for entry in entries]\n"
            f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
        require(done.returncode == 0, f"{self.plugin}: a fresh process cannot import it:\n{done.stderr}")
        heavy = done.stdout.strip()
        require(not heavy, f"{self.plugin}: its entry point imports {heavy}: import it inside the factories")

    def test_source_runs_no_code_from_data(self) -> None:
        """No pickle, no torch.load, no trust_remote_code=True, in any module of the plugin's package."""
        sources = list(_sources(self.plugin))
        require(sources, f"{self.plugin}: no source was found to read")
        problems = [f"{path.name}:{line}: {what}" for path in sources for line, what in _dangers(path)]
        require(not problems, "; ".join(problems))


class SamplerConformance(_PartConformance):
    """A sampler keeps the contract of ``folo_core.sampling.interface.Sampler`` over whole lives of requests."""

    kind: ClassVar[str] = "samplers"
    steps: ClassVar[int] = 6

    def params(self, part: Part) -> list[SamplingParams]:
        """Parameters to try, one request each; override to try more than the defaults."""
        return [part.spec.params_type()] * 4

    def build(self, part: Part) -> Sampler:
        """A fresh sampler."""
        sampler: Sampler = part.build(make_context(vocab_size=self.vocab_size))
        return sampler

    def outputs(self, part: Part, numbers: list[int], **harness: Any) -> dict[str, list[list[int]]]:  # noqa: ANN401
        """Run the requests with these numbers together, in this order, in a fresh sampler."""
        params = self.params(part)
        requests = [make_request(f"r{n}", params[n], prompt=range(1, 2 + n)) for n in numbers]
        return SamplerHarness(self.build(part), self.vocab_size, **harness).run(requests, self.steps)

    def test_params_are_sound(self, part: Part) -> None:
        """A params class of the strategy's own is frozen, documented, has defaults and refuses wrong types and NaN."""
        params_type = part.spec.params_type
        require(issubclass(params_type, SamplingParams), f"{params_type.__name__}: must subclass SamplingParams")
        own = own_fields(params_type)
        require((params_type.__doc__ or "").strip(), f"{params_type.__name__}: add a docstring")
        for field in own:
            where = f"{params_type.__name__}.{field['name']}"
            require(not field["required"], f"{where}: give it a default")
            require(field["doc"], f"{where}: put a docstring under it")
            for nonsense in (object(), float("nan")):
                with pytest.raises(ParamsError, match=field["name"]):
                    params_type(**{field["name"]: nonsense})
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            params_type().temperature = 0.5

    def test_is_a_sampler(self, part: Part) -> None:
        """The factory returns an object with the four methods."""
        require(isinstance(self.build(part), Sampler), "the factory's result lacks a method of Sampler")

    def test_outputs_have_the_right_shape(self, part: Part) -> None:
        """Every step's tensors keep the contract, and each request gets at least one answer that grew."""
        outputs = self.outputs(part, list(range(len(self.params(part)))))
        for name, answers in outputs.items():
            require(answers and any(answers), f"{name}: no answer with a token after {self.steps} steps: {answers}")

    def test_same_seed_gives_the_same_tokens(self, part: Part) -> None:
        """Two fresh samplers agree."""
        numbers = list(range(len(self.params(part))))
        require(self.outputs(part, numbers) == self.outputs(part, numbers), "two runs with the same seeds differ")

    def test_neighbours_do_not_matter(self, part: Part) -> None:
        """A request gets the same tokens alone as in a batch."""
        numbers = list(range(len(self.params(part))))
        together = self.outputs(part, numbers)
        alone = {name: tokens for n in numbers for name, tokens in self.outputs(part, [n]).items()}
        require(together == alone, f"alone {alone}, in one batch {together}: a row reads its neighbours")

    def test_order_does_not_matter(self, part: Part) -> None:
        """A request gets the same tokens wherever its rows stand."""
        numbers = list(range(len(self.params(part))))
        shuffled = random.Random(7).sample(numbers, len(numbers))  # noqa: S311 (a shuffle)
        for order in (numbers[::-1], shuffled):
            require(self.outputs(part, numbers) == self.outputs(part, order), f"order {order} changes tokens")

    def test_late_arrival_does_not_matter(self, part: Part) -> None:
        """A request that joins a running batch gets the tokens it gets alone."""
        params = self.params(part)
        harness = SamplerHarness(self.build(part), self.vocab_size)
        early, late = make_request("early", params[0]), make_request("late", params[-1])
        harness.add(early)
        harness.step()
        harness.add(late)
        for _ in range(self.steps):
            harness.step()
        harness.end(early)
        expected = SamplerHarness(self.build(part), self.vocab_size).run([make_request("late", params[-1])], self.steps)
        require(harness.end(late) == expected["late"], "joining a running batch changes tokens")

    def test_masked_tokens_are_never_chosen(self, part: Part) -> None:
        """A token whose logit is -inf has probability 0."""

        def odd_masked(history: Any, vocab_size: int) -> torch.Tensor:  # noqa: ANN401
            logits = logits_of(history, vocab_size)
            logits[1::2] = -torch.inf
            return logits

        outputs = self.outputs(part, list(range(len(self.params(part)))), logits_of=odd_masked)
        chosen = {token for answers in outputs.values() for answer in answers for token in answer}
        require(chosen and all(token % 2 == 0 for token in chosen), f"masked tokens were chosen: {sorted(chosen)}")

    def test_ended_requests_leave_no_state(self, part: Part) -> None:
        """After ``remove_request`` nothing is kept under the request's id, and the id can come again."""
        sampler = self.build(part)
        params = self.params(part)[0]
        first = SamplerHarness(sampler, self.vocab_size).run([make_request("again", params)], self.steps)
        kept = [name for name, value in _state(sampler) if isinstance(value, dict | set | list) and "again" in value]
        require(not kept, f"after remove_request the id is still in {', '.join(kept)}")
        second = SamplerHarness(sampler, self.vocab_size).run([make_request("again", params)], self.steps)
        require(first == second, "the same request gives other tokens the second time")


class LogitsProcessorConformance(_PartConformance):
    """A logits processor keeps its declarations and treats each row by itself."""

    kind: ClassVar[str] = "logits_processors"

    def params(self) -> list[SamplingParams]:
        """Parameters that make the processor apply, one row each."""
        raise NotImplementedError

    def build(self, part: Part) -> LogitsProcessor:
        """A fresh processor."""
        processor: LogitsProcessor = part.build(self.vocab_size, torch.device("cpu"))
        return processor

    def apply(self, part: Part, rows: list[int]) -> torch.Tensor:
        """Edited logits of the given rows of one fixed batch, float32 ``[len(rows), vocab_size]``."""
        processor, params = self.build(part), self.params()
        histories = [[(3 * n + i) % self.vocab_size for i in range(4 + n)] for n in rows]
        metadata = make_metadata(
            [params[n] for n in rows],
            vocab_size=self.vocab_size,
            request_ids=[f"r{n}" for n in rows],
            histories=histories,
            prompt_lengths=[2] * len(rows),
        )
        metadata.history = histories if processor.needs_history else None
        return processor.apply(self.logits(rows), metadata)

    def logits(self, rows: list[int]) -> torch.Tensor:
        """The same batch before the edit."""
        return torch.stack([logits_of([n], self.vocab_size) for n in rows])

    def test_declares_itself(self, part: Part) -> None:
        """The three flags are booleans, and ``applies`` tells those that need the processor from those that do not."""
        processor = self.build(part)
        require(isinstance(processor, LogitsProcessor), "the factory's result lacks a member of LogitsProcessor")
        for flag in ("argmax_invariant", "needs_history", "graph_safe"):
            require(isinstance(getattr(processor, flag), bool), f"{flag}: must be True or False")
        require(all(processor.applies(p) is True for p in self.params()), "applies: must be True for params()")
        for params in self.params():
            processor.validate_params(params, self.vocab_size)

    def test_result_has_the_right_shape(self, part: Part) -> None:
        """Float32 of the same shape, without NaN, and different from the input: an edit happened."""
        rows = list(range(len(self.params())))
        edited, before = self.apply(part, rows), self.logits(rows)
        require(edited.dtype == torch.float32 and edited.shape == before.shape, f"{edited.dtype} {list(edited.shape)}")
        require(not edited.isnan().any(), "the result holds NaN")
        require(not torch.equal(edited, before), "nothing was edited: choose params() that have an effect")

    def test_rows_are_independent(self, part: Part) -> None:
        """A row is edited alike alone, in a batch, and in another order."""
        rows = list(range(len(self.params())))
        together, reversed_rows = self.apply(part, rows), self.apply(part, rows[::-1])
        for row in rows:
            require(torch.equal(together[row], self.apply(part, [row])[0]), f"row {row} differs when alone")
            require(torch.equal(together[row], reversed_rows[-1 - row]), f"row {row} differs in another order")

    def test_argmax_invariance_is_true(self, part: Part) -> None:
        """A processor that says it keeps the most likely token keeps it."""
        rows = list(range(len(self.params())))
        if self.build(part).argmax_invariant:
            edited, before = self.apply(part, rows), self.logits(rows)
            require(torch.equal(edited.argmax(-1), before.argmax(-1)), "argmax_invariant, but the argmax changed")


class SchedulerConformance(_PartConformance):
    """A scheduler keeps its budget and finishes everything, though memory is short."""

    kind: ClassVar[str] = "schedulers"
    num_requests: ClassVar[int] = 9
    budget: ClassVar[StepBudget] = StepBudget(max_num_batched_tokens=16, max_num_seqs=4, max_chunk_tokens=8)
    new_tokens: ClassVar[int] = 10

    def config(self) -> Any:  # noqa: ANN401 (SchedulerConfig, whose module is imported late)
        """The configuration that the factory gets."""
        from folo_core.config import SchedulerConfig

        return SchedulerConfig(policy=f"{self.plugin}:{self.name}")

    def test_is_a_scheduler(self, part: Part) -> None:
        """The factory returns an object with both methods, and its keys can be sorted."""
        scheduler = part.build(self.config())
        require(isinstance(scheduler, Scheduler), "the factory's result lacks a method of Scheduler")
        requests = self._requests()
        require(len(sorted(requests, key=scheduler.order)) == len(requests), "order: keys must compare")

    def test_everything_finishes_within_budget(self, part: Part) -> None:
        """Each step keeps the budget and moves on; blocks balance; everyone finishes and the pool is whole again."""
        scheduler: Scheduler = part.build(self.config())
        state = SchedulerState(kv=KVCacheManager(num_blocks=14, block_size=4), waiting=RequestQueue(scheduler.order))
        requests = self._requests()
        for request in requests:
            state.waiting.push(request)
        usable, preemptions = state.kv.pool.num_free, 0
        for _ in range(50 * self.num_requests):
            if not (state.waiting or state.running):
                break
            output = scheduler.schedule(state, self.budget)
            preemptions += len(output.preempted)
            require(output.num_tokens > 0, f"{len(state.waiting)} requests wait, and a step runs nothing")
            require(output.num_tokens <= self.budget.max_num_batched_tokens, f"step of {output.num_tokens} tokens")
            require(state.num_running_seqs <= self.budget.max_num_seqs, f"{state.num_running_seqs} sequences run")
            state.kv.check_integrity(sequence for request in requests for sequence in request.live)
            self._advance(state, output.seq_ids, output.samples)
        require(all(request.is_finished for request in requests), "some request never finished")
        require(state.kv.pool.num_free == usable, "blocks were lost")
        require(preemptions, "memory was never short: this check has shown less than it should")

    def _requests(self) -> list[Any]:
        requests = []
        for number in range(self.num_requests):
            params = SamplingParams(max_tokens=self.new_tokens)
            request = make_request(f"r{number}", params, prompt=range(1, 4 + 3 * (number % 4)))
            request = attrs.evolve(request, arrival=number, priority=number % 2)
            request.open_sequence(number)
            requests.append(request)
        return requests

    def _advance(self, state: SchedulerState, seq_ids: list[int], samples: list[bool]) -> None:
        """Give each sampled sequence a token and end those that have enough."""
        from folo_core.sequence import SequenceStatus

        sampled = {seq_id for seq_id, samples_now in zip(seq_ids, samples, strict=True) if samples_now}
        for request in list(state.running):
            for sequence in [s for s in request.live if s.seq_id in sampled]:
                sequence.add_token_id(1)
                if len(sequence.data.output_token_ids) == self.new_tokens:
                    state.kv.release(sequence)
                    request.close_sequence(sequence, SequenceStatus.FINISHED_LENGTH_CAPPED)
                    state.running.remove(request)


@functools.cache
def _load(plugin: str) -> Registry:
    registry = load_registry(extra=[plugin])
    problems = [str(broken) for broken in registry.broken if broken.name == plugin]
    require(not problems, "\n".join(problems))
    names = [loaded.name for loaded in registry.plugins]
    require(plugin in names, f"plugin {plugin!r} is not installed; installed: {', '.join(names)}")
    return registry


def _sources(plugin: str) -> list[Path]:
    """Every Python file of the package that holds the plugin's entry point."""
    entries = importlib_metadata.entry_points(group=PROJECT, name=plugin)
    found: list[Path] = []
    for package in {entry.module.partition(".")[0] for entry in entries}:
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        found += [path for place in places for path in sorted(Path(place).rglob("*.py"))]
        if spec and not places and spec.origin:
            found.append(Path(spec.origin))
    return found


def _dangers(path: Path) -> list[tuple[int, str]]:
    """Line and description of everything in a file that could run code from data."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, f"imports {a.name}") for a in node.names if a.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append((node.lineno, f"imports from {node.module}"))
        elif isinstance(node, ast.Attribute) and node.attr == "load" and getattr(node.value, "id", "") == "torch":
            found.append((node.lineno, "torch.load: use safetensors"))
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not _is_false(node.value):
            found.append((node.value.lineno, "trust_remote_code"))
    return found


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _state(part: object) -> list[tuple[str, object]]:
    """Names and values of an object's attributes, slotted or not."""
    slots = {name for cls in type(part).__mro__ for name in getattr(cls, "__slots__", ())}
    names = slots | set(getattr(part, "__dict__", ()))
    return [(name, getattr(part, name)) for name in sorted(names) if hasattr(part, name)]
