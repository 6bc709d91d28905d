"""Products with packed weights equal float64 products with what is stored, in any shape and any format."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from folo_kernels import library as native
from folo_kernels.matrix import Epilogue, Format, PackedMatrix, Plain

GROUP = 32
INPUTS = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 200, 333]))
OUTPUTS = st.one_of(st.integers(1, 70), st.sampled_from([128, 257]))
ROWS = st.one_of(st.integers(0, 14), st.sampled_from([31, 48, 95, 96, 97, 193, 200]))
FORMATS = st.sampled_from(Format)
GATES = {
    Epilogue.SILU_GATE: functional.silu,
    Epilogue.GELU_TANH_GATE: lambda x: functional.gelu(x, approximate="tanh"),
}

pytestmark = pytest.mark.usefixtures("library")


def linear(outputs, inputs, *, bias=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=random)
    return Plain(weight, torch.randn(outputs, generator=random) if bias else None)


def rounding(x, weight):
    """How far a float32 sum may be off. In 4 bits, a weight is a step and a minimum, which are summed apart."""
    size = weight.abs() + weight.abs().amax(dim=-1, keepdim=True)
    return 6e-8 * (8 + 2 * x.shape[-1] ** 0.5) * (x.double().abs() @ size.double().T) + 1e-30


def reference(x, weight, bias=None):
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()


def assert_close(found, wanted, bound):
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= bound).all()


@settings(max_examples=150, deadline=None)
@given(st.lists(OUTPUTS, min_size=1, max_size=4), INPUTS, ROWS, FORMATS, st.booleans())
def test_a_product_equals_the_float64_one(outputs, inputs, rows, weight_format, bias):
    parts = [linear(size, inputs, bias=bias and index != 1, seed=index) for index, size in enumerate(outputs)]
    matrix = PackedMatrix(parts, weight_format)
    x = torch.randn(rows, inputs)
    pieces = matrix.multiply(x).split(outputs, dim=-1)
    assert [weight.shape for weight in matrix.plain()] == [part.weight.shape for part in parts]
    for found, part, weight in zip(pieces, parts, matrix.plain(), strict=True):
        assert_close(found, reference(x, weight, part.bias), rounding(x, weight) + 1e-6)


@settings(max_examples=100, deadline=None)
@given(OUTPUTS, INPUTS, ROWS, FORMATS, st.booleans(), st.sampled_from(list(GATES)))
def test_a_gated_product_equals_the_float64_one(outputs, inputs, rows, weight_format, bias, epilogue):  # noqa: PLR0913, PLR0917 (hypothesis)
    parts = [linear(outputs, inputs, bias=bias, seed=index) for index in range(2)]
    matrix = PackedMatrix(parts, weight_format, gated=True)
    weights = matrix.plain()
    x = torch.randn(rows, inputs) * inputs**-0.5
    gate, value = (reference(x, weight, part.bias) for part, weight in zip(parts, weights, strict=True))
    gate_error, value_error = (rounding(x, weight) + 1e-6 for weight in weights)
    bound = 1.2 * gate_error * value.abs() + gate.abs() * value_error + 2e-6 * gate.abs() * value.abs() + 1e-6
    assert_close(matrix.multiply(x, epilogue), GATES[epilogue](gate) * value, bound)


@given(st.lists(OUTPUTS, min_size=1, max_size=4), INPUTS)
def test_float32_weights_come_back_as_they_were(outputs, inputs):
    parts = [linear(size, inputs, seed=index) for index, size in enumerate(outputs)]
    for found, part in zip(PackedMatrix(parts).plain(), parts, strict=True):
        assert torch.equal(found, part.weight)


@given(OUTPUTS, INPUTS, FORMATS)
def test_gated_weights_come_back_apart(outputs, inputs, weight_format):
    parts = [linear(outputs, inputs, seed=index) for index in range(2)]
    together = PackedMatrix(parts, weight_format, gated=True).plain()
    apart = [PackedMatrix([part], weight_format).plain()[0] for part in parts]
    assert all(map(torch.equal, together, apart))


@pytest.mark.parametrize("weight_format", Format)
@pytest.mark.parametrize("rows", [3, 30])
def test_rows_may_lie_anywhere(weight_format, rows):
    matrix = PackedMatrix([linear(19, 40, bias=True)], weight_format)
    x = torch.randn(rows, 40)
    wanted = matrix.multiply(x)
    wide = torch.full((rows, 97), torch.nan)
    wide[:, 5:45] = x
    assert torch.equal(matrix.multiply(wide[:, 5:45]), wanted)
    assert torch.equal(matrix.multiply(x.T.contiguous().T), wanted)
    assert torch.equal(matrix.multiply(x.view(1, rows, 40)), wanted[None])
    assert torch.equal(matrix.multiply(x.view(3, rows // 3, 40)), wanted.view(3, rows // 3, 19))
    assert torch.equal(matrix.multiply(x[:1].expand(rows, 40)), matrix.multiply(x[:1].repeat(rows, 1)))
    assert matrix.multiply(x[:0]).shape == (0, 19)


def groups(weight):
    """``[outputs, groups, GROUP]``, padded with zeros as the kernels do."""
    return functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).double()


def magnitudes(draw):
    """Weights of very different sizes, group by group, among them zeros and constants."""
    weight = torch.randn(
        5, draw(st.integers(1, 100)), generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))
    )
    weight *= 10.0 ** draw(st.integers(-30, 4))
    weight[1] = 0
    weight[2] = weight[2, 0]
    weight[3] *= torch.logspace(-6, 0, weight.shape[1])
    return weight


@given(st.data())
def test_eight_bits_are_off_by_half_a_step_at_most(data):
    weight = magnitudes(data.draw)
    found = PackedMatrix([Plain(weight)], Format.INT8).plain()[0]
    step = groups(weight).abs().amax(-1, keepdim=True) / 127
    error = (groups(found) - groups(weight)).abs()
    assert (error <= step * (0.5 + 1e-4)).all()
    assert torch.equal(found[1], weight[1])


@given(st.data())
def test_four_bits_are_off_by_half_a_step_on_average(data):
    """Steps may be chosen to end within the extreme weights, by 0.14 of the range at most, if that loses less."""
    weight = magnitudes(data.draw)
    found = PackedMatrix([Plain(weight)], Format.INT4).plain()[0]
    plain = groups(weight)
    low, high = plain.amin(-1, keepdim=True), plain.amax(-1, keepdim=True)
    half = 2.0**-11 * (high - low + plain.abs().amax(-1, keepdim=True)) + 2.0**-25 * 16
    error = (groups(found) - plain).abs()
    bound = (high - low) / 30 + half
    assert (error.square().mean(-1, keepdim=True).sqrt() <= bound).all()
    assert (error <= bound + 0.14 * (high - low)).all()
    assert torch.equal(found[1], weight[1])


@given(st.integers(0, 2**31), st.integers(-20, 3), st.integers(1, 4))
def test_four_bit_steps_keep_their_bits(seed, exponent, count):
    """Weights that were blocks of a GGUF file's Q4_1."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (7, count, GROUP), generator=random)
    codes[..., 0], codes[..., 1] = 0, 15
    codes = codes.gather(-1, torch.rand(codes.shape, generator=random).argsort(-1))
    step = (torch.rand(7, count, 1, generator=random) * 2.0**exponent).half()
    minimum = (step * -16 * torch.rand(7, count, 1, generator=random)).half()
    weight = (step.float() * codes + minimum.float()).flatten(1)
    assert torch.equal(PackedMatrix([Plain(weight)], Format.INT4).plain()[0], weight)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(50, 71), (64, 128), (7, 5)])
