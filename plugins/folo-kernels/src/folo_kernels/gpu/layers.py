"""What a decoder layer computes besides attention and large products, in few kernels.

A step of one token reads every weight once and does little else, so what counts is how few kernels it takes and how
evenly each reads its memory. No function here asks the device for anything or depends on what its tensors hold: all
may be captured in a CUDA graph.

With ``pdl``, a kernel is launched while its predecessor still runs and waits for it itself (programmatic dependent
launch, from compute capability 9.0 on). All that it reads before it waits is weights, which no kernel writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from folo_kernels.gpu.rounding_kernels import store_rounded

if TYPE_CHECKING:
    import torch

Activation = Literal["silu", "gelu_tanh", "gelu"]

ACTIVATION_NUMBERS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}

SMALL_ROW, LARGE_ROW = 1024, 8192
"""Features up to which a norm's row takes four warps, and up to which it takes eight."""

HEADS_AT_ONCE, HEADS_A_WARP = 8, 4
"""Heads that one program rotates where there are many tokens; at few tokens it takes one, to use more processors."""
FEW_TOKENS = 32

GATED_BLOCK = 1024

MOST_THIN_ROWS = 16
"""Rows beyond which a thin product is no longer one."""


@attrs.frozen(slots=True, kw_only=True)
class ThinConfig:
    """How a thin product is cut up. A program makes ``block_outputs`` outputs, ``block_inputs`` inputs at a time."""

    block_outputs: int
    block_inputs: int
    num_warps: int = 4
    num_stages: int = 3
    dot: bool = False
    """Multiply on tensor cores, which takes at least 16 outputs and pads rows to 16."""


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    factor: torch.Tensor,
    epsilon: float,
    *,
    post: torch.Tensor | None = None,
    post_epsilon: float | None = None,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``x`` to ``residual`` in place, and return the RMSNorm of the sum, and ``residual``.

    Args:
        x: ``[rows, hidden]``, contiguous: what a part of the layer adds.
        residual: ``[rows, hidden]``, contiguous, of x's dtype.
        factor: float32 ``[hidden]``: the norm is ``v / sqrt(mean(v^2) + epsilon) * factor``, computed in float32.
        epsilon: of that norm.
        post: float32 ``[hidden]``: x is normalised with this factor before it is added.
        post_epsilon: of the norm before; None for epsilon.
        pdl: see the module.
    """
    epsilons = epsilon, epsilon if post_epsilon is None else post_epsilon
    return _launch_norm(x, residual, factor, epsilons, post, pdl=pdl), residual


def norm(x: torch.Tensor, factor: torch.Tensor, epsilon: float, *, pdl: bool = False) -> torch.Tensor:
    """RMSNorm of rows ``[rows, hidden]``, contiguous; see :func:`add_norm`."""
    return _launch_norm(x, None, factor, (epsilon, epsilon), None, pdl=pdl)


def _launch_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    factor: torch.Tensor,
    epsilons: tuple[float, float],
    post: torch.Tensor | None,
    *,
    pdl: bool,
) -> torch.Tensor:
    rows, hidden = x.shape
    _check_rows("x", x)
    if residual is not None and (residual.shape != x.shape or not residual.is_contiguous()):
        raise ValueError(f"residual: {tuple(residual.shape)}: give contiguous rows of x's shape {tuple(x.shape)}")
    normed = x.new_empty(rows, hidden)
    if rows:
        _norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            factor,
            factor if post is None else post,
            normed,
            hidden,
            *epsilons,
            ADD=residual is not None,
            POST=post is not None,
            PDL=pdl,
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=4 if hidden <= SMALL_ROW else 8 if hidden <= LARGE_ROW else 16,
            **_pdl(pdl),
        )
    return normed


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_out: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    pdl: bool = False,
) -> None:
    """Normalise and turn queries and keys, and write keys and values into their blocks.

    The first ``rotary_size`` features of a head are turned: the first half of them against the second.

    Args:
        qkv: ``[tokens, (heads + 2 * kv_heads) * size]``, contiguous: queries of all heads, then keys, then values.
        positions: int64 ``[tokens]``.
        cosines: ``[max_positions, rotary_size]``.
        sines: as cosines.
        slots: int64 ``[tokens]``: ``block * block_size + offset`` of each token.
        keys: one layer's ``[num_blocks, kv_heads, block_size, size]``, contiguous.
        values: as keys.
        query_out: ``[tokens, heads, size]``, contiguous; written.
        query_norm: float32 ``[size]``: factor of an RMSNorm of each head's queries, before they are turned. None for
            no norms at all.
        key_norm: as query_norm, for keys; both or neither.
        epsilon: of these norms.
        key_scale: what is written is ``key / key_scale``; for keys stored in float8.
        value_scale: as key_scale.
        pdl: see the module.
    """
    tokens, heads, size = query_out.shape
    _, kv_heads, block_size, _ = keys.shape
    _check_rotation(qkv, cosines, keys, query_out, query_norm, key_norm)
    if not tokens:
        return
    together = HEADS_AT_ONCE if tokens > FEW_TOKENS else 1
    _rotate_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, together))](
        qkv,
        positions,
        slots,
        cosines,
        sines,
        cosines if query_norm is None else query_norm,
        cosines if key_norm is None else key_norm,
        query_out,
        keys,
        values,
        epsilon,
        1 / key_scale,
        1 / value_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        ROTARY=cosines.shape[1],
        BLOCK_SIZE=block_size,
        NORM=query_norm is not None,
        PDL=pdl,
        TOGETHER=together,
        HALF=triton.next_power_of_2(cosines.shape[1] // 2),
        REST=triton.next_power_of_2(max(1, size - cosines.shape[1])),
        num_warps=max(1, together // HEADS_A_WARP),
        **_pdl(pdl),
    )


def gated(gate_up: torch.Tensor, activation: Activation, *, pdl: bool = False) -> torch.Tensor:
    """``activation(gate) * up``: ``[rows, 2 * n] -> [rows, n]``, of rows that hold the gate and then the values."""
    rows, width = gate_up.shape
    _check_rows("gate_up", gate_up)
    out = gate_up.new_empty(rows, width // 2)
    if rows:
        block = min(GATED_BLOCK, triton.next_power_of_2(width // 2))
        grid = (rows, triton.cdiv(width // 2, block))
        number = ACTIVATION_NUMBERS[activation]
        _gated_kernel[grid](gate_up, out, width // 2, ACTIVATION=number, PDL=pdl, BLOCK=block, **_pdl(pdl))
    return out


def thin_config(rows: int, outputs: int, inputs: int) -> ThinConfig:
    """How a product of these sizes is cut up unless the caller says."""
    if rows > 2 and outputs >= 16 and inputs >= 16:  # noqa: PLR2004 (the smallest tile of tensor cores)
        return ThinConfig(
            block_outputs=16, block_inputs=min(256, triton.next_power_of_2(inputs)), num_warps=4, dot=True
        )
    block_inputs = min(1024 // rows, triton.next_power_of_2(inputs))
    return ThinConfig(block_outputs=4, block_inputs=block_inputs)


def thin_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    epsilon: float = 0.0,
    activation: Activation | None = None,
    add_to: torch.Tensor | None = None,
    config: ThinConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """``x W^T + bias`` for a few rows, where reading the weights takes all the time.

    Args:
        x: ``[rows, inputs]``, contiguous, at most 16 rows.
        weight: ``[outputs, inputs]``, contiguous.
        bias: ``[outputs]``.
        factor: float32 ``[inputs]``: x is normalised with it first (see :func:`add_norm`).
        epsilon: of that norm.
        activation: the outputs are a gate and its values, each half of them: ``activation(gate) * value`` is returned.
        add_to: ``[rows, outputs]``, contiguous: the product is added to it in place, and it is returned.
        config: how to cut the product up.
        pdl: see the module.

    Returns:
        ``[rows, outputs]``, half as many outputs with an activation.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check_thin(x, weight, activation, add_to)
    rows, inputs = x.shape
    outputs = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = x.new_empty(rows, outputs) if add_to is None else add_to
    if not rows:
        return out
    config = config or thin_config(rows, outputs, inputs)
    kernel = _thin_dot_kernel if config.dot else _thin_kernel
    kernel[(triton.cdiv(outputs, config.block_outputs),)](
        x,
        weight,
        weight if bias is None else bias,
        weight if factor is None else factor,
        out,
        rows,
        outputs,
        epsilon,
        INPUTS=inputs,
        ROWS=16 if config.dot else triton.next_power_of_2(rows),
        BLOCK_OUT=config.block_outputs,
        BLOCK_IN=config.block_inputs,
        NORM=factor is not None,
        BIAS=bias is not None,
        ADD=add_to is not None,
        ACTIVATION=ACTIVATION_NUMBERS[activation],
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **_pdl(pdl),
    )
    return out


