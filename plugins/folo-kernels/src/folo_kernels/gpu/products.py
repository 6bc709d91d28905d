"""Products of some rows with the weights of a decoder layer, joined with what surrounds them.

For one to some hundred rows a product takes little longer than reading its weights, and each kernel beside it costs
as much as a third of that. Here a product takes the rows as the one before left them, and leaves them as the next one
wants them: norms, sums and activations need no kernels of their own.

Needs tensor descriptors, so a device of compute capability 9.0, or Triton's interpreter. Nothing here asks the device
for anything: all may be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from folo_kernels.gpu.layers import ACTIVATION_NUMBERS
from folo_kernels.gpu.product_kernels import gated_product_kernel, product_kernel, rotated_product_kernel

if TYPE_CHECKING:
    from folo_kernels.gpu.layers import Activation
    from folo_kernels.gpu.product_configs import ProductConfig

MOST_TILES = 8192
"""Tiles of a product whose inputs are shared out."""


@attrs.frozen(slots=True, eq=False)
class ScaledRows:
    """Rows on the way through an RMSNorm: what is missing is the division by the root of their squares' mean."""

    rows: torch.Tensor
    """``[rows, hidden]``, contiguous, times the norm's factor."""
    squares: torch.Tensor
    """float32 ``[rows, parts]``, contiguous: sums of the rows' squares before the factor, part by part."""
    epsilon: float
    """Added to the squares' mean."""


def new_counters(device: torch.device | str) -> torch.Tensor:
    """Zeros that products with shared inputs count in, and leave as zeros. For one stream; make it before a capture."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def multiply(
    x: torch.Tensor | ScaledRows,
    weight: torch.Tensor,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """``x W^T``, normed before if x is yet to be divided.

    Args:
        x: ``[rows, inputs]``, contiguous; its dtype is the weight's.
        weight: ``[outputs, inputs]``, contiguous; inputs are a multiple of 16 bytes.
        config: how to cut the product up.
        counters: see :func:`new_counters`.
        pdl: see ``layers``.

    Returns:
        ``[rows, outputs]``.

    Raises:
        ValueError: the tensors do not fit together.
    """
    rows = _source(x)[0]
    out = rows.new_empty(len(rows), len(weight))
    _launch_product(x, weight, out, config, counters, pdl=pdl)
    return out


def add_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Add ``x W^T`` to ``residual [rows, outputs]``, contiguous, in place; see :func:`multiply`."""
    _check_residual(x, weight, residual)
    _launch_product(x, weight, residual, config, counters, add=True, pdl=pdl)


def add_product_and_scale(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    factor: torch.Tensor,
    epsilon: float,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    pdl: bool = False,
) -> ScaledRows:
    """As :func:`add_product`; return the sums on the way through a norm of this float32 factor ``[outputs]``."""
    _check_residual(x, weight, residual)
    parts = triton.cdiv(len(weight), config.block_outputs)
    scaled = ScaledRows(
        torch.empty_like(residual), residual.new_empty(len(residual), parts, dtype=torch.float32), epsilon
    )
    _launch_product(x, weight, residual, config, counters, add=True, scaled=scaled, factor=factor, pdl=pdl)
    return scaled