def test_a_rows_bits_depend_on_no_other_row(gated, outputs, inputs):
    matrix = PackedMatrix([linear(outputs, inputs, bias=True, seed=seed) for seed in range(2)], gated=gated)
    epilogue = Epilogue.SILU_GATE if gated else Epilogue.STORE
    x = torch.randn(200, inputs)
    wanted = matrix.multiply(x, epilogue)
    for rows in [*range(1, 41), 96, 97, 193]:
        first = 200 - rows
        assert torch.equal(matrix.multiply(x[first:], epilogue), wanted[first:]), rows


@pytest.mark.parametrize("weight_format", Format)
@pytest.mark.parametrize("rows", [1, 4, 5, 130])
def test_threads_change_no_bit(library, weight_format, rows):
    part, x = linear(333, 100, bias=True), torch.randn(rows, 100)
    cpus = tuple(sorted(os.sched_getaffinity(0)))[:2]
    found, weights = [], []
    try:
        for threads, bound_to in [(1, ()), (2, ()), (2, cpus), (3, cpus)]:
            native.use_threads(library, threads, bound_to)
            matrix = PackedMatrix([part], weight_format)
            weights.append(matrix.plain()[0])
            found.append(matrix.multiply(x))
            assert len(os.sched_getaffinity(0)) >= len(cpus), "the caller is free again"
    finally:
        native.use_threads(library, 2)
    assert all(torch.equal(each, found[0]) for each in found[1:])
    assert all(torch.equal(each, weights[0]) for each in weights[1:])


