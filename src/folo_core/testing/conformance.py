"""Conformance checks that a plugin's author runs unchanged.

``pytest --folo-conformance folo-dice:dice`` runs them on an installed part without a test file. In a test file,
subclass, name the part, and let pytest collect it:

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
import importlib.util
import subprocess
import sys
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import pytest
import torch

from folo_core.kv_cache.manager import KVCacheManager
from folo_core.plugins.hookspecs import PROJECT
from folo_core.sampling.interface import LogitsProcessor
from folo_core.sampling_params import SamplingParams
from folo_core.scheduling.costs import PreemptionCosts
from folo_core.scheduling.interface import Scheduler, SchedulerState, StepBudget
from folo_core.testing.builders import logits_of, make_metadata, make_request
from folo_core.testing.harness import require
from folo_core.testing.installed import Installed, PartConformance
from folo_core.testing.sampler_conformance import SamplerConformance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from folo_core.plugins.registry import Part, Registry
    from folo_core.request import Request

__all__ = [
    "SUITES",
    "LogitsProcessorConformance",
    "PluginConformance",
    "SamplerConformance",
    "SchedulerConformance",
]

HEAVY = ("torch", "transformers", "triton", "ray")
"""Modules that an entry point must not import."""
FORBIDDEN = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
"""Modules that run code from data; nothing in a plugin imports them."""
_HELP_LENGTH = 120


class PluginConformance(Installed):
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

    def test_distribution_has_a_readme(self) -> None:
        """Whoever finds the distribution in an index reads what it is: a summary and a long description."""
        for entry in importlib_metadata.entry_points(group=PROJECT, name=self.plugin):
            require(entry.dist is not None, f"{self.plugin}: belongs to no distribution")
            about = importlib_metadata.metadata(entry.dist.name).json if entry.dist else {}
            for field, line in (("summary", 'description = "..."'), ("description", 'readme = "README.md"')):
                text = about.get(field)
                named = f"{about.get('name')}: its metadata has no {field}: add {line} under [project]"
                require(isinstance(text, str) and text.strip(), named)

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


class LogitsProcessorConformance(PartConformance):
    """A logits processor keeps its declarations and treats each row by itself."""

    kind: ClassVar[str] = "logits_processors"

    def params(self) -> list[SamplingParams]:
        """Parameters that make the processor apply, one row each; by default the spec's ``examples``."""
        examples = self.find().spec.examples
        if examples is None:
            pytest.skip("its spec has no examples: parameters that make the processor apply")
        return list(examples())

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


class SchedulerConformance(PartConformance):
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
        self._finish_all(scheduler, SchedulerState.empty(KVCacheManager(num_blocks=14, block_size=4), scheduler.order))

    def test_swapped_requests_come_back(self, part: Part) -> None:
        """The same when preempted requests move to the host: they wait like others and are admitted like others."""
        scheduler: Scheduler = part.build(self.config())
        kv = KVCacheManager(num_blocks=14, block_size=4, num_host_blocks=8)
        state = SchedulerState.empty(kv, scheduler.order, PreemptionCosts(mode="swap"))
        requests = self._finish_all(scheduler, state)
        require(any(request.metrics.num_swaps for request in requests), "nothing was swapped")

    def _finish_all(self, scheduler: Scheduler, state: SchedulerState) -> list[Request]:
        requests = self._requests()
        for request in requests:
            state.waiting.push(request)
        usable, preemptions = state.kv.pool.num_free, 0
        for _ in range(50 * self.num_requests):
            if state.is_idle:
                break
            state.kv.begin_step()
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
        return requests

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


SUITES: Mapping[str, type[PartConformance]] = {
    suite.kind: suite for suite in (SamplerConformance, LogitsProcessorConformance, SchedulerConformance)
}
"""Kind of part to the suite that judges it; other kinds are judged as part of their plugin only."""


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
