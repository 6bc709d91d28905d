"""Rows rounded to float8: in Triton's interpreter on a CPU, compiled on a CUDA device."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from folo_kernels.gpu.rounding_kernels import round_rows

PLACES = [
    pytest.param(
        ("cpu", torch.float32),
        id="interpreted",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was imported for a CUDA device"
        ),
    ),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), id="cuda-float16", marks=pytest.mark.gpu),
]


@pytest.fixture(params=PLACES)
def place(request):
    if request.param[0] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (nox -s gpu)")
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize(("rows", "features"), [(1, 16), (3, 100), (5, 576)])
def test_rows_are_scaled_to_the_formats_range_and_rounded(place, rows, features):
    x = (torch.randn(rows, features) * torch.logspace(-3, 3, rows)[:, None]).to(*place)
    rounded, scales = round_rows(x)
    assert (rounded.shape, rounded.dtype) == (x.shape, torch.float8_e4m3fn)
    wanted = x.float().abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(scales, wanted, rtol=1e-6, atol=0)
    exact = (x.float() / wanted).to(torch.float8_e4m3fn).float()
    if place[0] == "cuda":
        torch.testing.assert_close(rounded.float(), exact)
    # Triton's interpreter (3.6) cuts off where a device rounds, and loses what is carried into the exponent.
    carried = torch.frexp(exact).exponent != torch.frexp(x.float() / wanted).exponent
    error = (rounded.float() - exact).abs()
    assert (carried | (error <= exact.abs() / 8 + 2**-8)).all()
    assert carried.float().mean() < 0.1


def test_a_row_of_zeros_stays_zero(place):
    rounded, scales = round_rows(torch.zeros(2, 32).to(*place))
    assert not rounded.float().any()
    assert scales.isfinite().all()


def test_rows_may_lie_apart(place):
    wide = torch.randn(4, 64).to(*place)
    x = wide[:, :32]
    for found, wanted in zip(round_rows(x), round_rows(x.contiguous()), strict=True):
        assert torch.equal(found.float(), wanted.float())


def test_no_rows_are_no_launch(place):
    rounded, scales = round_rows(torch.zeros(0, 32).to(*place))
    assert (rounded.shape, scales.shape) == ((0, 32), (0, 1))
