"""A decoder layer's Triton kernels against plain torch: in the interpreter on a CPU, compiled on a CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")

from folo_kernels.gpu import layers
from folo_kernels.gpu.layers import ThinConfig

INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was imported for a CUDA device"
)
PLACES = [
    pytest.param(("cpu", torch.float32), id="interpreted", marks=INTERPRETED),
    pytest.param(("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), id="cuda-float16", marks=pytest.mark.gpu),
]
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
EPSILON = 1e-5


@pytest.fixture(params=PLACES)
def place(request):
    """Where to run, in what dtype."""
    if request.param[0] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    return request.param


def make(place, *shape, dtype=None):
    return torch.randn(*shape).to(place[0], dtype or place[1])


def larger(place, small, large):
    """The interpreter takes a millisecond for each line of a kernel."""
    return small if place[0] == "cpu" else large


def assert_near(found, wanted):
    """``wanted`` was computed in float64 from the same inputs."""
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def rms(x, factor):
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * factor.double()


@pytest.mark.parametrize("hidden", [16, 40, 1024])
def test_norm(place, hidden):
    x, factor = make(place, 3, hidden) * 3, make(place, hidden, dtype=torch.float32)
    assert_near(layers.norm(x, factor, EPSILON), rms(x, factor))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "hidden"), [(8192, 4096), (5, 12288), (2, 24576)])
def test_norm_of_large_rows(rows, hidden):
    place = ("cuda", torch.bfloat16)
    x, factor = make(place, rows, hidden), make(place, hidden, dtype=torch.float32)
    assert_near(layers.norm(x, factor, EPSILON), rms(x, factor))


@pytest.mark.parametrize("post", [False, True])
def test_add_norm(place, post):
    rows, hidden = larger(place, (3, 40), (300, 4096))
    x, residual = make(place, rows, hidden), make(place, rows, hidden)
    factor, post_factor = (make(place, hidden, dtype=torch.float32) for _ in range(2))
    wanted = residual.double() + (rms(x, post_factor) if post else x.double())
    normed, kept = layers.add_norm(x, residual, factor, EPSILON, post=post_factor if post else None)
    assert kept is residual
    assert_near(residual, wanted)
    assert_near(normed, rms(residual, factor))


def test_no_rows(place):
    empty = make(place, 0, 16)
    factor = make(place, 16, dtype=torch.float32)
    assert layers.norm(empty, factor, EPSILON).shape == (0, 16)
    assert layers.gated(empty, "silu").shape == (0, 8)
    assert layers.thin_matmul(empty, make(place, 4, 16)).shape == (0, 4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(place, activation):
    rows, width = larger(place, (3, 20), (65, 14336))
    gate_up = make(place, rows, 2 * width) * 2
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(layers.gated(gate_up, activation), ACTIVATIONS[activation](gate) * up)


def rotated(x, cosines, sines):
    """transformers' way; the features beyond the tables' width stay as they are."""
    width = cosines.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cosines, sines = cosines.double()[:, None], sines.double()[:, None]
    return torch.cat([turned * cosines + torch.cat([-second, first], -1) * sines, rest], dim=-1)


def run_rotation(place, shape, *, rotary, norms, store=None, scales=(1.0, 1.0)):  # noqa: PLR0913 (what a layer varies)
    """What was written for ``(tokens, heads, kv_heads, size)``, and what should have been."""
    tokens, heads, kv_heads, size = shape
    block_size, blocks = 4, tokens
    qkv = make(place, tokens, (heads + 2 * kv_heads) * size)
    positions = torch.randint(0, 50, (tokens,), device=place[0])
    tables = [make(place, 50, rotary, dtype=torch.float32) for _ in range(2)]
    slots = torch.randperm(blocks * block_size)[:tokens].to(place[0])
    keys, values = (
        torch.zeros(blocks, kv_heads, block_size, size, device=place[0]).to(store or place[1]) for _ in "kv"
    )
    query = qkv.new_empty(tokens, heads, size)
    factors = [make(place, size, dtype=torch.float32) for _ in range(2)] if norms else [None, None]
    layers.rotate_and_store(
        qkv, positions, *tables, slots, keys, values, query, query_norm=factors[0], key_norm=factors[1],
        epsilon=EPSILON, key_scale=scales[0], value_scale=scales[1],
    )  # fmt: skip
    parts = qkv.double().view(tokens, -1, size).split([heads, kv_heads, kv_heads], dim=1)
    wanted = [x if factor is None else rms(x, factor) for x, factor in zip(parts, factors, strict=False)]
    wanted = [rotated(x, tables[0][positions], tables[1][positions]) for x in wanted]
    written = [blocks[slots // block_size, :, slots % block_size] for blocks in (keys.float(), values.float())]
    untouched = keys.float().abs().sum() - written[0].abs().sum()
    assert float(untouched.abs()) < 1e-3 * float(keys.float().abs().sum())
    return (query, *written), (*wanted, parts[2])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotary_share", [1, 2])
@pytest.mark.parametrize("many", [False, True])
def test_rotate_and_store(place, norms, rotary_share, many):
    tokens, heads, kv_heads, size = larger(place, (3, 4, 2, 8), (5, 32, 8, 128))
    if many:
        tokens, heads, kv_heads = larger(place, (33, 2, 1), (700, 28, 4))
    found, wanted = run_rotation(place, (tokens, heads, kv_heads, size), rotary=size // rotary_share, norms=norms)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one.to(place[1]), other)


def test_heads_of_an_odd_size(place):
    found, wanted = run_rotation(place, (3, 3, 1, 12), rotary=8, norms=True)
    for one, other in zip(found, wanted, strict=True):
        assert_near(one.to(place[1]), other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_keys_and_values_in_float8():
    place = ("cuda", torch.bfloat16)
    (_, key, value), (_, wanted_key, wanted_value) = run_rotation(
        place, (40, 8, 2, 64), rotary=64, norms=False, store=torch.float8_e4m3fn, scales=(0.5, 0.002),
    )  # fmt: skip
    torch.testing.assert_close(key.double() * 0.5, wanted_key, rtol=0.07, atol=0.01)
    # What is too large for float8 is its largest number.
    wanted = wanted_value.clamp(-448 * 0.002, 448 * 0.002)
    torch.testing.assert_close(value.double() * 0.002, wanted, rtol=0.07, atol=0.01)


CONFIGS = {
    "default": None,
    "plain": ThinConfig(block_outputs=2, block_inputs=16),
    "tensor-cores": ThinConfig(block_outputs=16, block_inputs=32, dot=True),
}


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("extras", [(), ("bias",), ("factor",), ("add",), ("factor", "bias", "activation")])
def test_thin_matmul(place, rows, config, extras):
    if place[0] == "cpu" and rows == 8 and config != "tensor-cores":
        pytest.skip("takes seconds in the interpreter")
    outputs, inputs = larger(place, (18, 40), (1152, 3072))
    x, weight = make(place, rows, inputs), make(place, outputs, inputs) * inputs**-0.5
    options, wanted, y = {}, x.double(), None
    if "factor" in extras:
        options |= {"factor": make(place, inputs, dtype=torch.float32), "epsilon": EPSILON}
        wanted = rms(x, options["factor"])
    wanted = wanted @ weight.double().T
    if "bias" in extras:
        options["bias"] = make(place, outputs)
        wanted += options["bias"].double()
    if "activation" in extras:
        options["activation"] = "silu"
        gate, up = wanted.chunk(2, dim=-1)
        wanted = functional.silu(gate) * up
    if "add" in extras:
        options["add_to"] = y = make(place, rows, outputs)
        wanted += y.double()
    found = layers.thin_matmul(x, weight, config=CONFIGS[config], **options)
    assert y is None or found is y
    assert_near(found, wanted)


def test_what_does_not_fit_together_is_refused(place):
    x, weight = make(place, 2, 16), make(place, 8, 16)
    factor = make(place, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 16 rows"):
        layers.thin_matmul(make(place, 17, 16), weight)
    with pytest.raises(ValueError, match="as wide as the weight"):
        layers.thin_matmul(make(place, 2, 12), weight)
    with pytest.raises(ValueError, match="add_to"):
        layers.thin_matmul(x, weight, add_to=make(place, 2, 7))
    with pytest.raises(ValueError, match="residual"):
        layers.add_norm(x, make(place, 3, 16), factor, EPSILON)
    with pytest.raises(ValueError, match="contiguous"):
        layers.norm(weight.T, factor[:8], EPSILON)
    qkv = make(place, 2, 30)
    store, query = make(place, 2, 1, 4, 16), make(place, 2, 2, 16)
    with pytest.raises(ValueError, match="qkv"):
        layers.rotate_and_store(qkv, qkv, factor[None], factor[None], qkv, store, store, query)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
def test_dependent_launches_in_a_graph_give_the_same():
    place = ("cuda", torch.bfloat16)
    x, residual = make(place, 2, 1024), make(place, 2, 1024)
    factor = make(place, 1024, dtype=torch.float32)
    weights = [make(place, 1024, 1024) * 1024**-0.5 for _ in range(8)]

    def chain(h, *, pdl):
        for weight in weights:
            y = layers.thin_matmul(h, weight, factor=factor, epsilon=EPSILON, pdl=pdl)
            _, h = layers.add_norm(y, h, factor, EPSILON, pdl=pdl)
        return layers.norm(h, factor, EPSILON, pdl=pdl)

    wanted = chain(x.clone(), pdl=False)
    chain(residual.clone(), pdl=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(x.clone(), pdl=True)
    for _ in range(20):
        graph.replay()
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.slow
def test_every_kernel_compiles_for_a_device_that_is_not_here(tmp_path):
    """The interpreter runs what the compiler refuses."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).parent / "compile_layers.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {name for name in vars(layers) if name.endswith("_kernel")}
    assert set(done.stdout.split()) == names