def gated_product(
    x: torch.Tensor | ScaledRows,
    weight: torch.Tensor,
    activation: Activation,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """``activation(x G^T) * (x U^T)``, of a weight ``[2 * outputs, inputs]`` that holds G and then U.

    ``config.block_outputs`` counts those of the result, ``[rows, outputs]``; see :func:`multiply`.
    """
    rows, squares, epsilon, parts = _source(x)
    outputs, inputs = weight.shape[0] // 2, weight.shape[1]
    out = rows.new_empty(len(rows), outputs)
    if not len(rows):
        return out
    grid, common = _cut(rows, weight, outputs, config, counters, pdl=pdl)
    gated_product_kernel[grid](
        *_descriptors(rows, weight, config),
        weight,
        out,
        squares,
        _partials(rows, grid, 2 * config.block_outputs, config),
        counters,
        len(rows),
        epsilon,
        INPUTS=inputs,
        OUTPUTS=outputs,
        ACTIVATION=ACTIVATION_NUMBERS[activation],
        **parts,
        **common,
    )
    return out


@attrs.frozen(slots=True, eq=False, kw_only=True)
class Rotation:
    """Where queries, keys and values go, and how they are normed and turned; see ``layers.rotate_and_store``."""

    positions: torch.Tensor
    """int64 ``[rows]``."""
    cosines: torch.Tensor
    """``[max_positions, size]``: all of a head's features are turned."""
    sines: torch.Tensor
    slots: torch.Tensor
    """int64 ``[rows]``."""
    keys: torch.Tensor
    """``[num_blocks, kv_heads, block_size, size]``, contiguous, of the rows' dtype."""
    values: torch.Tensor
    query_norm: torch.Tensor | None
    """float32 ``[size]``; None for no norms of heads."""
    key_norm: torch.Tensor | None
    epsilon: float
    """Of these norms."""


def rotated_product(
    x: torch.Tensor | ScaledRows,
    weight: torch.Tensor,
    rotation: Rotation,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Queries ``[rows, heads, size]`` of a weight of queries, keys and values; those two go into their blocks.

    ``config.block_outputs`` is half a head: a program makes both halves; see :func:`multiply`.
    """
    rows, squares, epsilon, parts = _source(x)
    _check_rotation(rows, weight, rotation, config)
    _, kv_heads, block_size, size = rotation.keys.shape
    heads = len(weight) // size - 2 * kv_heads
    query = rows.new_empty(len(rows), heads, size)
    if not len(rows):
        return query
    grid, common = _cut(rows, weight, len(weight) // 2, config, counters, pdl=pdl)
    rotated_product_kernel[grid](
        *_descriptors(rows, weight, config),
        weight,
        squares,
        _partials(rows, grid, size, config),
        counters,
        rotation.positions,
        rotation.slots,
        rotation.cosines,
        rotation.sines,
        query if rotation.query_norm is None else rotation.query_norm,
        query if rotation.key_norm is None else rotation.key_norm,
        query,
        rotation.keys,
        rotation.values,
        len(rows),
        epsilon,
        rotation.epsilon,
        INPUTS=weight.shape[1],
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        NORM=rotation.query_norm is not None,
        **parts,
        **common,
    )
    return query


def rotates(weight: torch.Tensor, rotary_size: int, keys: torch.Tensor, config: ProductConfig) -> bool:
    """Whether :func:`rotated_product` computes such heads: all is turned, and blocks hold numbers of the same dtype."""
    return keys.dtype == weight.dtype and rotary_size == keys.shape[3] == 2 * config.block_outputs


def _launch_product(
    x: torch.Tensor | ScaledRows,
    weight: torch.Tensor,
    out: torch.Tensor,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    add: bool = False,
    scaled: ScaledRows | None = None,
    factor: torch.Tensor | None = None,
    pdl: bool,
) -> None:
    rows, squares, epsilon, parts = _source(x)
    outputs, inputs = weight.shape
    if not len(rows):
        return
    grid, common = _cut(rows, weight, outputs, config, counters, pdl=pdl)
    product_kernel[grid](
        *_descriptors(rows, weight, config),
        weight,
        out,
        out if scaled is None else scaled.rows,
        out if factor is None else factor,
        squares,
        out if scaled is None else scaled.squares,
        _partials(rows, grid, config.block_outputs, config),
        counters,
        len(rows),
        epsilon,
        INPUTS=inputs,
        OUTPUTS=outputs,
        ADD=add,
        SCALE=scaled is not None,
        **parts,
        **common,
    )


def _cut(
    rows: torch.Tensor,
    weight: torch.Tensor,
    outputs: int,
    config: ProductConfig,
    counters: torch.Tensor,
    *,
    pdl: bool,
) -> tuple[tuple[int], dict[str, Any]]:
    """The number of programs, and what both kernels are told about their tiles."""
    _check_product(rows, weight)
    tiles = triton.cdiv(len(rows), config.block_rows) * triton.cdiv(outputs, config.block_outputs)
    if config.splits > 1 and tiles > len(counters):
        raise ValueError(f"rows: {tuple(rows.shape)}: {tiles} tiles, but {len(counters)} counters: give fewer rows")
    sizes = {
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_OUT": config.block_outputs,
        "BLOCK_IN": config.block_inputs,
        "SPLITS": config.splits,
        "PDL": pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (tiles * config.splits,), sizes | ({"launch_pdl": True} if pdl else {})


def _descriptors(rows: torch.Tensor, weight: torch.Tensor, config: ProductConfig) -> list[Any]:
    return [
        TensorDescriptor.from_tensor(rows, [config.block_rows, config.block_inputs]),
        TensorDescriptor.from_tensor(weight, [config.block_outputs, config.block_inputs]),
    ]


def _partials(rows: torch.Tensor, grid: tuple[int], outputs: int, config: ProductConfig) -> torch.Tensor:
    """Room for the sums of all programs, of a tile of so many outputs each."""
    count = grid[0] * outputs * config.block_rows if config.splits > 1 else 0
    return rows.new_empty(max(count, 1), dtype=torch.float32)


def _source(x: torch.Tensor | ScaledRows) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, int]]:
    """Rows, the sums of their squares (any tensor where nothing is to be divided), epsilon, and parts of the sums."""
    if not isinstance(x, ScaledRows):
        return x, x, 0.0, {"PARTS": 0, "PARTS_TILE": 1}
    parts = x.squares.shape[1]
    return x.rows, x.squares, x.epsilon, {"PARTS": parts, "PARTS_TILE": triton.next_power_of_2(max(parts, 1))}


def _check_product(rows: torch.Tensor, weight: torch.Tensor) -> None:
    fits = rows.is_contiguous() and weight.is_contiguous() and rows.shape[1] == weight.shape[1]
    if not fits or rows.dtype != weight.dtype or rows.shape[1] * rows.element_size() % 16:
        raise ValueError(
            f"x: {tuple(rows.shape)} of {rows.dtype}, weight: {tuple(weight.shape)} of {weight.dtype}: give rows as "
            "wide as the weight and of its dtype, both contiguous, and a multiple of 16 bytes wide"
        )


def _check_rotation(rows: torch.Tensor, weight: torch.Tensor, rotation: Rotation, config: ProductConfig) -> None:
    keys, cosines = rotation.keys, rotation.cosines
    is_contiguous = all(each.is_contiguous() for each in (keys, rotation.values, cosines, rotation.sines))
    if not rotates(weight, cosines.shape[1], keys, config) or not is_contiguous:
        raise ValueError(
            f"keys: {tuple(keys.shape)} of {keys.dtype}, cosines: {tuple(cosines.shape)}: give contiguous ones of "
            f"{weight.dtype}, heads of {2 * config.block_outputs} features, all of them turned"
        )
    if len(rotation.positions) != len(rows) or len(rotation.slots) != len(rows):
        raise ValueError(f"positions: {tuple(rotation.positions.shape)}: give one of each of {len(rows)} rows")
    if (rotation.query_norm is None) != (rotation.key_norm is None):
        raise ValueError(f"key_norm: {rotation.key_norm}: give both norms or neither")


def _check_residual(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> None:
    wanted = (len(x), len(weight))
    if residual.shape != wanted or not residual.is_contiguous() or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: {tuple(residual.shape)} of {residual.dtype}: give contiguous rows {wanted} of {x.dtype}"
        )
