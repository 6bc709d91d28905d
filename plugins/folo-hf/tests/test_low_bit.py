"""Weights of fewer bits: their numbers on any device, models that compute with them, and what is refused."""

from __future__ import annotations

import os

import attrs
import pytest
import torch
from tiny_models import ARCHITECTURES, PagedDecoder, make_loader, save_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from folo_core.errors import ConfigError, UnsupportedModelError
from folo_hf import loader as loading
from folo_hf.attention import AttentionBridge
from folo_hf.low_bit import (
    FEW_ROWS,
    GROUP,
    Fp8,
    Int4,
    LowBitLinear,
    LowBitLinears,
    low_bit_linears,
    quantise,
    rows_as_they_are,
)
from folo_hf.native import check_quantised, weight_bytes
from folo_hf.passes import FusedPart, FuseLinears, SharedProduct
from folo_hf.probe import probe
from folo_hf.tinygemm import find_order, tile_depth, unpack_codes

FORMATS = ["fp8", "int4"]
ERROR = {"fp8": 2**-4, "int4": 0.55 / 15}
"""Largest error of a weight: half a place of float8's, or half a step and its own rounding, as shares of a range."""
PROMPT = [5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (nox -s gpu)")
    torch.manual_seed(0)
    return request.param


def weight_on(device, outputs=64, inputs=192):
    return (torch.randn(outputs, inputs) * torch.logspace(-2, 1, outputs)[:, None]).to(device, torch.bfloat16)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_rounded_weights_are_close_to_the_plain_ones(kind, device):
    weight = weight_on(device)
    found = quantise(weight, kind).plain().float()
    groups = weight.float().view(64, -1, GROUP) if kind == "int4" else weight.float().view(64, 1, -1)
    spread = groups.amax(-1) - groups.amin(-1) if kind == "int4" else groups.abs().amax(-1)
    error = (found - weight.float()).view(groups.shape).abs().amax(-1)
    # A middle far from zero is rounded to bfloat16, which a step's own size does not tell.
    assert (error <= ERROR[kind] * spread + groups.abs().amax(-1) * 2**-7).all()
    assert error.max() > 0


@pytest.mark.parametrize("rows", [1, 7, FEW_ROWS + 1])
@pytest.mark.parametrize("kind", FORMATS)
def test_products_are_those_of_the_rounded_weights(kind, rows, device):
    rounded = quantise(weight_on(device), kind)
    x = torch.randn(rows, 192).to(device, torch.bfloat16)
    found, wanted = rounded(x).float(), x.float() @ rounded.plain().float().t()
    assert found.shape == (rows, 64)
    # float8 rounds the row, too: by up to a sixteenth of each number, which adds up as a random walk does.
    tolerance = 0.06 if kind == "fp8" else 0.02
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("at_once", [24, 4096])
def test_rows_can_be_left_as_they_are(at_once, device, monkeypatch):
    monkeypatch.setattr("folo_hf.low_bit.WIDENED_AT_ONCE", at_once)
    rounded = quantise(weight_on(device), "fp8")
    x = torch.randn(2, 3, 192).to(device, torch.bfloat16)
    with rows_as_they_are():
        found = rounded(x).float()
    wanted = x.float() @ rounded.plain().float().t()
    assert (found - wanted).norm() <= 0.01 * wanted.norm()
    assert (rounded(x).float() - wanted).norm() > 0.01 * wanted.norm(), "rounded again"


@pytest.mark.parametrize("kind", FORMATS)
def test_leading_dimensions_stay(kind, device):
    rounded = quantise(weight_on(device), kind)
    x = torch.randn(2, 3, 192).to(device, torch.bfloat16)
    assert rounded(x).shape == (2, 3, 64)
    torch.testing.assert_close(rounded(x)[1], rounded(x[1]), rtol=0.02, atol=0.02)


def test_a_scale_for_each_output_keeps_small_outputs_precise(device):
    weight = weight_on(device)
    weight[0] *= 1e-3
    found = quantise(weight, "fp8").plain()
    torch.testing.assert_close(found[0].float(), weight[0].float(), rtol=2**-3, atol=float(weight[0].abs().max()) / 500)


def test_weights_of_sixteen_values_lose_nothing(device):
    codes = torch.arange(16).repeat(64, 12).to(device, torch.bfloat16)
    weight = (codes - 8) * 0.25
    assert torch.equal(quantise(weight, "int4").plain(), weight)


def test_bytes_are_fewer(device):
    weight = weight_on(device, 128, 256)
    assert quantise(weight, "fp8").nbytes == 128 * 256 + 4 * 128
    assert quantise(weight, "int4").nbytes == 128 * 256 // 2 + 4 * 128 * 256 // GROUP


@pytest.mark.parametrize(
    ("kind", "shape"), [("fp8", (64, 100)), ("fp8", (60, 64)), ("int4", (64, 40)), ("int4", (4, 64))]
)
def test_shapes_that_the_kernels_do_not_take_are_refused(kind, shape):
    with pytest.raises(ConfigError, match=rf"'{kind}': a weight \[{shape[0]}, {shape[1]}\]: its outputs must be"):
        quantise(torch.zeros(shape, dtype=torch.bfloat16), kind)


# --- the layout of 4-bit tiles --------------------------------------------------------------------------------------


def shuffled_packing(seed):
    """A packing of the documented shape, whose order within a tile is anybody's guess."""

    def pack(pairs, depth):
        codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1)
        tiles = codes.view(len(codes) // 8, 8, -1, 16 * depth).transpose(1, 2).flatten(2)
        order = torch.randperm(tiles.shape[2], generator=torch.Generator().manual_seed(seed))
        halves = tiles[..., order].view(*tiles.shape[:2], -1, 2)
        return (halves[..., 0] | halves[..., 1] << 4).view(torch.int32).view(*tiles.shape[:2], 32, depth // 2)

    return pack


@pytest.mark.parametrize(("inputs", "depth"), [(256, 8), (192, 4), (96, 2)])
def test_any_order_within_tiles_is_found_and_undone(inputs, depth, monkeypatch):
    assert tile_depth(inputs) == depth
    pack = shuffled_packing(depth)
    monkeypatch.setattr("folo_hf.tinygemm.CHUNK", 16)
    monkeypatch.setattr("folo_hf.tinygemm.tile_order", lambda depth, device: find_order(depth, device, pack))
    codes = torch.randint(0, 16, (40, inputs), dtype=torch.uint8)
    packed = pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), depth)
    assert torch.equal(unpack_codes(packed, 40, inputs), codes)


