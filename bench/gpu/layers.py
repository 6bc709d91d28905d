"""How fast a decoder layer's kernels are on a CUDA device, beside the time that reading their memory takes.

Everything is timed inside CUDA graphs, over more weights than the caches hold, and a figure is the best of all turns.
Shapes are those of Qwen3-0.6B (A) and Llama-3.1-8B (B) in bfloat16. Attention itself is left out: queries stand in for
its result.

    python bench/gpu/layers.py                    every table
    python bench/gpu/layers.py --only thin --tune every candidate configuration of the thin product
    python bench/gpu/layers.py --only products layer --tune
                                                  every candidate of the joined products, and what the best ones give

``--only`` takes ``thin``, ``kernels``, ``products`` and ``layer``.
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
from folo_hf.joined_products import JoinedProducts
from folo_kernels.gpu import layers as kernels
from folo_kernels.gpu.layers import ThinConfig
from graph_times import DEVICE, MODELS, microseconds, ones, random, weights_of
from product_tuning import bench_products

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from graph_times import Shape

EPSILON = 1e-6
POSITIONS, BLOCK_SIZE = 4096, 16

PLAIN = [(1, 1024, 4), (2, 512, 4), (2, 1024, 4), (4, 256, 4), (4, 512, 4), (4, 1024, 4), (8, 256, 4), (8, 512, 4)]
TENSOR_CORES = [(16, 128, 2), (16, 256, 4), (16, 512, 4), (32, 128, 4), (32, 256, 4), (64, 128, 4)]
FEW, MANY = 8, 1 << 20
"""Rows up to which every way to run a layer is tried."""
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


def shown(config: ThinConfig) -> str:
    """A configuration in short."""
    kind = "dot" if config.dot else "plain"
    return f"{kind} {config.block_outputs}x{config.block_inputs} w{config.num_warps} s{config.num_stages}"


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
    is_captured: bool = True


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


@attrs.frozen
class Kind:
    """A way to run a layer."""

    most_rows: int
    """Rows beyond which it is not tried."""
    thin: bool = False
    joined: bool = False
    pdl: bool = False


KINDS = {
    "linear": Kind(MANY),
    "joined": Kind(MANY, joined=True),
    "joined pdl": Kind(MANY, joined=True, pdl=True),
    "linear pdl": Kind(FEW, pdl=True),
    "thin": Kind(FEW, thin=True),
    "thin pdl": Kind(FEW, thin=True, pdl=True),
}


def time_step(decoder: DeviceDecoder, rows: int, kind: Kind, turns: int) -> float:
    """Milliseconds of a whole model's step."""
    decoder.thin_rows, decoder.pdl = FEW if kind.thin else 0, kind.pdl
    decoder.joined = JoinedProducts.make(torch.device(DEVICE), 0) if kind.joined else None
    if decoder.joined is not None:
        decoder.joined.pdl_rows = range(MANY + 1 if kind.pdl else 0)
    ids = torch.arange(rows, device=DEVICE)
    return microseconds([lambda: decoder(ids, ids, ids, Slots(ids))], turns) / 1000  # type: ignore[arg-type]


def bench_layer(options: argparse.Namespace) -> None:
    """Whole models without attention, in one graph: with torch's products, joined and thin ones."""
    print("\nwhole model without attention: milliseconds a step; 'limit' is its weights at 3 TB/s")
    print(f"{'model':5} {'rows':>4} {'limit':>7} " + " ".join(f"{kind:>11}" for kind in KINDS))
    for name in options.models:
        shape = MODELS[name]
        decoder = make_decoder(shape, shape.layers)
        layer = sum(outputs * inputs for part, (outputs, inputs) in shape.weights.items() if part != "head")
        limit = 2 * (shape.layers * layer + shape.vocab * shape.hidden) / 3e9
        for rows in options.rows or (1, 2, 8, 32, 64, 128, 256):
            decoder.bind(NoAttention(shape, shape.layers, rows))
            shows = [
                f"{time_step(decoder, rows, kind, options.turns):11.3f}" if rows <= kind.most_rows else f"{'':>11}"
                for kind in KINDS.values()
            ]
            print(f"{name:5} {rows:4} {limit:7.3f} " + " ".join(shows), flush=True)
        del decoder


BENCHES = {"thin": bench_thin, "kernels": bench_kernels, "products": bench_products, "layer": bench_layer}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, help="numbers of rows; each table has its own unless given")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="try every candidate configuration of the products")
    parser.add_argument("--seconds", type=float, default=100, help="for tuning joined products, compilation included")
    parser.add_argument("--pdl", action="store_true", help="launch kernels while their predecessors still run")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        for name in options.only:
            BENCHES[name](options)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
