"""What a step costs in things that can be counted: calls, lines, operators and bytes. Seconds depend on the machine.

The engine's own costs are counted around a model without weights, the forward's on a tiny Llama, and they are kept
apart. ``step_costs.toml`` holds the most of each that is allowed; ``python bench/cost_bar.py --write`` measures anew.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import tomllib
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folo_core import LLM, SamplingParams, testing
from folo_core.engine.engine import Engine
from folo_core.testing.fakes import FakeModel, fake_components
from folo_hf.native import NativeLinears

BAR = Path(__file__).with_suffix(".toml")
TESTING = Path(testing.__file__).parent
STEPS = 16
"""Steps that a mean is taken over: as many as a block has tokens, so that each row takes one new block."""
HEADROOM = {
    "python_calls": 0.03,
    "builtin_calls": 0.03,
    "python_lines": 0.03,
    "python_peak_bytes": 0.3,  # a coverage tool's own objects are among them
    "torch_operators": 0.03,
    "torch_allocations": 0.03,
    "torch_bytes": 0.05,
}
OTHER_VERSION = 0.15
"""More room where Python or torch is of another minor version than the one that was measured."""
LOOSE = 0.7
"""A count below this share of what is allowed is worth a tighter bar."""
CASES = {"decode_1": (1, 16), "decode_8": (8, 16), "decode_32": (32, 16), "prefill_8": (8, 64)}
"""Requests, and tokens of each prompt. A prefill is the one step that runs all prompts."""

Costs = dict[str, dict[str, float]]


@cache
def _is_in_folo(code: CodeType) -> bool:
    """Whether the code is Folo's own, and not what it tests itself with."""
    path = Path(code.co_filename)
    packages = [module for name, module in sys.modules.items() if name.startswith("folo_") and "." not in name]
    folders = [Path(folder) for package in packages for folder in getattr(package, "__path__", [])]
    return any(map(path.is_relative_to, folders)) and not path.is_relative_to(TESTING)


@cache
def _is_ours(code: CodeType) -> bool:
    """Whether the code is Folo's own and makes a frame under every Python: a comprehension does not since 3.12."""
    return _is_in_folo(code) and not code.co_name.endswith("comp>")


