"""How fast a decoder layer's kernels are on a CUDA device, beside the time that reading their memory takes.

Everything is timed inside CUDA graphs, over more weights than the caches hold, and a figure is the best of all turns.
Shapes are those of Qwen3-0.6B (A) and Llama-3.1-8B (B) in bfloat16. Attention itself is left out: queries stand in for
its result.

    python bench/gpu/layers.py                    every table
    python bench/gpu/layers.py --only thin --tune every candidate configuration of the thin product

``--only`` takes ``thin``, ``kernels`` and ``layer``.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import TYPE_CHECKING

import attrs
import torch
from torch.nn import functional

from folo_hf.attention import AttentionCall
from folo_hf.device_decoder import DenseBlocks, DeviceDecoder
from folo_hf.device_layers import DeviceLayer, Ends, Linear
from folo_kernels.gpu import layers as kernels
from folo_kernels.gpu.layers import ThinConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEVICE, DTYPE = "cuda", torch.bfloat16
EPSILON = 1e-6
COLD_BYTES = 400 * 2**20
"""Weights that a graph reads: several times what the caches of any device hold."""
MOST_COPIES = 64
POSITIONS, BLOCK_SIZE = 4096, 16


@attrs.frozen(kw_only=True)
class Shape:
    """A model's sizes."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    size: int
    intermediate: int
    head_norms: bool

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each product."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.size, self.hidden),
            "out": (self.hidden, self.heads * self.size),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
        }


MODELS = {
    "A": Shape(
        vocab=151936, hidden=1024, layers=28, heads=16, kv_heads=8, size=128, intermediate=3072, head_norms=True
    ),
    "B": Shape(
        vocab=128256, hidden=4096, layers=32, heads=32, kv_heads=8, size=128, intermediate=14336, head_norms=False
    ),
}

PLAIN = [(1, 1024, 4), (2, 512, 4), (2, 1024, 4), (4, 256, 4), (4, 512, 4), (4, 1024, 4), (8, 256, 4), (8, 512, 4)]
TENSOR_CORES = [(16, 128, 2), (16, 256, 4), (16, 512, 4), (32, 128, 4), (32, 256, 4), (64, 128, 4)]
LARGEST_TILE = 8192
"""Products of a plain tile beyond which they no longer fit into registers."""


def candidates(rows: int) -> list[ThinConfig]:
    """Configurations worth trying."""
    padded = 1 << (rows - 1).bit_length()
    plain = [
        ThinConfig(block_outputs=outputs, block_inputs=inputs, num_warps=warps)
        for outputs, inputs, warps in PLAIN
        if padded * outputs * inputs <= LARGEST_TILE
    ]
    return plain + [
        ThinConfig(block_outputs=outputs, block_inputs=inputs, num_warps=warps, num_stages=stages, dot=True)
        for (outputs, inputs, warps), stages in itertools.product(TENSOR_CORES, (3, 5))
    ]


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Numbers that keep activations of order one."""
    made = torch.randn(*shape, device=DEVICE, dtype=dtype)
    return made.mul_(shape[-1] ** -0.5)


def ones(size: int) -> torch.Tensor:
    """A norm's factor."""
    return torch.ones(size, device=DEVICE)


