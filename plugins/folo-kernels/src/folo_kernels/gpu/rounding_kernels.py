"""Numbers rounded to float8: rows for the products of low-bit weights, keys and values for their blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)
"""Of float8 e4m3."""

SMALLEST_SCALE = tl.constexpr(1e-12)
"""Of a row of zeros."""

WIDE = 4096
"""Features from which a row takes eight warps."""


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to float8 e4m3, scaled so that its largest number becomes the format's.

    One kernel, which may be captured in a CUDA graph.

    Args:
        x: ``[rows, features]``, of any floating dtype; a row's features are contiguous.

    Returns:
        ``[rows, features]`` in float8, and float32 scales ``[rows, 1]``: ``x`` is about their product.
    """
    rows, features = x.shape
    rounded = torch.empty((rows, features), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(features)
        _round_kernel[rows,](
            x, rounded, scales, x.stride(0), features, BLOCK=block, num_warps=8 if block >= WIDE else 4
        )
    return rounded, scales


@triton.jit
def store_rounded(place, x, mask):
    """Write float32 numbers in the dtype of their place; those too large for float8 as its largest, NaN as NaN."""
    if place.dtype.element_ty.primitive_bitwidth == 8:  # noqa: PLR2004 (bits of float8)
        x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place, x.to(place.dtype.element_ty), mask)


@triton.jit
def _round_kernel(x, rounded, scales, stride, features, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < features
    value = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=0) / LARGEST, SMALLEST_SCALE)
    value = tl.minimum(tl.maximum(value / scale, -LARGEST), LARGEST)
    tl.store(rounded + row * features + column, value.to(tl.float8e4nv), mask=mask)
    tl.store(scales + row, scale)