def _pdl(pdl: bool) -> dict[str, bool]:  # noqa: FBT001 (passed on)
    return {"launch_pdl": True} if pdl else {}


def _check_rows(name: str, x: torch.Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name}: strides {x.stride()}: give contiguous rows")


def _check_rotation(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    keys: torch.Tensor,
    query_out: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
) -> None:
    tokens, heads, size = query_out.shape
    width = (heads + 2 * keys.shape[1]) * size
    if qkv.shape != (tokens, width) or not qkv.is_contiguous() or not query_out.is_contiguous():
        raise ValueError(f"qkv: {tuple(qkv.shape)}: give contiguous rows {(tokens, width)} and a contiguous query_out")
    fits = keys.shape[3] == size and 0 < cosines.shape[1] <= size and cosines.shape[1] % 2 == 0
    if not fits or not keys.is_contiguous() or not cosines.is_contiguous():
        raise ValueError(
            f"keys: {tuple(keys.shape)}, cosines: {tuple(cosines.shape)}: give contiguous ones, heads of {size} "
            "features, and turn an even number of them"
        )
    if (query_norm is None) != (key_norm is None):
        raise ValueError(f"key_norm: {key_norm}: give both norms or neither")


def _check_thin(
    x: torch.Tensor, weight: torch.Tensor, activation: Activation | None, add_to: torch.Tensor | None
) -> None:
    rows, inputs = x.shape
    if rows > MOST_THIN_ROWS or not x.is_contiguous() or not weight.is_contiguous() or weight.shape[1] != inputs:
        raise ValueError(
            f"x: {tuple(x.shape)}, weight: {tuple(weight.shape)}: give at most {MOST_THIN_ROWS} rows, "
            "as wide as the weight, both contiguous"
        )
    if add_to is not None and (
        activation is not None or add_to.shape != (rows, weight.shape[0]) or not add_to.is_contiguous()
    ):
        raise ValueError(
            f"add_to: {tuple(add_to.shape)}: give contiguous rows as wide as the product, and no activation"
        )