@pytest.mark.parametrize("weight_format", Format)
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(weight_format, rows, value):
    matrix = PackedMatrix([linear(21, 50)], weight_format)
    x = torch.randn(rows, 50)
    wanted = matrix.multiply(x)
    x[1, 7] = value
    found = matrix.multiply(x)
    others = torch.arange(rows) != 1
    assert torch.equal(found[others], wanted[others])
    assert not found[1].isfinite().any()


@pytest.mark.parametrize("epilogue", GATES)
def test_activations_hold_far_out_and_near_zero(epilogue):
    """One gate and a value of 1: the product is the activation itself."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    matrix = PackedMatrix([Plain(one), Plain(zero, torch.ones(1))], gated=True)
    tiny = torch.logspace(-30, 0, 200)
    far = torch.logspace(1, 4, 100)
    x = torch.cat([torch.linspace(-20, 20, 4001), tiny, -tiny, far, -far, torch.zeros(1)])[:, None]
    found, wanted = matrix.multiply(x, epilogue).double(), GATES[epilogue](x.double())
    assert ((found - wanted).abs() <= 1e-6 * x.double().abs()).all()
    near = x.abs() < 1
    assert ((found - wanted)[near].abs() <= 2e-6 * wanted[near].abs()).all()
    assert found[-1] == 0
    assert matrix.multiply(torch.tensor([[torch.nan]]), epilogue).isnan().all()


def test_weights_of_another_kind_are_refused():
    plain = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"weight: torch\.float64 on cpu: give float32 on the CPU"):
        PackedMatrix([Plain(plain.double())])
    with pytest.raises(ValueError, match=r"weight: torch\.bfloat16"):
        PackedMatrix([Plain(plain, torch.zeros(4, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"meta"):
        PackedMatrix([Plain(plain.to("meta"))])
    with pytest.raises(ValueError, match=r"\(4, 9\).*share their input"):
        PackedMatrix([Plain(plain), Plain(torch.randn(4, 9))])


def test_what_would_be_read_or_written_beyond_its_end_is_refused():
    matrix = PackedMatrix([linear(4, 8)])
    gated = PackedMatrix([linear(4, 8), linear(4, 8)], gated=True)
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"x: \(3, 16\).*8 inputs"):
        matrix.multiply(torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"x: .*torch\.float64.*float32"):
        matrix.multiply(x.double())
    with pytest.raises(ValueError, match=r"epilogue: STORE"):
        gated.multiply(x)
    with pytest.raises(ValueError, match=r"epilogue: SILU_GATE"):
        matrix.multiply(x, Epilogue.SILU_GATE)
    with pytest.raises(ValueError, match=r"epilogue: ADD"):
        matrix.multiply(x, Epilogue.ADD)
    with pytest.raises(ValueError, match=r"parts: 5"):
        PackedMatrix([linear(4, 8)] * 5)
    with pytest.raises(ValueError, match=r"parts: sizes \[4, 5\]"):
        PackedMatrix([linear(4, 8), linear(5, 8)], gated=True)
