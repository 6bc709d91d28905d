"""How the conformance kit tries a sampler out: with which parameters, in which engine, and what it watches."""

from __future__ import annotations

import gc
import itertools
import sys
import zlib
from collections import Counter, deque
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folo_core.components import SamplerTable
from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.plugins.assembly import build_components
from folo_core.plugins.hookspecs import hookimpl
from folo_core.plugins.manager import load_registry
from folo_core.plugins.specs import SamplerSpec
from folo_core.sampling import rng
from folo_core.sampling_params import SamplingParams, SamplingType
from folo_core.testing.builders import logits_of
from folo_core.testing.fakes import FakeModel, FakePlugin, FakeTokenizer
from folo_core.testing.harness import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from folo_core.components import Components
    from folo_core.outputs import RequestOutput
    from folo_core.plugins.registry import Part
    from folo_core.request import Request
    from folo_core.sampling.interface import Sampler, SamplerContext, SamplerOutput
    from folo_core.sampling.metadata import SamplingMetadata
    from folo_core.sequence import Sequence as TokenSequence

_PLUGIN = "folo-conformance"
_FEWEST = 4
_BLOCK_SIZE = 4
_INSISTENCE = 8.0
_STATES = 509
_DEPTH = 4
"""How far ``mentions`` follows attributes and containers."""
_LONGEST_TRIAL = 300
"""Steps after which a trial of a few short requests counts as endless."""