def test_another_layout_is_refused():
    with pytest.raises(ConfigError, match="packs weights in another layout"):
        find_order(8, torch.device("cpu"), lambda pairs, depth: torch.zeros(1, 1, 32, depth // 2, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [96, 192, 1024])
def test_this_devices_own_layout_is_undone(inputs):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (nox -s gpu)")
    weight = weight_on("cuda", 64, inputs)
    rounded = quantise(weight, "int4")
    unit = torch.eye(inputs, dtype=torch.bfloat16, device="cuda")
    told = torch.cat([rounded(rows) for rows in unit.split(FEW_ROWS)]).t()
    torch.testing.assert_close(rounded.plain(), told, rtol=2**-7, atol=1e-6)


# --- models ---------------------------------------------------------------------------------------------------------


def model_of(name, tmp_path):
    config = ARCHITECTURES[name]()
    config.intermediate_size = 64  # so that 4-bit groups divide it
    folder = save_model(tmp_path, config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "gpt2"])
def test_a_model_computes_with_its_rounded_weights(name, quantization, tmp_path):
    model, exact = (model_of(name, tmp_path) for _ in range(2))
    replaced = LowBitLinears(quantization, (9, 0)).run(model)
    assert replaced > 0
    give_rounded(exact, model)
    with torch.no_grad():
        found = model(torch.tensor([PROMPT])).logits.float()
        wanted = exact(torch.tensor([PROMPT])).logits.float()
    assert (found - wanted).norm() <= 0.1 * wanted.norm()
    assert torch.equal(model.get_input_embeddings().weight, model_of(name, tmp_path).get_input_embeddings().weight)


def give_rounded(exact, model):
    """Put the weights that ``model`` computes with into the plain linears of ``exact``."""
    ours = dict(model.named_modules())
    for name, module in list(exact.named_modules()):
        other = ours.get(name)
        if isinstance(other, FusedPart):
            pieces = other.shared.linear.weight.split(other.shared._sizes)
            module.weight = nn.Parameter(pieces[other._index])
        elif isinstance(other, LowBitLinear):
            turned = type(module) is Conv1D
            module.weight = nn.Parameter(other.weight.t().contiguous() if turned else other.weight)


def test_siblings_become_one_product_and_the_head_keeps_eight_bits(tmp_path):
    model = model_of("llama", tmp_path)
    LowBitLinears("int4", (9, 0)).run(model)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.shared is layer.self_attn.v_proj.shared
    assert layer.mlp.gate_proj.shared is layer.mlp.up_proj.shared
    assert isinstance(layer.mlp.down_proj.low_bit, Int4)
    assert isinstance(model.lm_head.low_bit, Fp8)
    kinds = [type(each.low_bit) for each in low_bit_linears(model)]
    assert kinds.count(Fp8) == 1
    assert kinds.count(Int4) == 4 * len(model.model.layers)


def test_a_device_without_float8_keeps_its_head(tmp_path):
    model = model_of("llama", tmp_path)
    LowBitLinears("int4", (8, 0)).run(model)
    assert type(model.lm_head) is nn.Linear


def test_products_that_another_pass_joined_are_rounded_once(tmp_path):
    model = model_of("llama", tmp_path)
    attention = model.model.layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    whole = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=False, dtype=torch.bfloat16)
    shared = SharedProduct(whole, [part.out_features for part in parts])
    for index, (name, part) in enumerate(zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)):
        setattr(attention, name, FusedPart(shared, index, part))
    LowBitLinears("fp8", (9, 0)).run(model)
    assert isinstance(shared.linear, LowBitLinear)
    assert sum(layer is shared.linear for layer in low_bit_linears(model)) == 1