class Counting:
    """Counts what runs, inside the model's forward or outside."""

    def __init__(self, model: Any) -> None:
        self.found: Counter[str] = Counter()
        self.in_forward = False
        self.only_forward = False
        forward = model.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.in_forward = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.in_forward = False

        model.forward = watched

    @property
    def counts(self) -> bool:
        return self.in_forward is self.only_forward

    @contextmanager
    def python(self) -> Iterator[None]:
        """Count calls, calls of builtins and lines of Folo's own code. A line again and again counts as one."""
        last: dict[FrameType, int] = {}

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            if not self.counts or event not in {"call", "c_call"}:
                return
            if event == "call" and _is_ours(frame.f_code):
                self.found["python_calls"] += 1
            elif event == "c_call":
                self.found["builtin_calls"] += _is_in_folo(frame.f_code)

        def lines(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line" and self.counts and last.get(frame) != frame.f_lineno:
                last[frame] = frame.f_lineno
                self.found["python_lines"] += 1
            elif event == "return":
                last.pop(frame, None)
            return lines

        before = sys.getprofile(), sys.gettrace()
        sys.setprofile(profile)
        sys.settrace(lambda frame, event, arg: lines if _is_ours(frame.f_code) else None)
        try:
            yield
        finally:
            sys.settrace(before[1])
            sys.setprofile(before[0])

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Add up how far a step's Python objects and arrays reach above what was there before."""
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        try:
            yield
            self.found["python_peak_bytes"] += tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()


class Operators(TorchDispatchMode):
    """Counts torch's operators, and what they allocate."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.counting.counts:
            self.names[str(func.overloadpacket)] += 1
            found = self.counting.found
            found["torch_operators"] += 1
            known = {_storage(given) for given in tree_leaves((args, kwargs)) if isinstance(given, torch.Tensor)}
            fresh = {_storage(made) for made in tree_leaves(result) if isinstance(made, torch.Tensor)} - known
            found["torch_allocations"] += len(fresh)
            found["torch_bytes"] += sum(size for _, size in fresh)
        return result


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.is_mkldnn:  # packed weights: no storage to look at
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def start(make: Callable[[int], Engine], case: str) -> Engine:
    """Return an engine that is about to run the steps of a case."""
    rows, length = CASES[case]
    engine = make(rows)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, output_kind="FINAL_ONLY")
    for row in range(rows):
        engine.add_request(f"row-{row}", [(7 * row + place) % 50 for place in range(length)], params)
    while case.startswith("decode") and engine.reporter.step < 4:
        engine.step()
    return engine


def measure(make: Callable[[int], Engine], case: str, *, forward: bool) -> tuple[dict[str, float], Counter[str]]:
    """Return a case's mean costs of a step, and its operators by name."""
    steps = STEPS if case.startswith("decode") else 1
    engine = start(make, case)
    found: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for way in ("python", "memory", "torch"):
        if steps == 1:
            engine = start(make, case)
        model: Any = engine.executor.runner.model
        counting = Counting(model)
        counting.only_forward = forward
        operators = Operators(counting)
        gc.collect()
        gc.disable()
        try:
            for _ in range(steps):
                with operators if way == "torch" else getattr(counting, way)():
                    outputs = engine.step()
                assert outputs == [], "a measured step ends no request"
        finally:
            gc.enable()
            del model.forward
        found.update(counting.found)
        names.update(operators.names)
    return {name: round(count / steps, 1) for name, count in found.items()}, names


def engine_costs() -> Costs:
    """Return the engine's own costs, without the model's."""
    return {case: measure(_fake_engine, case, forward=False)[0] for case in CASES}


def forward_costs(folder: Path, *, native: bool) -> Costs:
    """Return what the forward of the model in ``folder`` asks of torch. The tensors' sizes are the model's affair.

    Args:
        folder: of the model.
        native: through Folo's kernels, which must be compiled; otherwise as where there are none.
    """
    attention = "native" if native else "sdpa"
    with contextlib.nullcontext() if native else patch.object(NativeLinears, "applies", lambda *_: False):
        costs = {
            case: measure(lambda rows: _llama_engine(folder, rows, attention), case, forward=True)[0] for case in CASES
        }
    return {case: {name: found[name] for name in found if name.startswith("torch")} for case, found in costs.items()}


def _fake_engine(rows: int) -> Engine:
    options = {"max_num_seqs": rows, "num_blocks": 32 * rows + 1, "block_size": STEPS, "max_num_batched_tokens": 4096}
    return Engine(fake_components(FakeModel(), **options))


def _llama_engine(folder: Path, rows: int, attention: str) -> Engine:
    options = {"max_num_seqs": rows, "num_blocks": 32 * rows + 1, "block_size": STEPS, "max_num_batched_tokens": 4096}
    options |= {"dtype": "float32", "device": "cpu", "attention": attention}
    return LLM(str(folder), skip_tokenizer_init=True, **options).engine


def most_allowed(name: str, count: float) -> int:
    """Return the bar for what was counted: room for what differs between versions, and for one more of anything."""
    return max(math.floor(count) + 1, math.ceil(count * (1 + HEADROOM[name])))


def read_bar(part: str) -> Costs:
    """Return what is allowed of ``engine``, ``forward`` or ``forward_torch`` under the versions that run here."""
    bar = tomllib.loads(BAR.read_text(encoding="utf-8"))
    return {
        case: {name: limit * (1 + _version_room(name, bar["measured_with"])) for name, limit in limits.items()}
        for case, limits in bar[part].items()
    }


def _version_room(name: str, measured_with: dict[str, str]) -> float:
    here = versions()
    which = "torch" if name.startswith("torch") else "python"
    return 0.0 if here[which] == measured_with[which] else OTHER_VERSION


def versions() -> dict[str, str]:
    """Return the minor versions that counts depend on."""
    return {"python": "{}.{}".format(*sys.version_info), "torch": ".".join(torch.__version__.split(".")[:2])}


def too_dear(costs: Costs, allowed: Costs) -> list[str]:
    """Name every count above what is allowed; a case or a count without a bar is one, too."""
    return [
        f"{case}: {name}: {count:g} a step, allowed are {allowed.get(case, {}).get(name, 0):g}: make the step cheaper, "
        "or, if it must cost this, raise the bar with: python bench/cost_bar.py --write"
        for case, counts in costs.items()
        for name, count in counts.items()
        if count > allowed.get(case, {}).get(name, 0)
    ]


def too_loose(costs: Costs, allowed: Costs) -> list[str]:
    """Name every bar far above what is counted."""
    return [
        f"{case}: {name}: {costs[case].get(name, 0):g} a step, allowed are {limit:g}: tighten me with: "
        "python bench/cost_bar.py --write"
        for case, limits in allowed.items()
        for name, limit in limits.items()
        if costs[case].get(name, 0) + 1 < LOOSE * limit
    ]