def trial_params(spec: SamplerSpec) -> list[SamplingParams]:
    """Parameters to try: the spec's examples, then defaults that reach the sampler; four at least."""
    chosen = list(spec.examples()) if spec.examples is not None else []
    if spec.params_type is not SamplingParams:
        chosen += [spec.params_type(seed=7), spec.params_type()]
    if SamplingType.GREEDY in spec.sampling_types:
        chosen += [SamplingParams(temperature=0.0)]
    if SamplingType.RANDOM in spec.sampling_types:
        chosen += [SamplingParams(seed=7), SamplingParams(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01)]
    if SamplingType.FAN_OUT in spec.sampling_types:
        chosen += [SamplingParams(n=3, seed=7), SamplingParams(n=2, best_of=4, temperature=0.7)]
    chosen = chosen or [SamplingParams(seed=7), SamplingParams()]
    return chosen * -(-_FEWEST // len(chosen))


def repeating_logits(history: Sequence[int], vocab_size: int) -> torch.Tensor:
    """Logits, float32 ``[vocab_size]``, of a text that mostly repeats itself, so that most guesses at it come true."""
    logits = logits_of(history[-1:], vocab_size)
    if len(history) % 5:
        logits[history[-1] % 3 + 1] += _INSISTENCE
    return logits


class _RepeatingModel(FakeModel):
    """``repeating_logits`` as a model."""

    def logits_after(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the next token's logits, float32 ``[vocab]``, after these tokens."""
        return repeating_logits(tokens, self.info.vocab_size)


class FakeSideModel:
    """A second model without weights: logits that depend on the history alone, and keys that must be forgotten."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = 1 << 20
        self.num_computed_tokens = 0
        self.keys: set[Any] = set()
        # One look-up for all rows: what the fake does is counted as the sampler's work.
        self._table = torch.randn((_STATES, vocab_size), generator=torch.Generator().manual_seed(1))

    def logits(self, keys: Sequence[Any], histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the logits after each history, float32 ``[rows, vocab]``."""
        self.keys.update(keys)
        self.num_computed_tokens += sum(map(len, histories))
        rows = [zlib.crc32(repr(history).encode()) % len(self._table) for history in histories]
        return self._table[rows]

    def forget(self, key: Any) -> None:  # noqa: ANN401 (any hashable)
        """Drop one key."""
        self.keys.discard(key)

    def forget_request(self, request_id: str) -> None:
        """Drop every key of a request."""
        self.keys = {k for k in self.keys if k != request_id and not (isinstance(k, tuple) and k[:1] == (request_id,))}


def context_fields(spec: SamplerSpec, vocab_size: int) -> dict[str, Any]:
    """Fields of SamplerContext that the declared capabilities ask for; nothing more, so that a missing word shows."""
    fields: dict[str, Any] = {"tokenizer": None}
    if "needs-tokenizer" in spec.capabilities:
        fields["tokenizer"] = FakeTokenizer(vocab_size)
    if "needs-model" in spec.capabilities:
        fields["side_model"] = lambda _name: FakeSideModel(vocab_size)
    return fields


class Watched:
    """A sampler, with a note of what it does to rows."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.seen: Counter[str] = Counter()
        """How often rows were forked, pruned, held and drafted for."""
        self.pruned: dict[str, int] = {}
        """Rows dropped, by request."""
        self.most: dict[str, int] = {}
        """Most rows alive at once, by request."""

    def add_request(self, request: Request) -> None:
        """Pass on."""
        self.sampler.add_request(request)

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Pass on, and note what became of the rows."""
        drafted = [False] * len(logits) if metadata.drafts is None else (metadata.drafts >= 0).tolist()
        output = self.sampler.step(logits, metadata)
        first = dict.fromkeys((rows.start for _, rows in metadata.groups), True)
        sequences = list(itertools.accumulate(row in first or not drafted[row - 1] for row in range(len(drafted))))
        owners = dict(zip(sequences, metadata.request_ids, strict=True))
        rows = output.parents.tolist()
        children = Counter(sequences[row] for row in rows)
        self.seen["forks"] += sum(count > 1 for count in children.values())
        # A child behind a drafted token grows by that token, whatever else it appends.
        grows = (output.tokens >= 0).any(1).tolist()
        self.seen["holds"] += sum(
            not grown and not (row and drafted[row - 1]) for row, grown in zip(rows, grows, strict=True)
        )
        self.seen["drafts"] += 0 if output.drafts is None else int((output.drafts >= 0).any(1).sum())
        for sequence, request_id in owners.items():
            if sequence not in children:
                self.seen["prunes"] += 1
                self.pruned[request_id] = self.pruned.get(request_id, 0) + 1
        ended = [False] * len(rows) if output.finished is None else output.finished.tolist()
        going = [row for row, end in zip(rows, ended, strict=True) if not end]
        for request_id, count in Counter(metadata.request_ids[row] for row in going).items():
            self.most[request_id] = max(self.most.get(request_id, 0), count)
        return output

    def finish(self, request: Request) -> list[TokenSequence]:
        """Pass on."""
        return self.sampler.finish(request)

    def remove_request(self, request_id: str) -> None:
        """Pass on."""
        self.sampler.remove_request(request_id)


@attrs.frozen(slots=True, kw_only=True)
class _TriedParams(SamplingParams):
    """Stands in for the params class of the sampler under test."""


class _Offer:
    """A plugin that offers one sampler, as the kit wants it built."""

    __name__ = _PLUGIN

    def __init__(self, spec: SamplerSpec) -> None:
        self.spec = spec

    @hookimpl
    def folo_samplers(self) -> list[SamplerSpec]:
        """Offer it."""
        return [self.spec]


def trial_components(model: FakeModel, part: Part, *plugins: object, **options: Any) -> Components:  # noqa: ANN401 (engine options)
    """The parts of an engine around a fake model, with the configuration's sections that ``part`` asks for."""
    settings = {"model": "fake", "loader": "fake", "attention": "fake", "num_blocks": 512, "block_size": _BLOCK_SIZE}
    sections = {name: dict(section) for name, section in part.spec.example_sections.items()}
    config = EngineConfig.from_options(**(settings | options), plugins=sections)
    fake = FakePlugin(model, FakeTokenizer(model.info.vocab_size))
    return build_components(config, load_registry(extra=[fake, *plugins]))


class EngineTrial:
    """A real engine over a fake model, whose every request goes to the sampler under test."""

    def __init__(
        self,
        part: Part,
        params: Sequence[SamplingParams],
        *,
        num_blocks: int = 2048,
        new_tokens: int = 10,
        run_ahead: bool = False,
    ) -> None:
        self.part = part
        self.params = [fit_params(p, number, new_tokens) for number, p in enumerate(params)]
        self.model = _RepeatingModel() if "drafts" in part.spec.capabilities else FakeModel()
        self.samplers: list[Sampler] = []
        self.final: dict[str, RequestOutput] = {}
        self.outputs_seen = 0
        # Under a name and a params class of its own it clashes with nothing that is installed.
        spec = SamplerSpec(name="tried", help="under test", factory=self._build, params_type=_TriedParams)
        length = min(self.model.info.max_model_len, num_blocks * _BLOCK_SIZE)
        options = {"num_blocks": num_blocks, "max_model_len": length, "run_ahead": run_ahead}
        components = trial_components(self.model, part, _Offer(spec), **options)
        name = f"{_PLUGIN}:{spec.name}"
        require(self.samplers, f"{part.qualified_name}: its factory fails in an engine: see the log for the reason")
        claims = dict.fromkeys([*SamplingType, *{type(p) for p in self.params}], (name,))
        self.engine = Engine(attrs.evolve(components, sampler_table=SamplerTable(claims=claims)))
        self.pool = self.engine.state.kv.pool

    def _build(self, context: SamplerContext) -> Sampler:
        context = attrs.evolve(context, **context_fields(self.part.spec, context.vocab_size))
        self.samplers.append(self.part.spec.factory(context))
        return self.samplers[-1]

    @property
    def sampler(self) -> Sampler:
        """The sampler that the engine uses."""
        return self.samplers[-1]

    def add(self, numbers: Iterable[int]) -> EngineTrial:
        """Admit the requests with these numbers."""
        for number in numbers:
            self.engine.add_request(f"r{number}", prompt_of(number), self.params[number])
        return self

    def most_blocks(self) -> int:
        """Blocks that the greediest request needs: with fewer, it would be refused."""
        kv = self.engine.state.kv
        lengths = [(len(prompt_of(n)), len(prompt_of(n)) + (p.max_tokens or 0)) for n, p in enumerate(self.params)]
        needed = [kv.most_blocks(*length, p.num_sequences) for length, p in zip(lengths, self.params, strict=True)]
        return max(needed)

    def step(self) -> None:
        """Run a step and check the books."""
        for output in self.engine.step():
            if output.finished:
                require(output.request_id not in self.final, f"{output.request_id}: finished twice")
                self.final[output.request_id] = output
        self.engine.check_integrity()

    def run(self) -> EngineTrial:
        """Step until all requests are answered, without an error, and every block is back."""
        for _ in range(_LONGEST_TRIAL):
            if not self.engine.has_unfinished_requests:
                break
            self.step()
        unfinished = ", ".join(self.engine.requests)
        require(not unfinished, f"{unfinished}: not done after {_LONGEST_TRIAL} steps: its rows hold their blocks")
        free, total = self.pool.num_free, self.pool.num_usable
        require(free == total, f"all requests have ended, and {total - free} of {total} blocks are not back")
        return self

    def answers(self) -> dict[str, list[list[int]]]:
        """Each request's ranked token ids; a request that ended in an error is a failure."""
        for name, output in self.final.items():
            require(output.error is None, f"{name}: ended in an error: {output.error}")
        return {name: [list(o.token_ids) for o in output.outputs] for name, output in self.final.items()}


def prompt_of(number: int) -> list[int]:
    """Token ids of a trial's prompt; its first token tells whose it is."""
    return [number + 1, *range(20, 24 + number % 3)]


def fit_params(params: SamplingParams, number: int, new_tokens: int) -> SamplingParams:
    """The same parameters, seeded and for a short answer."""
    most = min(params.max_tokens or new_tokens, new_tokens)
    seed = 1000 + number if params.seed is None else params.seed
    return attrs.evolve(params, max_tokens=most, min_tokens=min(params.min_tokens, most), seed=seed)


def difference(one: Mapping[str, Any], other: Mapping[str, Any], first: str, second: str) -> str:
    """The first entry that differs, in words; empty if none does."""
    for name in one:
        if one[name] != other.get(name):
            return f"{name}: {first} {one[name]}, {second} {other.get(name)}"
    return ""


def mentions(value: object, request_id: str, *, depth: int = _DEPTH) -> str:
    """Where ``value`` still knows a request: a path of attributes such as ``.proposer.seen``, or nothing."""
    if depth == 0 or isinstance(value, torch.Tensor | type | str | bytes | int | float | None):
        return ""
    if isinstance(value, dict | set | frozenset | list | tuple | deque):
        members = [*value, *value.values()] if isinstance(value, dict) else list(value)
        known = any(_is_of(member, request_id) for member in members)
        deeper = (mentions(member, request_id, depth=depth - 1) for member in members)
        return "[]" if known or any(deeper) else ""
    for name, member in attributes(value):
        if _is_of(member, request_id):
            return f".{name}"
        if where := mentions(member, request_id, depth=depth - 1):
            return f".{name}{where.removesuffix('[]')}"
    return ""


def _is_of(value: object, request_id: str) -> bool:
    return value == request_id if isinstance(value, str) else getattr(value, "request_id", None) == request_id


def attributes(part: object) -> list[tuple[str, object]]:
    """Names and values of an object's attributes, slotted or not; none of modules and functions."""
    if callable(part) and not hasattr(part, "step") and not hasattr(part, "propose"):
        return []
    slots = {name for cls in type(part).__mro__ for name in getattr(cls, "__slots__", ())}
    names = slots | set(getattr(part, "__dict__", ()))
    return [(name, getattr(part, name)) for name in sorted(names) if hasattr(part, name)]


class _Operators(TorchDispatchMode):
    """Counts the operators that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 (torch's signature, here and below)
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        self.count += 1
        return func(*args, **(kwargs or {}))


@attrs.define
class Meter:
    """Wraps a sampler and counts the work of its steps: torch operators, or calls of functions."""

    sampler: Sampler
    unit: str
    """``operators`` or ``calls``."""
    count: int = 0
    rows: int = 0

    def add_request(self, request: Request) -> None:
        """Pass on."""
        self.sampler.add_request(request)

    def step(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Pass on, and count."""
        self.rows += len(logits)
        # Few random numbers are drawn in Python, many in tensors: one way for all, or the count would jump.
        with patch.object(rng, "_HOST_ROWS", 0):
            return (
                self._count_operators(logits, metadata)
                if self.unit == "operators"
                else self._count_calls(logits, metadata)
            )

    def _count_operators(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        with _Operators() as operators:
            output = self.sampler.step(logits, metadata)
        self.count += operators.count
        return output

    def _count_calls(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        def note(_frame: object, event: str, _argument: object) -> None:
            self.count += event in {"call", "c_call"}

        previous, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # a collection would call finalisers now and then
        sys.setprofile(note)
        try:
            return self.sampler.step(logits, metadata)
        finally:
            sys.setprofile(previous)
            if collects:
                gc.enable()

    def finish(self, request: Request) -> list[TokenSequence]:
        """Pass on."""
        return self.sampler.finish(request)

    def remove_request(self, request_id: str) -> None:
        """Pass on."""
        self.sampler.remove_request(request_id)