@triton.jit
def _await(PDL: tl.constexpr):
    """Let the next kernel be launched, and wait for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):  # noqa: ANN201 (Triton's tensors have no types)
    """The activation of this number."""
    if ACTIVATION == 1:
        return x * tl.sigmoid(x)
    elif ACTIVATION == 2:  # noqa: PLR2004 (see ACTIVATION_NUMBERS)
        # tanh(y) = 2 sigmoid(2 y) - 1
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _norm_kernel(
    x, residual, factor, post, normed, hidden, epsilon, post_epsilon,
    ADD: tl.constexpr, POST: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    start = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    scale = tl.load(factor + column, mask=mask, other=0.0)
    _await(PDL)
    value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
    if POST:
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / hidden + post_epsilon)
        value *= tl.load(post + column, mask=mask, other=0.0)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    if ADD:
        value += tl.load(residual + start + column, mask=mask, other=0.0).to(tl.float32)
        # What is normalised is the sum as it is kept.
        value = value.to(residual.dtype.element_ty)
        tl.store(residual + start + column, value, mask=mask)
        value = value.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / hidden + epsilon) * scale
    tl.store(normed + start + column, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    qkv, positions, slots, cosines, sines, query_norm, key_norm, query, keys, values, epsilon, key_factor, value_factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, ROTARY: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr, TOGETHER: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, be they of queries, keys or values; two halves are turned, and a rest may stay."""
    _await(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    row = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE
    feature = tl.arange(0, HALF)[None, :]
    second, rest = feature + ROTARY // 2, ROTARY + tl.arange(0, REST)[None, :]
    exists, is_turned = head < HEADS + 2 * KV_HEADS, feature < ROTARY // 2
    x = tl.load(row + feature, mask=exists & is_turned, other=0.0).to(tl.float32)
    y = tl.load(row + second, mask=exists & is_turned, other=0.0).to(tl.float32)
    z = tl.zeros([TOGETHER, REST], tl.float32)
    if ROTARY < SIZE:
        z = tl.load(row + rest, mask=exists & (rest < SIZE), other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1) + tl.sum(z * z, axis=1)
        inverse = tl.where(is_value, 1.0, tl.rsqrt(squares / SIZE + epsilon)[:, None])
        x *= inverse * _head_factor(query_norm, key_norm, feature, is_query, is_value, SIZE)
        y *= inverse * _head_factor(query_norm, key_norm, second, is_query, is_value, SIZE)
        z *= inverse * _head_factor(query_norm, key_norm, rest, is_query, is_value, SIZE)
    angle = tl.load(positions + token) * ROTARY
    turned = _turn(x, -y, cosines + angle + feature, sines + angle + feature, is_turned, is_value)
    y = _turn(y, x, cosines + angle + second, sines + angle + second, is_turned, is_value)
    slot = tl.load(slots + token)
    kv_head = head - HEADS - tl.where(is_value, KV_HEADS, 0)
    to_query = query + (token * HEADS + head) * SIZE
    place = ((slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * SIZE
    is_key = exists & (head >= HEADS) & (head < HEADS + KV_HEADS)
    to_key, to_value, is_value = keys + place, values + place, exists & is_value
    _put(turned, to_query, to_key, to_value, feature, is_turned, is_query, is_key, is_value, key_factor, value_factor)
    _put(y, to_query, to_key, to_value, second, is_turned, is_query, is_key, is_value, key_factor, value_factor)
    if ROTARY < SIZE:
        _put(z, to_query, to_key, to_value, rest, rest < SIZE, is_query, is_key, is_value, key_factor, value_factor)


@triton.jit
def _head_factor(query_norm, key_norm, feature, is_query, is_value, SIZE: tl.constexpr):
    """The norm's factor of each head's features; values have none."""
    query = tl.load(query_norm + feature, mask=feature < SIZE, other=0.0)
    key = tl.load(key_norm + feature, mask=feature < SIZE, other=0.0)
    return tl.where(is_value, 1.0, tl.where(is_query, query, key))


@triton.jit
def _turn(x, against, cosines, sines, mask, is_value):
    """One half of the heads' turned features; values stay."""
    cosine = tl.load(cosines, mask=mask, other=0.0).to(tl.float32)
    sine = tl.load(sines, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_value, x, x * cosine + against * sine)


@triton.jit
def _put(
    x, query, keys, values, feature, mask, is_query, is_key, is_value, key_factor, value_factor,
):  # fmt: skip
    """Write each head's features where they belong."""
    tl.store(query + feature, x.to(query.dtype.element_ty), mask & is_query)
    store_rounded(keys + feature, x * key_factor, mask & is_key)
    store_rounded(values + feature, x * value_factor, mask & is_value)


@triton.jit
def _gated_kernel(gate_up, out, width, ACTIVATION: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """A stretch of one row."""
    _await(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    # As the layers round: the activation first, then its product.
    gate = activated(gate, ACTIVATION).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (gate * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _thin_kernel(
    x, weight, bias, factor, out, rows, outputs, epsilon,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows, multiplied on the plain cores; each turn's weights are read during the one before."""
    output = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    row = tl.arange(0, ROWS)
    first = weight + output[:, None] * INPUTS + column[None, :]
    second = first + outputs * INPUTS
    within = (output < outputs)[:, None]
    w = tl.load(first, mask=within & (column < INPUTS)[None, :], other=0.0)
    v = w
    if ACTIVATION:
        v = tl.load(second, mask=within & (column < INPUTS)[None, :], other=0.0)
    _await(PDL)
    total = tl.zeros([ROWS, BLOCK_OUT, BLOCK_IN], tl.float32)
    total_up = tl.zeros([ROWS, BLOCK_OUT, BLOCK_IN], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_IN], tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        mask = (row < rows)[:, None] & (start + column < INPUTS)[None, :]
        a = tl.load(x + row[:, None] * INPUTS + start + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= tl.load(factor + start + column, mask=start + column < INPUTS, other=0.0)[None, :]
        total += w.to(tl.float32)[None, :, :] * a[:, None, :]
        if ACTIVATION:
            total_up += v.to(tl.float32)[None, :, :] * a[:, None, :]
        ahead = within & (start + BLOCK_IN + column < INPUTS)[None, :]
        w = tl.load(first + start + BLOCK_IN, mask=ahead, other=0.0)
        if ACTIVATION:
            v = tl.load(second + start + BLOCK_IN, mask=ahead, other=0.0)
    y = _finished(tl.sum(total, axis=2), squares, epsilon, bias, output, outputs, INPUTS, NORM, BIAS)
    if ACTIVATION:
        up = _finished(tl.sum(total_up, axis=2), squares, epsilon, bias + outputs, output, outputs, INPUTS, NORM, BIAS)
        y = activated(y, ACTIVATION) * up
    place = out + row[:, None] * outputs + output[None, :]
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    if ADD:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _finished(
    y, squares, epsilon, bias, output, outputs,
    INPUTS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A product ``[rows, outputs]`` with the rows' norms and the bias."""
    if NORM:
        y = y * tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + epsilon)[:, None]
    if BIAS:
        y += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _thin_dot_kernel(
    x, weight, bias, factor, out, rows, outputs, epsilon,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of all rows, multiplied on tensor cores."""
    output = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    row = tl.arange(0, ROWS)
    first = weight + output[None, :] * INPUTS + column[:, None]
    second = first + outputs * INPUTS
    within = (output < outputs)[None, :]
    _await(PDL)
    total = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    total_up = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_IN], tl.float32)
    for start in range(0, INPUTS, BLOCK_IN):
        is_input = start + column < INPUTS
        w = tl.load(first + start, mask=within & is_input[:, None], other=0.0)
        mask = (row < rows)[:, None] & is_input[None, :]
        a = tl.load(x + row[:, None] * INPUTS + start + column[None, :], mask=mask, other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += wide * wide
            a = (wide * tl.load(factor + start + column, mask=is_input, other=0.0)[None, :]).to(w.dtype)
        total = tl.dot(a, w, total, input_precision="ieee")
        if ACTIVATION:
            v = tl.load(second + start, mask=within & is_input[:, None], other=0.0)
            total_up = tl.dot(a, v, total_up, input_precision="ieee")
    y = _finished(total, squares, epsilon, bias, output, outputs, INPUTS, NORM, BIAS)
    if ACTIVATION:
        up = _finished(total_up, squares, epsilon, bias + outputs, output, outputs, INPUTS, NORM, BIAS)
        y = activated(y, ACTIVATION) * up
    place = out + row[:, None] * outputs + output[None, :]
    mask = (row < rows)[:, None] & (output < outputs)[None, :]
    if ADD:
        y = y.to(out.dtype.element_ty).to(tl.float32) + tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, y.to(out.dtype.element_ty), mask=mask)
