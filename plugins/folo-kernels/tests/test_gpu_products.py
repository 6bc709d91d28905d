"""Products joined with what surrounds them against plain torch: in Triton's interpreter, and on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from folo_kernels.gpu import layers, product_configs, product_kernels, products
from folo_kernels.gpu.product_configs import ProductConfig, config_for

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was imported for a CUDA device"
)
HAS_DESCRIPTORS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
PLACES = [
    pytest.param(("cpu", torch.float32), id="interpreted", marks=INTERPRETED),
    pytest.param(("cuda", torch.bfloat16), id="cuda", marks=pytest.mark.gpu),
]
EPSILON = 1e-5
WHOLE, SHARED = ProductConfig(16, 16, 16), ProductConfig(16, 16, 16, splits=2)
LARGE = [ProductConfig(32, 64, 64, 1, 4, 4), ProductConfig(64, 64, 128, 4, 4, 3), ProductConfig(16, 32, 128, 2, 4, 4)]


@pytest.fixture(params=PLACES)
def place(request):
    if request.param[0] == "cuda" and not HAS_DESCRIPTORS:
        pytest.skip("needs a CUDA device of compute capability 9.0")
    torch.manual_seed(0)
    return request.param


def make(place, *shape, dtype=None):
    return torch.randn(*shape).to(place[0], dtype or place[1])


def cases(place, sizes=(24, 40)):
    """Rows, outputs and inputs of which none are a multiple of the tile, and configurations."""
    if place[0] == "cpu":
        return [((19, *sizes), WHOLE), ((3, *sizes), SHARED)]
    return [((rows, 1000, 1032), config) for rows in (2, 65, 250) for config in LARGE]


def assert_near(found, wanted):
    """``wanted`` was computed in float64 from the same inputs."""
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def scaled(x, factor):
    """What a product before leaves of rows for a norm: their squares in three parts."""
    parts = torch.stack([part.float().square().sum(-1) for part in x.chunk(3, dim=-1)], dim=-1)
    return products.ScaledRows((x.float() * factor).to(x.dtype), parts.contiguous(), EPSILON)


def rms(x, factor):
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * factor.double()


@pytest.mark.parametrize("normed", [False, True])
def test_a_product_of_rows_and_of_rows_yet_to_be_divided(place, normed):
    counters = products.new_counters(place[0])
    for (rows, outputs, inputs), config in cases(place):
        x, weight = make(place, rows, inputs) * 3, make(place, outputs, inputs) * inputs**-0.5
        factor = make(place, inputs, dtype=torch.float32)
        given, wanted = (scaled(x, factor), rms(x, factor)) if normed else (x, x.double())
        found = products.multiply(given, weight, config, counters)
        assert_near(found, wanted @ weight.double().T)
        assert not counters.any()


def test_a_product_added_to_rows_that_are_then_normed(place):
    counters = products.new_counters(place[0])
    for (rows, outputs, inputs), config in cases(place):
        x, weight = make(place, rows, inputs), make(place, outputs, inputs) * inputs**-0.5
        residual, factor = make(place, rows, outputs), make(place, outputs, dtype=torch.float32)
        wanted, only_added = residual.double() + x.double() @ weight.double().T, residual.clone()
        found = products.add_product_and_scale(x, weight, residual, factor, EPSILON, config, counters)
        products.add_product(x, weight, only_added, config, counters)
        assert_near(residual, wanted)
        torch.testing.assert_close(only_added, residual, rtol=0, atol=0)
        assert_near(found.rows, residual.double() * factor.double())
        torch.testing.assert_close(found.squares.sum(-1), residual.float().square().sum(-1), rtol=1e-4, atol=1e-4)
        assert found.epsilon == EPSILON
        assert not counters.any()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_a_gated_product(place, activation):
    counters = products.new_counters(place[0])
    for (rows, outputs, inputs), config in cases(place):
        x, weight = make(place, rows, inputs) * 3, make(place, 2 * outputs, inputs) * inputs**-0.5
        factor = make(place, inputs, dtype=torch.float32)
        for given, normed in ((x, x.double()), (scaled(x, factor), rms(x, factor))):
            found = products.gated_product(given, weight, activation, config, counters)
            gate, up = (normed @ weight.double().T).chunk(2, dim=-1)
            approximate = {"approximate": "tanh"} if activation == "gelu_tanh" else {}
            gate = functional.silu(gate) if activation == "silu" else functional.gelu(gate, **approximate)
            assert_near(found, gate * up)
            if place[0] == "cpu":
                break
        assert not counters.any()


def rotation(place, rows, heads, *, norms):
    """Room for the heads of some rows, queries' and of keys and values, and where each goes."""
    _, kv_heads, size = heads
    factors = [make(place, size, dtype=torch.float32) if norms else None for _ in range(2)]
    return products.Rotation(
        positions=torch.randint(0, 50, (rows,), device=place[0]),
        cosines=make(place, 50, size, dtype=torch.float32),
        sines=make(place, 50, size, dtype=torch.float32),
        slots=torch.randperm(rows * 4)[:rows].to(place[0]),
        keys=torch.zeros(rows, kv_heads, 4, size, device=place[0], dtype=place[1]),
        values=torch.zeros(rows, kv_heads, 4, size, device=place[0], dtype=place[1]),
        query_norm=factors[0],
        key_norm=factors[1],
        epsilon=EPSILON,
    )


