"""What attention over blocks takes on a CUDA device, beside what the device does at best.

Decoding is bound by reading keys and values, so it is given in bytes a second (bytes of a shared prefix count once)
and as a share of what copying memory reaches. Prompts are bound by arithmetic, and compared with a matrix product.
Every workload runs in several configurations, of which one that cannot be compiled is reported as such, beginning with
the one that the device gets by itself. All calls run over enough layers that none finds its keys in the cache of the
one before. Those that decode are captured in a graph; prompts are not, as in an engine.

    python bench/gpu/attention.py --json attention.json

With ``--kv-dtype fp8`` keys and values lie in float8, and half the bytes are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

import ceilings
from folo_kernels.gpu.attention import (
    FEW_ROWS,
    Configs,
    DecodeConfig,
    PagedAttention,
    PrefillConfig,
    Scoring,
    configs_for,
)
from folo_kernels.gpu.blocks import DeviceBlocks, LayerShape
from folo_kernels.gpu.plan import Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DEVICE = torch.device("cuda")
BLOCK_SIZE = 16
COLD_BYTES = 256 * 2**20
"""Keys and values of all layers together, at least: several times what the device's cache holds."""
MOST_LAYERS = 64


@attrs.frozen
class Workload:
    """One step's batch."""

    name: str
    lens: list[int]
    """Tokens attended over, the new ones included."""
    new: int = 1
    """New tokens of each sequence."""
    group: int = 1
    """Adjacent sequences that share a prefix."""
    shared: int = 0
    """Tokens they share."""
    pdl: bool = False
    """Launch each layer's attention while that of the layer before still runs."""

    @property
    def query_start(self) -> np.ndarray:
        """int32 ``[n + 1]``: every sequence has as many new tokens."""
        return np.arange(len(self.lens) + 1, dtype=np.int32) * self.new

    def tables(self) -> np.ndarray:
        """Give every sequence blocks of its own, in random order, behind those that its group shares."""
        count, width = len(self.lens), -(-max(self.lens) // BLOCK_SIZE)
        tables = np.random.default_rng(0).permutation(count * width).astype(np.int32).reshape(count, width) + 1
        common = self.shared // BLOCK_SIZE
        tables[:, :common] = np.repeat(tables[:: self.group, :common], self.group, axis=0)[:count]
        return tables

    def tokens_read(self) -> int:
        """Tokens whose keys and values must be read at least once."""
        groups = -(-len(self.lens) // self.group)
        return sum(self.lens) - (len(self.lens) - groups) * self.shared

    def pairs(self) -> int:
        """Query-key pairs of one head."""
        return sum(self.new * length - self.new * (self.new - 1) // 2 for length in self.lens)


def mixed(count: int, mean: int) -> list[int]:
    """Lengths between half the mean and one and a half times it."""
    return [int(length) for length in np.random.default_rng(1).integers(mean // 2, mean * 3 // 2, count)]


DECODES = [
    Workload("64 rows of 4096", [4096] * 64),
    Workload("256 rows of about 800", mixed(256, 800)),
    Workload("8 rows of about 16000", mixed(8, 16000)),
    Workload("4 rows of about 4000", mixed(4, 4000)),
    Workload("64 rows of 256", [256] * 64),
    *(
        Workload(f"1 row of {length}{', pdl' if pdl else ''}", [length], pdl=pdl)
        for length in (256, 2048, 8192)
        for pdl in (False, True)
    ),
    Workload("16 groups of 16 sharing 1024, 128 own", [1024 + 128] * 256, group=16, shared=1024),
    Workload("256 rows sharing 2048, 100 own", [2048 + 100] * 256, group=256, shared=2048),
]
PREFILLS = [
    Workload("prompt of 8192", [8192], new=8192),
    Workload("16 prompts of 512", [512] * 16, new=512),
    Workload("last 512 of 16384", [16384], new=512),
]
DECODE_CONFIGS = [
    DecodeConfig(block_n=block_n, shared_rows=shared_rows, shared_block_n=shared, num_warps=warps, num_stages=stages)
    for block_n, shared_rows, shared, warps, stages in [
        (64, 32, 32, 2, 3),
        (64, 64, 32, 4, 3),
        (64, 128, 32, 4, 3),
        (64, 128, 32, 8, 3),
        (32, 32, 32, 4, 5),
        (32, 32, 32, 2, 4),
        (32, 64, 32, 4, 4),
        (128, 32, 32, 4, 2),
        (128, 32, 32, 4, 3),
    ]
]
SINGLE_CONFIGS = [
    DecodeConfig(block_n=block_n, shared_rows=32, shared_block_n=32, num_warps=warps, num_stages=stages)
    for block_n, warps, stages in [
        (64, 4, 2),
        (64, 4, 3),
        (64, 2, 3),
        (32, 4, 5),
        (32, 2, 5),
        (128, 4, 2),
        (128, 4, 1),
        (128, 8, 2),
        (128, 8, 1),
    ]
]
"""For one row."""
SHARED_CONFIGS = [
    DecodeConfig(block_n=block_n, shared_rows=rows, shared_block_n=shared, num_warps=warps, num_stages=stages)
    for block_n, rows, shared, warps, stages in [
        (64, 128, 64, 8, 2),
        (64, 128, 64, 8, 3),
        (64, 64, 64, 4, 2),
    ]
]
"""For many rows that share a prefix, besides the others."""
TUNINGS: list[dict[str, int]] = [{"waves": 2}, {"waves": 8}, {"min_split": 128}, {"min_split": 512}]
SINGLE_TUNINGS: list[dict[str, int]] = [{"few_split": 64}, {"few_split": 256}, {"few_programs": 1}, {"few_programs": 4}]
FEW_TUNINGS: list[dict[str, int]] = [{"few_split": 256}, {"programs_per_processor": 3}, {"programs_per_processor": 6}]
SHARED_TUNINGS: list[dict[str, int]] = [{"shared_splits": 2}, {"shared_splits": 4}, {"shared_splits": 16}]
"""Other ways to cut steps: tried in the fastest configuration, for one row in all of them."""
PREFILL_CONFIGS = [
    PrefillConfig(block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages)
    for block_m, block_n, warps, stages in [
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 4),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 32, 8, 4),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 128, 4, 2),
    ]
]


@attrs.frozen
class Model:
    """One layer's heads."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    stored: torch.dtype
    """Of keys and values."""

    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in a layer."""
        return 2 * self.kv_heads * self.head_size * self.stored.itemsize


class Bench:
    """One workload's blocks and queries, for any configuration."""

    def __init__(self, model: Model, work: Workload) -> None:
        self.model, self.work = model, work
        self.tables = work.tables()
        num_blocks = int(self.tables.max()) + 1
        per_layer = work.tokens_read() * model.bytes_per_token()
        self.layers = min(MOST_LAYERS, max(2, -(-COLD_BYTES // per_layer)))
        shape = LayerShape(
            kv_heads=model.kv_heads, key_size=model.head_size, value_size=model.head_size, dtype=model.stored
        )
        self.blocks = DeviceBlocks([shape] * self.layers, num_blocks, BLOCK_SIZE, DEVICE)
        # A generator of its own: one that took part in a capture which failed cannot be used again.
        numbers = torch.Generator(DEVICE)
        for cache in self.blocks.tensors():
            # Torch draws no float8.
            cache.copy_(torch.empty_like(cache, dtype=model.dtype).normal_(generator=numbers))
        tokens = int(work.query_start[-1])
        shape_of_query = (tokens, model.heads, model.head_size)
        self.query = torch.empty(shape_of_query, device=DEVICE, dtype=model.dtype).normal_(generator=numbers)
        self.wanted: torch.Tensor | None = None

    def seconds(self, configs: Configs, **changes: int) -> float:
        """Median seconds of one layer's attention."""
        work, model = self.work, self.model
        tuning = Tuning(
            kv_heads=model.kv_heads,
            group=model.heads // model.kv_heads,
            processors=torch.cuda.get_device_properties(DEVICE).multi_processor_count,
            query_rows=configs.prefill.block_m,
            shared_rows=configs.decode.shared_rows,
        )
        attention = PagedAttention(
            self.blocks,
            max_rows=len(work.lens),
            max_width=self.tables.shape[1],
            tuning=attrs.evolve(tuning, **changes),
            configs=configs,
        )
        lens = np.array(work.lens, np.int32)
        plan = attention.plan(work.query_start, lens, self.tables, is_captured=work.new == 1)
        scoring = Scoring(scale=model.head_size**-0.5)
        out = torch.full_like(self.query, torch.nan)

        def run() -> None:
            for layer in range(self.layers):
                attention.attend(layer, self.query, plan, scoring, out, pdl=work.pdl)

        found = (captured_seconds(run) if work.new == 1 else queued_seconds(run)) / self.layers
        self.check(out)
        return found

    def check(self, out: torch.Tensor) -> None:
        """Compare with what the first configuration found."""
        assert out.isfinite().all(), "something was not written"
        if self.wanted is None:
            self.wanted = out.clone()
        torch.testing.assert_close(out, self.wanted, rtol=0, atol=2e-2)


def captured_seconds(run: Callable[[], None], repeats: int = 15) -> float:
    """Median seconds of a replay of what ``run`` launches."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return timed(graph.replay, repeats)


def queued_seconds(run: Callable[[], None], repeats: int = 15) -> float:
    """Median seconds of what ``run`` launches, while the device is behind the host."""
    left, right = (torch.zeros(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    run()
    torch.cuda.synchronize()

    def ahead() -> None:
        for _ in range(4):
            torch.mm(left, right)

    return timed(run, repeats, ahead)


def timed(work: Callable[[], object], repeats: int = 15, ahead: Callable[[], object] | None = None) -> float:
    """Median seconds that the device takes for ``work``; ``ahead`` keeps it busy while that is launched."""
    samples: list[float] = []
    for _ in range(repeats):
        if ahead is not None:
            ahead()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def decode_runs(model: Model, limit: float, workloads: list[Workload]) -> Iterator[dict[str, Any]]:
    """Measure every decoding workload in every configuration, then with other ways to cut it."""
    for work in workloads:
        bench = Bench(model, work)
        amount = work.tokens_read() * model.bytes_per_token()
        best: tuple[float, DecodeConfig] | None = None
        for config in decode_configs(model, work):
            row = attempt(bench, Configs(decode=config, prefill=PREFILL_CONFIGS[0]), amount, limit, config)
            if "seconds" in row and (best is None or row["seconds"] < best[0]):
                best = row["seconds"], config
            yield row
        again = decode_configs(model, work) if len(work.lens) == 1 else [best[1]] if best else []
        for config, changes in itertools.product(again, tunings(work)):
            yield attempt(bench, Configs(decode=config, prefill=PREFILL_CONFIGS[0]), amount, limit, config, changes)


def decode_configs(model: Model, work: Workload) -> list[DecodeConfig]:
    """List what to try: first what the device gets by itself."""
    rows = len(work.lens)
    own = configs_for(torch.cuda.get_device_capability(), model.head_size, model.dtype).decoding(rows)
    others = SINGLE_CONFIGS if rows == 1 else DECODE_CONFIGS + (SHARED_CONFIGS if work.shared else [])
    return [own, *(config for config in others if config != own)]


def tunings(work: Workload) -> list[dict[str, int]]:
    """List other ways to cut a step that may suit it."""
    if work.shared:
        return SHARED_TUNINGS
    if len(work.lens) == 1:
        return SINGLE_TUNINGS
    return FEW_TUNINGS if len(work.lens) <= FEW_ROWS else TUNINGS


def prefill_runs(model: Model, limit: float, workloads: list[Workload]) -> Iterator[dict[str, Any]]:
    """Measure every prompt workload in every configuration, and torch's own attention where it can do the same."""
    for work in workloads:
        bench = Bench(model, work)
        amount = 4 * model.heads * model.head_size * work.pairs()
        if work.lens[0] == work.new:
            seconds = torch_seconds(model, work)
            yield {"workload": work.name, "config": "torch's attention, keys side by side"} | rates(
                seconds, amount, limit
            )
        for config in PREFILL_CONFIGS:
            yield attempt(bench, Configs(decode=DECODE_CONFIGS[0], prefill=config), amount, limit, config)


def attempt(  # noqa: PLR0913, PLR0917 (one line of the table)
    bench: Bench,
    configs: Configs,
    amount: float,
    limit: float,
    config: DecodeConfig | PrefillConfig,
    changes: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Measure one configuration, or say why it failed."""
    changes = changes or {}
    row: dict[str, Any] = {
        "workload": bench.work.name,
        "config": short(config) + "".join(f" {k}={v}" for k, v in changes.items()),
    }
    try:
        return row | rates(bench.seconds(configs, **changes), amount, limit)
    except Exception as error:  # noqa: BLE001 (a configuration too large for the device must not end the others)
        return row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:100]}


def rates(seconds: float, amount: float, limit: float) -> dict[str, float]:
    """What was done a second, and its share of the most."""
    return {"seconds": seconds, "per_second": amount / seconds, "share": amount / seconds / limit}


def short(config: DecodeConfig | PrefillConfig) -> str:
    """Fields without their values' names: ``block_n 64, ...``."""
    return " ".join(f"{name}={value}" for name, value in attrs.asdict(config).items())


def torch_seconds(model: Model, work: Workload) -> float:
    """Seconds of torch's own causal attention over keys that lie side by side."""
    from torch.nn.functional import scaled_dot_product_attention

    def make(heads: int) -> torch.Tensor:
        shape = (len(work.lens), heads, work.new, model.head_size)
        return torch.empty(shape, device=DEVICE, dtype=model.dtype).normal_(generator=torch.Generator(DEVICE))

    query, key, value = make(model.heads), make(model.kv_heads), make(model.kv_heads)
    return timed(lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))


def show(rows: Iterable[dict[str, Any]], unit: str, scale: float, most: int) -> list[dict[str, Any]]:
    """Print each workload's fastest configurations, the first one, and what failed, once it is done; return all."""
    told: list[dict[str, Any]] = []
    for name, group in itertools.groupby(rows, key=lambda row: row["workload"]):
        found = list(group)
        told += found
        print(f"\n{name}")
        good = sorted((row for row in found if "seconds" in row), key=lambda row: row["seconds"])
        first = next((row for row in found if "seconds" in row and "torch" not in row["config"]), None)
        for row in [*good[:most], *([first] if first in good[most:] else [])]:
            rate = f"{row['per_second'] / scale:7.1f} {unit}  {row['share']:5.1%}"
            print(f"  {row['seconds'] * 1e6:9.1f} us  {rate}  {row['config']}{' (first)' if row is first else ''}")
        for row in found:
            if "failed" in row:
                print(f"  failed: {row['config']}: {row['failed']}")
        sys.stdout.flush()
    return told


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--kv-dtype", choices=["bfloat16", "fp8"], default="bfloat16", help="of keys and values")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--match", default="", help="run the workloads whose name contains this")
    parser.add_argument("--most", type=int, default=4, help="configurations shown per workload")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stored = torch.float8_e4m3fn if options.kv_dtype == "fp8" else torch.bfloat16
    model = Model(options.heads, options.kv_heads, options.head_size, torch.bfloat16, stored)
    best = ceilings.measure("cuda", tiny=False)
    name = torch.cuda.get_device_name()
    print(f"{name}: copies {best.copy / 1e9:.0f} GB/s, multiplies {best.matmul / 1e12:.0f} TFLOP/s", flush=True)
    decodes, prefills = ([w for w in works if options.match in w.name] for works in (DECODES, PREFILLS))
    rows: dict[str, list[dict[str, Any]]] = {"decode": [], "prefill": []}
    if options.only != "prefill":
        rows["decode"] = show(decode_runs(model, best.copy, decodes), "GB/s", 1e9, options.most)
    if options.only != "decode":
        rows["prefill"] = show(prefill_runs(model, best.matmul, prefills), "TFLOP/s", 1e12, options.most)
    if options.json:
        told = {"device": name, "ceilings": attrs.asdict(best), **rows}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
