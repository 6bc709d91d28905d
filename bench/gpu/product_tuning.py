"""Finds how the joined products of a decoder layer are best cut up (``folo_kernels.gpu.products``).

Every candidate is timed inside a CUDA graph over more weights than the caches hold, against torch's product and the
kernels that joining makes needless. The table is printed as ``folo_kernels.gpu.product_configs`` holds it, used for
what this process times afterwards, and written with all times to ``products.json`` in the folder that OUT names.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import attrs
import torch
from torch.nn import functional

from folo_kernels.gpu import layers as kernels
from folo_kernels.gpu import product_configs, products
from folo_kernels.gpu.product_configs import Part, ProductConfig, config_for
from graph_times import DEVICE, MODELS, microseconds, ones, random, weights_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from graph_times import Shape

EPSILON = 1e-6
POSITIONS, BLOCK_SIZE = 4096, 16
ROWS = {"A": (8, 16, 32, 64, 96, 128, 160, 192, 224, 256), "B": (8, 16, 32, 64)}
PARTS: tuple[Part, ...] = get_args(Part)
BLOCK_ROWS = {16: (16,), 32: (32, 16), 64: (64, 32), 128: (128, 64), 1 << 20: (128, 64)}
"""Rows of a tile worth trying, for up to so many rows."""
BLOCK_OUTPUTS, BLOCK_INPUTS, SPLITS = (32, 64, 128), (64, 128), (1, 2, 4, 8)
PROGRAMS = 72, 400
"""Fewer leave processors idle, more are no better cut up."""
LARGEST_TILE = 128 * 128
SHARED_BYTES = 220 * 1024
STAGES = {64: 5, 128: 4}
TURNS = 6
LATE = "no time was left to compile it"
SHARES, REFINING = {"A": 0.5, "B": 0.9}, 0.7
"""Shares of the time after which no candidate of a model is compiled any more, and no variant of a best one."""


@attrs.frozen(kw_only=True)
class Case:
    """One product at one number of rows."""

    model: str
    part: Part
    rows: int
    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        """Tiles of weights that a program reads for its outputs."""
        return 2 if self.part in {"gate_up", "rotated"} else 1

    def candidates(self) -> list[ProductConfig]:
        """Configurations worth trying."""
        tall = next(blocks for most, blocks in BLOCK_ROWS.items() if self.rows <= most)
        if self.model != "A":
            # Few are likely to gain anything. Many rows are bound by operations, which large tiles do most of.
            tall = tall[:1] if self.rows <= LARGEST_TILE // 128 else (256, 128)
        outputs = (MODELS[self.model].size // 2,) if self.part == "rotated" else BLOCK_OUTPUTS
        found = [
            ProductConfig(*sizes, splits, 8 if sizes[0] * sizes[1] * self.weights >= LARGEST_TILE else 4, stages)
            for sizes in itertools.product(tall, outputs, BLOCK_INPUTS)
            for splits in SPLITS
            if (stages := self.stages(*sizes))
        ]
        return [config for config in found if self.suits(config)]

    def stages(self, rows: int, outputs: int, inputs: int) -> int:
        """Turns of a tile's loop that fit into a processor's memory, up to what is worth it."""
        stage = 2 * inputs * (rows + outputs * self.weights)
        return min(STAGES[inputs], SHARED_BYTES // stage)

    def suits(self, config: ProductConfig) -> bool:
        """Whether it makes good use of the device, as far as counting tells."""
        tiles = -(-self.rows // config.block_rows) * -(-(self.outputs // self.weights) // config.block_outputs)
        programs = tiles * config.splits
        is_deep = self.inputs // config.splits >= 2 * config.block_inputs and config.num_stages > 1
        is_whole = config.splits == 1 and programs > PROGRAMS[1]
        largest = LARGEST_TILE if self.model == "A" else 2 * LARGEST_TILE
        small = config.block_rows * config.block_outputs * self.weights <= largest
        return is_deep and small and (is_whole or PROGRAMS[0] <= programs <= PROGRAMS[1])


@attrs.define(eq=False)
class Result:
    """What was measured of a case, in microseconds."""

    case: Case
    reference: float
    """torch's product and the kernels beside it."""
    norm: float
    """The norm that a sum takes where it is not left for the product that follows."""
    times: dict[ProductConfig, float] = attrs.field(factory=dict)
    is_chosen: bool = False

    @property
    def best(self) -> ProductConfig | None:
        """The fastest configuration."""
        return min(self.times, key=self.times.__getitem__, default=None)

    @property
    def joined(self) -> float:
        """Its time."""
        return min(self.times.values(), default=float("inf"))