def put_apart(product, given, heads):
    """The same by the kernel that rotates alone, which has tests of its own, in a rotation's own dtype."""
    wide = {field: getattr(given, field) for field in ("positions", "cosines", "sines", "slots")}
    store = {field: torch.zeros_like(getattr(given, field), dtype=torch.float32) for field in ("keys", "values")}
    query = product.new_empty(len(product), heads[0], heads[2])
    layers.rotate_and_store(
        product, **wide, **store, query_out=query, query_norm=given.query_norm, key_norm=given.key_norm,
        epsilon=given.epsilon,
    )  # fmt: skip
    return query, store["keys"], store["values"]


@pytest.mark.parametrize("norms", [False, True])
def test_heads_turned_and_put_in_place_by_their_product(place, norms):
    counters, heads = products.new_counters(place[0]), (4, 2, 32 if place[0] == "cpu" else 128)
    outputs = (heads[0] + 2 * heads[1]) * heads[2]
    for (rows, _, inputs), config in cases(place):
        if 2 * config.block_outputs != heads[2]:
            continue
        x, weight = make(place, rows, inputs) * 3, make(place, outputs, inputs) * inputs**-0.5
        factor = make(place, inputs, dtype=torch.float32)
        given = rotation(place, rows, heads, norms=norms)
        query = products.rotated_product(scaled(x, factor), weight, given, config, counters)
        product = (rms(x, factor) @ weight.double().T).float()
        wanted = put_apart(product, given, heads)
        for found, each in zip((query, given.keys, given.values), wanted, strict=True):
            assert found.abs().sum() > 0
            assert_near(found, each.double())
        assert not counters.any()


def test_heads_that_it_does_not_turn_are_refused(place):
    x, weight, counters = make(place, 3, 16), make(place, 8 * 32, 16), products.new_counters(place[0])
    given = rotation(place, 3, (4, 2, 32), norms=True)
    assert products.rotates(weight, 32, given.keys, WHOLE)
    assert not products.rotates(weight, 16, given.keys, WHOLE)
    with pytest.raises(ValueError, match="heads of 64 features"):
        products.rotated_product(x, weight, given, ProductConfig(16, 32, 16), counters)
    with pytest.raises(ValueError, match="one of each of 2 rows"):
        products.rotated_product(x[:2], weight, given, WHOLE, counters)
    with pytest.raises(ValueError, match="both norms or neither"):
        products.rotated_product(x, weight, attrs.evolve(given, key_norm=None), WHOLE, counters)


def test_no_rows(place):
    counters, empty, weight = products.new_counters(place[0]), make(place, 0, 16), make(place, 16, 16)
    assert products.multiply(empty, weight, WHOLE, counters).shape == (0, 16)
    assert products.gated_product(empty, weight, "silu", WHOLE, counters).shape == (0, 8)