def microseconds(calls: Sequence[Callable[[], object]], turns: int) -> float:
    """How long each of the calls takes, one after another in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best * 1000 / len(calls)


def shown(config: ThinConfig) -> str:
    """A configuration in short."""
    kind = "dot" if config.dot else "plain"
    return f"{kind} {config.block_outputs}x{config.block_inputs} w{config.num_warps} s{config.num_stages}"


def weights_of(outputs: int, inputs: int) -> list[torch.Tensor]:
    """As many of them as it takes to find none in the caches."""
    copies = max(2, min(MOST_COPIES, COLD_BYTES // (2 * outputs * inputs)))
    return [random(outputs, inputs) for _ in range(copies)]


def thin_times(
    weights: list[torch.Tensor], x: torch.Tensor, configs: Sequence[ThinConfig | None], options: argparse.Namespace
) -> dict[ThinConfig | None, float]:
    """Microseconds of the thin product in each configuration that this device can run."""
    times = {}
    for config in configs:
        calls = [lambda w=weight, c=config: kernels.thin_matmul(x, w, config=c, pdl=options.pdl) for weight in weights]
        try:
            times[config] = microseconds(calls, options.turns)
        except RuntimeError as error:
            print(f"  {shown(config) if config else 'default'}: {str(error).splitlines()[0]}")
    return times


def bench_thin(options: argparse.Namespace) -> None:
    """Thin products against torch's."""
    print(f"\nthin products, pdl={options.pdl}: microseconds (GB/s of weights)")
    print(f"{'weight':28} {'rows':>4} {'linear':>15} {'thin':>15}  configuration")
    for name in options.models:
        for part, (outputs, inputs) in MODELS[name].weights.items():
            weights = weights_of(outputs, inputs)
            for rows in options.rows or (1, 2, 4, 8):
                x = random(rows, inputs)
                configs = candidates(rows) if options.tune else [None]
                linear = microseconds([lambda w=w, x=x: functional.linear(x, w) for w in weights], options.turns)  # type: ignore[misc]
                times = thin_times(weights, x, configs, options)
                best = min(times, key=times.__getitem__)
                config = best or kernels.thin_config(rows, outputs, inputs)
                rates = [f"{us:7.1f} ({2e-3 * outputs * inputs / us:5.0f})" for us in (linear, times[best])]
                print(
                    f"{f'{name} {part} {outputs}x{inputs}':28} {rows:4} {rates[0]:>15} {rates[1]:>15}  {shown(config)}"
                )
            del weights