def rotation(shape: Shape, rows: int) -> products.Rotation:
    """Where heads of random rows go."""
    keys, values = (random(rows // BLOCK_SIZE + 2, shape.kv_heads, BLOCK_SIZE, shape.size) for _ in range(2))
    norm = ones(shape.size) if shape.head_norms else None
    positions = torch.arange(rows, device=DEVICE)
    return products.Rotation(
        positions=positions,
        cosines=random(POSITIONS, shape.size, dtype=torch.float32),
        sines=random(POSITIONS, shape.size, dtype=torch.float32),
        slots=BLOCK_SIZE + positions,
        keys=keys,
        values=values,
        query_norm=norm,
        key_norm=norm,
        epsilon=EPSILON,
    )


class Inputs:
    """What a part's products of all numbers of rows are given."""

    def __init__(self, case: Case, weights: list[torch.Tensor], counters: torch.Tensor) -> None:
        rows, parts = case.rows, max(1, case.inputs // 64)
        self.part, self.weights, self.counters = case.part, weights, counters
        self.x, self.residual = random(rows, case.inputs), random(rows, case.outputs)
        self.factor = ones(case.outputs)
        self.scaled = products.ScaledRows(self.x, torch.rand(rows, parts, device=DEVICE), EPSILON)
        self.rotation = rotation(MODELS[case.model], rows) if case.part == "rotated" else None

    def joined(self, weight: torch.Tensor, config: ProductConfig, *, pdl: bool) -> object:
        """One product."""
        end: dict[str, Any] = {"config": config, "counters": self.counters, "pdl": pdl}
        if self.rotation is not None:
            return products.rotated_product(self.scaled, weight, self.rotation, **end)
        if self.part == "qkv":
            return products.multiply(self.scaled, weight, **end)
        if self.part == "gate_up":
            return products.gated_product(self.scaled, weight, "silu", **end)
        return products.add_product_and_scale(self.x, weight, self.residual, self.factor, EPSILON, **end)

    def reference(self, weight: torch.Tensor) -> object:
        """The product of torch and the kernels beside it."""
        product = functional.linear(self.x, weight)
        if self.rotation is not None:
            _, kv_heads, _, size = self.rotation.keys.shape
            query = product.new_empty(len(product), product.shape[1] // size - 2 * kv_heads, size)
            kernels.rotate_and_store(product, query_out=query, **attrs.asdict(self.rotation, recurse=False))
            return query
        if self.part == "qkv":
            return product
        if self.part == "gate_up":
            return kernels.gated(product, "silu")
        return kernels.add_norm(product, self.residual, self.factor, EPSILON)


class Tuning:
    """Times cases until a deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.monotonic()
        self.counters = products.new_counters(DEVICE)
        self.refused: dict[tuple[object, ...], str] = {}
        self.compiled: set[tuple[object, ...]] = set()

    def is_over(self, share: float) -> bool:
        """Whether this share of the time has passed."""
        return bool(time.monotonic() - self.begin > share * self.options.seconds)

    def compile(self, wanted: Iterable[tuple[Case, ProductConfig]], share: float) -> None:
        """Compile what is wanted on all processors, and run it once; whatever refuses is left out."""
        kinds = {self.key(case, config): (case, config) for case, config in wanted}
        kinds = {key: kind for key, kind in kinds.items() if key not in self.compiled | set(self.refused)}
        if not kinds:
            return
        inputs = {
            key: Inputs(case, [random(case.outputs, case.inputs)], self.counters)
            for key, case in {(case.model, case.part): case for case, _ in kinds.values()}.items()
        }
        left = max(0.0, share * self.options.seconds - (time.monotonic() - self.begin))
        # Compilers mostly run without Python's lock.
        pool = ThreadPoolExecutor(os.cpu_count())
        tasks = {
            key: pool.submit(self.try_out, inputs[case.model, case.part], config)
            for key, (case, config) in kinds.items()
        }
        wait(tasks.values(), timeout=left)
        pool.shutdown(cancel_futures=True)
        torch.cuda.synchronize()
        for key, task in tasks.items():
            error = LATE if task.cancelled() else task.result()
            if error is None:
                self.compiled.add(key)
            elif error != LATE:
                print(f"  left out: {key}: {error}")
            if error is not None:
                self.refused[key] = error
        if late := sum(task.cancelled() for task in tasks.values()):
            print(f"  left out: {late} kernels: {LATE}")

    def try_out(self, inputs: Inputs, config: ProductConfig) -> str | None:
        """Run a configuration once, which compiles it; return what speaks against it."""
        try:
            with torch.no_grad():
                inputs.joined(inputs.weights[0], config, pdl=self.options.pdl)
        except Exception as error:  # noqa: BLE001 (Triton's, of whatever kind)
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    @staticmethod
    def key(case: Case, config: ProductConfig) -> tuple[object, ...]:
        """What is compiled: numbers of rows share it."""
        return (case.part, case.outputs, case.inputs, *attrs.astuple(config))

    def time(self, result: Result, weights: list[torch.Tensor], configs: Iterable[ProductConfig]) -> None:
        """Time those that were compiled and have not been timed."""
        inputs = Inputs(result.case, weights, self.counters)
        for config in configs:
            if config in result.times or self.key(result.case, config) not in self.compiled or self.is_over(1):
                continue
            call = partial(inputs.joined, config=config, pdl=self.options.pdl)
            try:
                result.times[config] = microseconds([partial(call, weight) for weight in weights], TURNS)
            except RuntimeError as error:
                print(f"  left out: {result.case}, {config}: {str(error).splitlines()[0]}")

    def start(self, case: Case, weights: list[torch.Tensor]) -> Result:
        """Time what a case is compared with."""
        inputs = Inputs(case, weights, self.counters)
        reference = microseconds([partial(inputs.reference, weight) for weight in weights], TURNS)
        norm = microseconds([partial(kernels.norm, inputs.residual, inputs.factor, EPSILON)] * 50, TURNS)
        return Result(case, reference, norm)


def variants(config: ProductConfig, case: Case) -> list[ProductConfig]:
    """What differs from a good configuration in what the candidates all have alike."""
    warps = 4 if config.num_warps == 8 else 8  # noqa: PLR2004 (the two that candidates have)
    stage = 2 * config.block_inputs * (config.block_rows + config.block_outputs * case.weights)
    deeper = min(config.num_stages + 2, SHARED_BYTES // stage)
    changes = [{"num_warps": warps}, {"num_stages": max(2, config.num_stages - 1)}, {"num_stages": deeper}]
    return [changed for change in changes if (changed := attrs.evolve(config, **change)) != config]


def cases_of(model: str, options: argparse.Namespace) -> list[Case]:
    """All products of a model, at all numbers of rows."""
    sizes = MODELS[model].weights
    sizes["rotated"] = sizes["qkv"]
    return [
        Case(model=model, part=part, rows=rows, outputs=sizes[part][0], inputs=sizes[part][1])
        for part in PARTS
        for rows in options.rows or ROWS[model]
    ]


def tune(tuning: Tuning, cases: Sequence[Case], *, refine: bool) -> list[Result]:
    """Time every candidate of one model's cases, and variants of the best."""
    if tuning.options.tune:
        wanted = {case: case.candidates() for case in cases}
    else:
        listed = {case: config_for(case.part, case.rows, case.outputs, case.inputs) for case in cases}
        wanted = {case: [config] if config else [] for case, config in listed.items()}
    tuning.compile(((case, config) for case, configs in wanted.items() for config in configs), SHARES[cases[0].model])
    report(tuning, f"{cases[0].model}: {len(tuning.compiled)} kernels compiled")
    results = []
    for _, group in itertools.groupby(cases, key=lambda case: case.part):
        mine = list(group)
        weights = weights_of(mine[0].outputs, mine[0].inputs)
        for case in mine:
            results.append(tuning.start(case, weights))
            tuning.time(results[-1], weights, wanted[case])
    report(tuning, f"{cases[0].model}: {sum(len(result.times) for result in results)} times taken")
    if tuning.options.tune and refine:
        tune_finely(tuning, results)
    return results


def tune_finely(tuning: Tuning, results: Sequence[Result]) -> None:
    """Try variants of each case's best configuration."""
    close = {id(result): variants(result.best, result.case) if result.best else [] for result in results}
    tuning.compile(((result.case, config) for result in results for config in close[id(result)]), REFINING)
    for _, group in itertools.groupby(results, key=lambda result: result.case.part):
        mine = list(group)
        weights = weights_of(mine[0].case.outputs, mine[0].case.inputs)
        for result in mine:
            tuning.time(result, weights, close[id(result)])
    report(tuning, "variants of the best timed")


def report(tuning: Tuning, text: str) -> None:
    """Say how far it is."""
    print(f"[{time.monotonic() - tuning.begin:5.1f} s] {text}", flush=True)


def choose(results: Sequence[Result]) -> None:
    """Decide for each sum and what follows it together: only if both are joined is there no norm between them."""
    by_part = {(result.case.part, result.case.rows): result for result in results}
    for rows in sorted({result.case.rows for result in results}):
        out, down, gate_up, qkv, rotated = (
            by_part[part, rows] for part in ("out", "down", "gate_up", "qkv", "rotated")
        )
        _choose(out, {gate_up: gate_up.joined}, gate_up.reference)
        # Whoever only multiplies leaves the rotation to its kernel.
        rotation = rotated.reference - qkv.reference
        _choose(down, {qkv: qkv.joined + rotation, rotated: rotated.joined}, rotated.reference)


def _choose(adding: Result, following: dict[Result, float], reference: float) -> None:
    """Mark the best of a sum and the ways to go on."""
    totals: dict[tuple[bool, Result | None], float] = {
        (False, None): adding.reference + reference,
        (True, None): adding.joined + adding.norm + reference,
    }
    for result, time_of in following.items():
        totals[False, result] = adding.reference + time_of
        totals[True, result] = adding.joined + time_of
    adding.is_chosen, chosen = min(totals, key=totals.__getitem__)
    if chosen is not None:
        chosen.is_chosen = True


def show(results: Sequence[Result]) -> None:
    """Print what was measured."""
    print(f"\n{'product':26} {'rows':>4} {'torch':>8} {'joined':>8} {'norm':>6}  configuration (the chosen marked)")
    for result in results:
        case, best = result.case, result.best
        name = f"{case.model} {case.part} {case.outputs}x{case.inputs}"
        numbers = "none" if best is None else ", ".join(map(str, attrs.astuple(best)))
        print(
            f"{name:26} {case.rows:4} {result.reference:8.2f} {result.joined:8.2f} {result.norm:6.2f}  "
            f"{numbers}{' *' if result.is_chosen else ''}"
        )


def show_sums(results: Sequence[Result]) -> None:
    """Print what a layer's products and the kernels beside them take, rotation included."""
    print("\nmicroseconds of a layer without attention: torch's products and the kernels beside them, and as chosen")
    print(f"{'model':5} {'rows':>4} {'torch':>8} {'chosen':>8}")
    by_case = {(result.case.model, result.case.rows, result.case.part): result for result in results}
    for model, rows in dict.fromkeys((result.case.model, result.case.rows) for result in results):
        mine = {part: by_case[model, rows, part] for part in PARTS}
        rotated, qkv = mine.pop("rotated"), mine.pop("qkv")
        torchs = rotated.reference + sum(result.reference for result in mine.values())
        chosen = sum(result.joined if result.is_chosen else result.reference for result in mine.values())
        chosen += rotated.joined if rotated.is_chosen else rotated.reference
        if qkv.is_chosen:
            chosen += qkv.joined - qkv.reference
        chosen += mine["out"].norm if mine["out"].is_chosen and not mine["gate_up"].is_chosen else 0
        chosen += mine["down"].norm if mine["down"].is_chosen and not (qkv.is_chosen or rotated.is_chosen) else 0
        print(f"{model:5} {rows:4} {torchs:8.2f} {chosen:8.2f}")


def tabled(results: Sequence[Result]) -> dict[tuple[Part, int, int], dict[int, ProductConfig | None]]:
    """The chosen configurations as the table has them; equal neighbours are one line, and the last ones are none."""
    table: dict[tuple[Part, int, int], dict[int, ProductConfig | None]] = {}
    for result in sorted(results, key=lambda result: result.case.rows):
        case, config = result.case, result.best if result.is_chosen else None
        mine = table.setdefault((case.part, case.outputs, case.inputs), {})
        if mine and next(reversed(mine.values())) == config:
            mine.popitem()
        mine[case.rows] = config
    return {key: mine for key, mine in table.items() if any(mine.values())}


def show_table(table: dict[tuple[Part, int, int], dict[int, ProductConfig | None]]) -> None:
    """Print the table as the source holds it."""
    print("\nTABLE: dict[tuple[Part, int, int], Measured] = {")
    for (part, outputs, inputs), mine in table.items():
        print(f'    ("{part}", {outputs}, {inputs}): _rows(')
        for rows, config in mine.items():
            numbers = () if config is None else attrs.astuple(config)
            print(f"        {(rows, *numbers)},")
        print("    ),")
    print("}")


def write(results: Sequence[Result]) -> None:
    """Write all times to the folder that OUT names, if any."""
    if "OUT" not in os.environ:
        return
    rows = [
        attrs.asdict(result.case)
        | {"reference": result.reference, "norm": result.norm, "is_chosen": result.is_chosen}
        | {"times": [[*attrs.astuple(config), us] for config, us in result.times.items()]}
        for result in results
    ]
    Path(os.environ["OUT"], "products.json").write_text(json.dumps(rows), encoding="utf-8")


def bench_products(options: argparse.Namespace) -> None:
    """Joined products against torch's: the table's configurations, or with ``--tune`` all candidates."""
    tuning, results = Tuning(options), []
    for model in options.models:
        found = tune(tuning, cases_of(model, options), refine=model == options.models[0])
        choose(found)
        results += found
        write(results)
    show(results)
    show_sums(results)
    if options.tune:
        table = tabled(results)
        show_table(table)
        product_configs.TABLE.clear()
        product_configs.TABLE.update(table)