def test_bytes_and_counts_know_rounded_layers(tmp_path):
    model = model_of("llama", tmp_path)
    before = weight_bytes(model)
    LowBitLinears("fp8", (9, 0)).run(model)
    embedding = model.get_input_embeddings().weight.nbytes
    assert weight_bytes(model) - embedding < 0.7 * (before - embedding)
    check_quantised(model, "fp8")
    with pytest.raises(UnsupportedModelError, match="'fp8'"):
        check_quantised(model_of("llama", tmp_path), "fp8")


# --- what is refused ------------------------------------------------------------------------------------------------


@attrs.frozen
class OneCard:
    """A machine with a CUDA device, as far as names go."""

    capability: tuple[int, int] = (9, 0)

    def cuda_devices(self):
        return 1

    def cuda_capability(self, index):
        return self.capability

    def cuda_name(self, index):
        return "Some card"


@pytest.mark.parametrize(
    ("quantization", "fields", "hardware", "words"),
    [
        (
            "fp8",
            {"device": "cpu"},
            None,
            r"takes a CUDA device of compute capability 8\.9 or more; give 'int8' or 'int4'",
        ),
        ("fp8", {"device": "cuda"}, OneCard((8, 0)), r"Some card has compute capability 8\.0 and fp8 needs 8\.9"),
        ("int4", {"device": "cuda"}, OneCard((7, 5)), r"compute capability 7\.5 and int4 needs 8\.0"),
        ("int8", {"device": "cuda"}, OneCard(), r"int8 weights are computed with on a CPU alone; on cuda:0 give 'fp8'"),
        (
            "fp8",
            {"device": "cuda", "dtype": "float32"},
            OneCard(),
            r"float32 on cuda:0: give dtype='bfloat16', or leave",
        ),
        ("int4", {"device": "cuda", "dtype": "float16"}, OneCard(), r"float16 on cuda:0: give dtype='bfloat16'"),
        ("fp8", {"device": "cuda", "deterministic": True}, OneCard(), r"deterministic=True.*give one of the two up"),
    ],
)
def test_what_a_device_cannot_do_is_refused_before_weights_are_read(quantization, fields, hardware, words, tmp_path):
    loader = make_loader(tmp_path, hardware, quantization=quantization, skip_tokenizer_init=True, **fields)
    with pytest.raises(ConfigError, match=rf"model\.quantization: '{quantization}': .*{words}"):
        loader.load_tokenizer()


def test_the_loader_rounds_for_cuda_after_other_passes(tmp_path):
    loader = make_loader(tmp_path, OneCard(), device="cuda", quantization="int4")
    assert loader._weights is loading.Format.FLOAT32
    assert isinstance(loader._low_bit, LowBitLinears)
    assert loader._low_bit.applies("cuda:0", torch.bfloat16)
    assert make_loader(tmp_path, OneCard(), device="cpu", quantization="int4")._low_bit is None


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_loaded_model_decodes_with_rounded_weights(name, quantization, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (nox -s gpu)")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    folder = save_model(tmp_path, ARCHITECTURES[name]())
    model = make_loader(folder, device="cuda", quantization=quantization, skip_tokenizer_init=True).load_model(None)
    exact = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").cuda().eval()
    )
    give_rounded(exact, model.module)
    with torch.no_grad():
        wanted = exact(torch.tensor([PROMPT], device="cuda")).logits[0, -1].float()
    _, (logits,) = PagedDecoder(model).run([PROMPT], 1)
    assert (logits[0].float() - wanted).norm() <= 0.1 * wanted.norm()
    assert model.info.quantization == quantization


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was imported for a CUDA device")
@pytest.mark.parametrize(("quantization", "name"), [("fp8", "qwen3"), ("int4", "llama-tied")])
@pytest.mark.usefixtures("few_programs")
def test_fused_kernels_take_rounded_layers(quantization, name, tmp_path, caplog, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from folo_hf.device_decoder import device_decoder

    config = ARCHITECTURES[name]()
    config.intermediate_size = 64
    bridge = AttentionBridge()
    folder = save_model(tmp_path, config)
    options = {"dtype": torch.float32, "attn_implementation": bridge.name}
    module = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    FuseLinears().run(module)
    LowBitLinears(quantization, (9, 0)).run(module)
    shape = probe(module, bridge)

    def refuse(rows):
        raise AssertionError(f"{len(rows)} rows were rounded, which tells two ways to compute a deep model apart")

    monkeypatch.setattr("folo_hf.low_bit._rounding", refuse)
    with caplog.at_level("INFO"):
        decoder = device_decoder(module, bridge, shape, 64)
    assert decoder is not None, caplog.text
    assert decoder.is_rounded
    assert decoder.thin_rows == 0
    bridge.release()