def rotation(shape: Shape, rows: int, options: argparse.Namespace) -> Callable[[], object]:
    """A call of ``rotate_and_store``."""
    total = (shape.heads + 2 * shape.kv_heads) * shape.size
    cosines, sines = (random(POSITIONS, shape.size) for _ in range(2))
    keys, values = (random(rows // BLOCK_SIZE + 2, shape.kv_heads, BLOCK_SIZE, shape.size) for _ in range(2))
    norm = ones(shape.size) if shape.head_norms else None
    qkv, query = random(rows, total), random(rows, shape.heads, shape.size)
    positions = torch.arange(rows, device=DEVICE)
    return lambda: kernels.rotate_and_store(
        qkv, positions, cosines, sines, positions, keys, values, query,
        query_norm=norm, key_norm=norm, epsilon=EPSILON, pdl=options.pdl,
    )  # fmt: skip


def bench_kernels(options: argparse.Namespace) -> None:
    """Each kernel but the products, alone; with the bytes that it must move."""
    print(f"\nkernels alone, pdl={options.pdl}: microseconds (GB/s)")
    print(f"{'model':5} {'rows':>4} {'norm':>15} {'add_norm':>15} {'rotate_and_store':>17} {'gated':>15}")
    for name in options.models:
        shape = MODELS[name]
        for rows in options.rows or (1, 8, 64, 256, 4096):
            x, residual, factor = random(rows, shape.hidden), random(rows, shape.hidden), ones(shape.hidden)
            gate_up = random(rows, 2 * shape.intermediate)
            calls: dict[Callable[[], object], int] = {
                partial(kernels.norm, x, factor, EPSILON, pdl=options.pdl): 2 * shape.hidden,
                partial(kernels.add_norm, x, residual, factor, EPSILON, pdl=options.pdl): 4 * shape.hidden,
                rotation(shape, rows, options): 2 * (shape.heads + 2 * shape.kv_heads) * shape.size,
                partial(kernels.gated, gate_up, "silu", pdl=options.pdl): 3 * shape.intermediate,
            }
            times = {call: microseconds([call] * 50, options.turns) for call in calls}
            shows = [f"{us:7.1f} ({2e-3 * rows * calls[call] / us:5.0f})" for call, us in times.items()]
            print(f"{name:5} {rows:4} {shows[0]:>15} {shows[1]:>15} {shows[2]:>17} {shows[3]:>15}")


class NoAttention:
    """A backend whose attention gives the queries back."""

    def __init__(self, shape: Shape, layers: int, rows: int) -> None:
        store = (rows // BLOCK_SIZE + 2, shape.kv_heads, BLOCK_SIZE, shape.size)
        self.blocks = DenseBlocks(
            [random(*store) for _ in range(layers)], [random(*store) for _ in range(layers)], BLOCK_SIZE
        )

    def attend(self, layer: int, query: torch.Tensor, metadata: object, **call: object) -> torch.Tensor:
        """Leave attention out."""
        return query


@attrs.frozen
class Tables:
    """Cosines and sines, in place of a module's."""

    tables: list[tuple[torch.Tensor, torch.Tensor]]
    table_of: list[int]

    def reach(self, position: int) -> None:
        """They are there."""


@attrs.frozen
class Slots:
    """All that a step without attention reads of its metadata."""

    slot_mapping: torch.Tensor


def make_decoder(shape: Shape, layers: int) -> DeviceDecoder:
    """A model of random weights."""
    sizes = shape.weights
    norm = ones(shape.size) if shape.head_norms else None
    made = [
        DeviceLayer(
            input_norm=ones(shape.hidden),
            feed_norm=ones(shape.hidden),
            **{part: Linear(random(*sizes[part]), None) for part in ("qkv", "out", "gate_up", "down")},
            activation="silu",
            heads=shape.heads,
            size=shape.size,
            epsilon=EPSILON,
            call=AttentionCall(scale=1.0, sliding_window=None, softcap=None),
            query_norm=norm,
            key_norm=norm,
            attention_norm=None,
            output_norm=None,
        )
        for _ in range(layers)
    ]
    embedding = random(shape.vocab, shape.hidden)
    ends = Ends(
        embedding=embedding,
        embedding_scale=1.0,
        norm=ones(shape.hidden),
        epsilon=EPSILON,
        head=Linear(embedding, None),
        logit_scale=1.0,
        softcap=None,
    )
    tables = Tables([(random(POSITIONS, shape.size), random(POSITIONS, shape.size))], [0] * layers)
    return DeviceDecoder(made, ends, tables, POSITIONS)  # type: ignore[arg-type]


def bench_layer(options: argparse.Namespace) -> None:
    """Whole models without attention, in one graph: with and without thin products and dependent launches."""
    kinds = {"linear": (0, False), "linear pdl": (0, True), "thin": (16, False), "thin pdl": (16, True)}
    print("\nwhole model without attention: milliseconds a step; 'limit' is its weights at 3 TB/s")
    print(f"{'model':5} {'rows':>4} {'limit':>7} " + " ".join(f"{kind:>11}" for kind in kinds))
    for name in options.models:
        shape = MODELS[name]
        decoder = make_decoder(shape, shape.layers)
        layer = sum(outputs * inputs for part, (outputs, inputs) in shape.weights.items() if part != "head")
        limit = 2 * (shape.layers * layer + shape.vocab * shape.hidden) / 3e9
        for rows in options.rows or (1, 2, 4, 8, 16, 64, 256):
            decoder.bind(NoAttention(shape, shape.layers, rows))
            ids = torch.arange(rows, device=DEVICE)
            shows = []
            for thin_rows, pdl in kinds.values():
                if thin_rows and rows > thin_rows:
                    shows.append(f"{'':>11}")
                    continue
                decoder.thin_rows, decoder.pdl = thin_rows, pdl
                step = [lambda ids=ids, decoder=decoder: decoder(ids, ids, ids, Slots(ids))]
                shows.append(f"{microseconds(step, options.turns) / 1000:11.3f}")
            print(f"{name:5} {rows:4} {limit:7.3f} " + " ".join(shows))
        del decoder


BENCHES = {"thin": bench_thin, "kernels": bench_kernels, "layer": bench_layer}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows; each table has its own unless given")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="try every candidate configuration of thin products")
    parser.add_argument("--pdl", action="store_true", help="launch kernels while their predecessors still run")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.only:
            BENCHES[name](options)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
