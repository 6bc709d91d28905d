"""How products of some rows are cut up, as measured: ``bench/gpu/layers.py --only products --tune`` prints the table.

Importing this module imports neither torch nor Triton.
"""

from __future__ import annotations

from typing import Literal

import attrs

Part = Literal["rotated", "qkv", "out", "gate_up", "down"]
"""A decoder layer's products; the first is that of queries, keys and values together with their rotation."""


@attrs.frozen(slots=True)
class ProductConfig:
    """A program makes ``block_outputs`` outputs of ``block_rows`` rows, ``block_inputs`` inputs at a time."""

    block_rows: int
    block_outputs: int
    block_inputs: int
    splits: int = 1
    """Programs that share a tile's inputs; the last one adds up."""
    num_warps: int = 4
    num_stages: int = 4


Measured = dict[int, ProductConfig | None]
"""The best configuration for up to so many rows, ascending; None where torch's product and the kernels beside it are
faster, as they are beyond the last."""


def _rows(*columns: tuple[int, ...]) -> Measured:
    """Rows and the numbers of their configuration, of which there are none for None."""
    return {rows: ProductConfig(*numbers) if numbers else None for rows, *numbers in columns}


TABLE: dict[tuple[Part, int, int], Measured] = {
    # Qwen3-0.6B on an H100. Each configuration is compiled at the first start, so neighbours share one where that costs
    # next to nothing.
    ("qkv", 4096, 1024): _rows(
        (64, 32, 64, 128, 1, 4, 6),
    ),
    ("out", 1024, 2048): _rows(
        (64, 32, 64, 128, 4, 4, 4),
        (128, 64, 32, 128, 4, 4, 4),
        (256, 64, 64, 128, 2, 4, 4),
    ),
    ("gate_up", 6144, 1024): _rows(
        (64, 32, 64, 128, 1, 4, 5),
        (128, 64, 64, 128, 1, 4, 4),
        (256, 64, 128, 64, 1, 4, 5),
    ),
    ("down", 1024, 3072): _rows(
        (64, 32, 64, 128, 4, 4, 6),
        (256, 64, 64, 128, 2, 4, 6),
    ),
    # Llama-3.1-8B on an H100. Up to 64 rows were not measured.
    ("qkv", 6144, 4096): _rows(
        (64,),
        (128, 128, 64, 128, 1, 4, 4),
    ),
    ("out", 4096, 4096): _rows(
        (128,),
        (256, 128, 64, 128, 1, 4, 4),
    ),
    ("gate_up", 28672, 4096): _rows(
        (64,),
        (128, 128, 64, 128, 1, 4, 3),
        (256, 128, 128, 64, 1, 8, 4),
    ),
    ("down", 4096, 14336): _rows(
        (64,),
        (128, 128, 64, 128, 2, 4, 4),
    ),
}
"""By part, outputs and inputs of the weight; whatever is not listed is multiplied by torch."""

MOST_ROWS = 256
"""Beyond so many rows all products are torch's."""

OVERLAPPED = {1024: range(17, 129)}
"""By hidden size, numbers of rows for which a step is faster if products are launched while their predecessors still
run. For 4,096 it was far slower."""


def config_for(part: Part, rows: int, outputs: int, inputs: int) -> ProductConfig | None:
    """The measured configuration, or None where torch's product is to be taken."""
    measured = TABLE.get((part, outputs, inputs), {})
    return next((config for most, config in measured.items() if rows <= most), None)