def test_what_does_not_fit_together_is_refused(place):
    counters, x, weight = products.new_counters(place[0]), make(place, 2, 16), make(place, 16, 16)
    with pytest.raises(ValueError, match="as wide as the weight"):
        products.multiply(x, make(place, 16, 24), WHOLE, counters)
    with pytest.raises(ValueError, match="as wide as the weight"):
        products.multiply(x, weight.double(), WHOLE, counters)
    with pytest.raises(ValueError, match="16 bytes"):
        products.multiply(make(place, 2, 11), make(place, 16, 11), WHOLE, counters)
    with pytest.raises(ValueError, match="residual"):
        products.add_product(x, weight, make(place, 3, 16), WHOLE, counters)
    with pytest.raises(ValueError, match="1 counters"):
        products.multiply(make(place, 17, 16), weight, SHARED, counters[:1])


def test_measured_configurations_are_those_of_the_next_larger_number_of_rows(monkeypatch):
    monkeypatch.setitem(product_configs.TABLE, ("out", 8, 4), {8: WHOLE, 16: None, 32: SHARED})
    found = [config_for("out", rows, 8, 4) for rows in (2, 8, 9, 16, 17, 32, 33)]
    assert found == [WHOLE, WHOLE, None, None, SHARED, SHARED, None]
    assert config_for("down", 8, 8, 4) is None


def test_measured_rows_ascend():
    assert all(list(measured) == sorted(measured) for measured in product_configs.TABLE.values())


def layers_product(part, rows, outputs, inputs):
    """A call of one of a layer's products as its table has it, on random rows, and its result in float64."""
    place, config = ("cuda", torch.bfloat16), config_for(part, rows, outputs, inputs)
    counters = products.new_counters("cuda")
    x, weight = make(place, rows, inputs), make(place, outputs, inputs) * inputs**-0.5
    factor, residual = make(place, inputs, dtype=torch.float32), make(place, rows, outputs)
    given, wanted = scaled(x, factor), rms(x, factor) @ weight.double().T
    if part == "rotated":
        heads = (16, 8, 128)
        turning = rotation(place, rows, heads, norms=True)
        run = partial(products.rotated_product, given, weight, turning, config, counters)
        return (lambda pdl: run(pdl=pdl)), put_apart(wanted.float(), turning, heads)[0].double()
    if part == "qkv":
        return (lambda pdl: products.multiply(given, weight, config, counters, pdl=pdl)), wanted
    if part == "gate_up":
        gate, up = wanted.chunk(2, dim=-1)
        wanted = functional.silu(gate) * up
        return (lambda pdl: products.gated_product(given, weight, "silu", config, counters, pdl=pdl)), wanted
    factor = make(place, outputs, dtype=torch.float32)

    def add(pdl):
        kept = residual.clone()
        products.add_product_and_scale(x, weight, kept, factor, EPSILON, config, counters, pdl=pdl)
        return kept

    return add, residual.double() + x.double() @ weight.double().T


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DESCRIPTORS, reason="needs a CUDA device of compute capability 9.0")
@pytest.mark.parametrize("rows", [2, 8, 24, 64, 96, 160, 256])
@pytest.mark.parametrize("pdl", [False, True])
def test_every_measured_configuration_in_a_graph(rows, pdl):
    for part, outputs, inputs in product_configs.TABLE:
        if config_for(part, rows, outputs, inputs) is None:
            continue
        torch.manual_seed(0)
        run, wanted = layers_product(part, rows, outputs, inputs)
        run(pdl)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [run(pdl) for _ in range(3)]
        for _ in range(3):
            graph.replay()
        for each in found:
            assert_near(each, wanted)
            torch.testing.assert_close(each, found[0], rtol=0, atol=0)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_device_that_is_not_here(tmp_path):
    """The interpreter runs what the compiler refuses."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_products.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {name for name in vars(product_kernels) if name.endswith("_kernel")}
