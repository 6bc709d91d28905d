"""Products with quantised weights: Folo's kernels beside PyTorch's CPU operators, and torchao's where it is installed.

``python bench/quantized_linears.py [--json]`` multiplies M rows by a weight of 3072 x 576 in float32 activations. Every
contestant holds as many copies of the weight as a small model has layers and goes through them in turn, so that they
come from memory, as a step's do. All run once a round; figures are medians of each round's ratio to oneDNN's packed
float32 product, with which linears run where Folo's kernels are missing.

The formats are not one: Folo's int8 and every int4 here have a scale for each 32 weights; PyTorch's int8 operator has
one for each output, and torchao's int8 likewise. The error says what that means for normally distributed weights.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_PROC_BIND", "true")

import torch

from folo_hf.passes import PackedLinear
from folo_kernels.matrix import Format, PackedMatrix, Plain

if TYPE_CHECKING:
    from collections.abc import Callable

    Product = Callable[[torch.Tensor], torch.Tensor]

INPUTS, OUTPUTS, GROUP, COPIES = 576, 3072, 32, 24
ROWS = (1, 4, 16, 64)
BASE = "oneDNN packed float32"


def folo(weight_format: Format) -> Callable[[torch.Tensor], Product]:
    """Folo's packed product."""
    return lambda weight: PackedMatrix([Plain(weight)], weight_format).multiply


def one_dnn(weight: torch.Tensor) -> Product:
    """The product of packed linears in float32."""
    return PackedLinear(weight, None)


def plain(weight: torch.Tensor) -> Product:
    """What ``nn.Linear`` runs."""
    return lambda x: torch.nn.functional.linear(x, weight)


def torch_int8(dtype: torch.dtype) -> Callable[[torch.Tensor], Product]:
    """PyTorch's int8 operator, with activations of ``dtype``."""

    def build(weight: torch.Tensor) -> Product:
        scales = weight.abs().amax(1) / 127
        codes = (weight / scales[:, None]).round().to(torch.int8)
        typed = scales.to(dtype)
        return lambda x: torch.ops.aten._weight_int8pack_mm(x.to(dtype), codes, typed)  # noqa: SLF001 (no public way)

    return build


def torch_int4(dtype: torch.dtype) -> Callable[[torch.Tensor], Product]:
    """PyTorch's int4 operator, with activations of ``dtype``."""

    def build(weight: torch.Tensor) -> Product:
        groups = weight.view(OUTPUTS, INPUTS // GROUP, GROUP)
        least = groups.amin(-1, keepdim=True)
        step = (groups.amax(-1, keepdim=True) - least) / 15
        codes = ((groups - least) / step).round().clamp(0, 15).to(torch.int32).view(OUTPUTS, INPUTS)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)  # noqa: SLF001
        # The operator computes (code - 8) * scale + zero.
        scales = torch.stack([step[..., 0].t(), (least + 8 * step)[..., 0].t()], -1).contiguous().to(dtype)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(dtype), packed, GROUP, scales)  # noqa: SLF001

    return build


def torchao(config: object) -> Callable[[torch.Tensor], Product]:
    """A linear layer that torchao has quantised."""

    def build(weight: torch.Tensor) -> Product:
        quantize_: Any = importlib.import_module("torchao.quantization").quantize_

        holder = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS, bias=False))
        holder[0].weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(holder, config)
        return holder

    return build


def contestants() -> dict[str, Callable[[torch.Tensor], Product]]:
    """Everything that can multiply here."""
    found = {
        BASE: one_dnn,
        "torch linear float32": plain,
        **{f"Folo {kind.name.lower()}": folo(kind) for kind in Format},
        "torch int8, float32 activations": torch_int8(torch.float32),
        "torch int8, bfloat16 activations": torch_int8(torch.bfloat16),
        "torch int4, float32 activations": torch_int4(torch.float32),
        "torch int4, bfloat16 activations": torch_int4(torch.bfloat16),
    }
    if importlib.util.find_spec("torchao") is not None:
        int8: Any = importlib.import_module("torchao.quantization")
        int4: Any = importlib.import_module("torchao.prototype.quantization.int4")
        found["torchao int8 weights"] = torchao(int8.Int8WeightOnlyConfig())
        found["torchao int4 weights"] = torchao(int4.Int4WeightOnlyOpaqueTensorConfig(group_size=GROUP))
    return found


def sweep(products: list[Product], x: torch.Tensor) -> float:
    """Return the seconds of one product, each copy's weights read anew."""
    start = time.perf_counter()
    for product in products:
        product(x)
    return (time.perf_counter() - start) / len(products)


@torch.no_grad()
def measure(rounds: int) -> dict[str, Any]:
    """Time all of them, M by M."""
    torch.manual_seed(0)
    weights = [0.05 * torch.randn(OUTPUTS, INPUTS) for _ in range(COPIES)]
    ready = {name: [build(weight) for weight in weights] for name, build in contestants().items()}
    told: dict[str, Any] = {name: {"error": error(products[0], weights[0])} for name, products in ready.items()}
    for rows in ROWS:
        x = torch.randn(rows, INPUTS)
        for products in ready.values():
            sweep(products, x)
        seconds = [{name: sweep(products, x) for name, products in ready.items()} for _ in range(rounds)]
        for name in ready:
            ratios = [each[BASE] / each[name] for each in seconds]
            microseconds = 1e6 * statistics.median(each[name] for each in seconds)
            told[name][str(rows)] = {"times_base": statistics.median(ratios), "microseconds": microseconds}
    return told


def error(product: Product, weight: torch.Tensor) -> float:
    """Return the root mean square of the result's error, relative to the result's."""
    x = torch.randn(16, INPUTS)
    exact = x @ weight.t()
    return ((product(x).float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def main() -> None:
    """Print a row for each contestant, and for each M the speed in multiples of the base's."""
    parser = argparse.ArgumentParser(description="Products with quantised weights, against kept libraries.")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    told = measure(options.rounds)
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "base": BASE, "contestants": told}, indent=2))
        return
    print(f"{torch.get_num_threads()} threads; times as fast as {BASE} (microseconds)")
    print(f"{'':<36}" + "".join(f"{f'M = {rows}':>16}" for rows in ROWS) + f"{'error':>12}")
    for name, figures in told.items():
        cells = (figures[str(rows)] for rows in ROWS)
        shown = (f"{cell['times_base']:.2f} ({cell['microseconds']:.0f})" for cell in cells)
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in shown) + f"{figures['error']:>12.2e}")


if __name__ == "__main__":
    main()
