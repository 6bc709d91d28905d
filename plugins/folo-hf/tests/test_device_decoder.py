"""Whole models in a CUDA device's kernels give the module's own logits: in Triton's interpreter, and on a device."""

from __future__ import annotations

import logging
import os

import pytest
import torch
import transformers
from test_architectures import assert_same_greedy
from tiny_models import ARCHITECTURES, SMALL, PagedDecoder, make_loader, save_model
from transformers import AutoModelForCausalLM

pytest.importorskip("triton", reason="Triton is not installed")

from folo_hf import device_decoder as devices
from folo_hf.attention import AttentionBridge
from folo_hf.device_decoder import DenseBackend, device_decoder
from folo_hf.loader import HfLoader
from folo_hf.native import weight_bytes
from folo_hf.passes import FusedPart, FuseLinears

pytestmark = pytest.mark.usefixtures("few_programs")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton was imported for a CUDA device"
)

TAKEN = {
    **{name: ARCHITECTURES[name] for name in ("llama", "llama-tied", "qwen2", "qwen2-sliding", "qwen3")},
    **{name: ARCHITECTURES[name] for name in ("gemma", "gemma2", "gemma3", "mistral", "phi3")},
    "granite": ARCHITECTURES["granite"],
    "phi3-partial": lambda: transformers.Phi3Config(**SMALL | {"num_attention_heads": 2}, partial_rotary_factor=0.5),
}
"""What must run in fused kernels."""
LEFT = {
    **{name: ARCHITECTURES[name] for name in ("gpt2", "olmo2", "qwen3-moe", "cohere2")},
    "granite-residual": lambda: transformers.GraniteConfig(**SMALL, residual_multiplier=0.5),
}
"""What must not: it computes something else."""
DECODED = ["llama", "qwen3", "gemma3"]
"""What is also decoded step by step; the interpreter takes seconds for it."""
PROMPTS = [[5, 9, 33, 7, 60, 61, 8, 8, 90], [40]]
NEW_TOKENS = 2
NEW_TOKENS_ON_A_DEVICE = 8
"""Enough that one tie among the first two leaves something to compare."""


class Backend(DenseBackend):
    """Dense attention over blocks as the engine's backend."""

    def __init__(self):
        super().__init__(blocks=None)

    def allocate(self, specs, num_blocks, block_size, device):
        self.blocks = DenseBackend.make(specs, num_blocks, block_size, device).blocks

    def plan(self, metadata):
        return None


def load_plain(folder, dtype=torch.float32, device="cpu"):
    bridge = AttentionBridge()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=bridge.name).eval()
    return module.to(device), bridge


def load(folder, monkeypatch):
    """A model that takes the way of CUDA devices on the CPU."""
    monkeypatch.setattr("folo_hf.loader.PASSES", (FuseLinears(),))
    monkeypatch.setattr(FuseLinears, "applies", lambda *_: True)
    monkeypatch.setattr("folo_hf.native.NativeLinears.applies", lambda *_: False)
    monkeypatch.setattr(
        HfLoader,
        "_device_decoder",
        lambda _, module, bridge, shape, limit: device_decoder(module, bridge, shape, limit),
    )
    return make_loader(folder, skip_tokenizer_init=True).load_model(None)


def assert_right(folder, model, backend=None, new_tokens=NEW_TOKENS):
    tokens, logits = PagedDecoder(model, backend=backend or Backend()).run(PROMPTS, new_tokens)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, got, rows in zip(PROMPTS, tokens, logits, strict=True):
        assert_same_greedy(reference, got, rows.cpu(), prompt)


@INTERPRETED
@pytest.mark.parametrize("name", TAKEN)
def test_it_is_taken_and_gives_the_layers_own_logits(name, tmp_path, monkeypatch):
    save_model(tmp_path, TAKEN[name]())
    model = load(tmp_path, monkeypatch)
    assert model.device_decoder is not None
    if name in DECODED:
        assert_right(tmp_path, model)


@INTERPRETED
@pytest.mark.parametrize("name", LEFT)
def test_what_computes_something_else_runs_its_own_forward(name, tmp_path, monkeypatch, caplog):
    save_model(tmp_path, LEFT[name]())
    with caplog.at_level(logging.INFO, logger="folo_hf.device_decoder"):
        model = load(tmp_path, monkeypatch)
    assert model.device_decoder is None
    assert "runs its own forward" in caplog.text


@INTERPRETED
def test_without_blocks_on_the_device_the_module_runs(tmp_path, monkeypatch):
    save_model(tmp_path, ARCHITECTURES["llama"]())
    model = load(tmp_path, monkeypatch)
    assert_right(tmp_path, model)
    assert model.device_decoder.is_bound
    from folo_attention.sdpa import SdpaBackend

    assert_right(tmp_path, model, SdpaBackend())
    assert not model.device_decoder.is_bound


@INTERPRETED
@pytest.mark.parametrize(("field", "wrong"), [("epsilon", 0.1), ("activation", "gelu"), ("query_norm", None)])
def test_a_model_that_would_give_wrong_logits_is_refused(field, wrong, tmp_path, monkeypatch):
    import attrs

    save_model(tmp_path, ARCHITECTURES["qwen3"]())
    read = devices.read_layer
    monkeypatch.setattr(devices, "read_layer", lambda *given: attrs.evolve(read(*given), **{field: wrong}))
    if field == "query_norm":
        monkeypatch.setattr(
            devices, "read_layer", lambda *given: attrs.evolve(read(*given), query_norm=None, key_norm=None)
        )
    assert load(tmp_path, monkeypatch).device_decoder is None


@INTERPRETED
def test_thin_products_are_a_matter_of_speed(tmp_path, monkeypatch):
    save_model(tmp_path, ARCHITECTURES["qwen2"]())
    model = load(tmp_path, monkeypatch)
    for thin_rows in (0, 16):
        model.device_decoder.thin_rows = thin_rows
        assert_right(tmp_path, model)


JOINED = [("qkv", "out", "gate_up", "down"), ("out", "gate_up"), ("rotated", "down")]
"""Products that are not torch's own: all, and such whose neighbours are."""


@INTERPRETED
@pytest.mark.parametrize("parts", JOINED)
def test_joined_products_are_a_matter_of_speed(parts, tmp_path, monkeypatch):
    import attrs

    from folo_hf.device_layers import Linear
    from folo_hf.joined_products import JoinedProducts
    from folo_kernels.gpu.product_configs import ProductConfig

    save_model(tmp_path, ARCHITECTURES["qwen3"]())
    model = load(tmp_path, monkeypatch)
    # What was read from a file may lie at any place.
    layers = [
        attrs.evolve(layer, **{part: Linear(getattr(layer, part).weight.clone(), None) for part in JOINED[0]})
        for layer in model.device_decoder._layers
    ]
    model.device_decoder._layers = layers
    joined = model.device_decoder.joined = JoinedProducts.make(model.device, 1024)
    assert not joined.serves(2, is_captured=False), "launching each costs the host too much"
    joined.only_captured = False
    asked = []

    def config_for(part, rows, outputs, inputs):
        asked.append(part)
        half = layers[0].size // 2
        return ProductConfig(16, half if part == "rotated" else 32, 32, 1 + (part == "down")) if part in parts else None

    joined.config_for = config_for
    rotated, rotate = [], JoinedProducts.rotate
    monkeypatch.setattr(JoinedProducts, "rotate", lambda *given: rotated.append(given) or rotate(*given))
    assert_right(tmp_path, model, new_tokens=1)
    assert set(parts) <= set(asked)
    assert bool(rotated) == ("rotated" in parts)


@INTERPRETED
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_products_with_biases_or_norms_after_them_are_not_joined(name, tmp_path, monkeypatch):
    save_model(tmp_path, ARCHITECTURES[name]())
    layer = load(tmp_path, monkeypatch).device_decoder._layers[0]
    assert not layer.joins


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mixtral", "gpt-neox"])
def test_fused_linears_give_the_same_and_hold_nothing_twice(name, tmp_path):
    module, bridge = load_plain(save_model(tmp_path, ARCHITECTURES[name]()))
    ids, positions = torch.tensor([[3, 5, 7, 9]]), torch.arange(4)[None]
    module.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = module(input_ids=ids, position_ids=positions).logits
        held = weight_bytes(module)
        replaced = FuseLinears().run(module)
        assert replaced == sum(isinstance(each, FusedPart) for each in module.modules())
        assert (replaced > 0) == (name != "gpt-neox")
        torch.testing.assert_close(module(input_ids=ids, position_ids=positions).logits, wanted, rtol=1e-5, atol=1e-5)
    assert weight_bytes(module) == held
    bridge.release()


def test_fusing_is_for_cuda_devices():
    assert FuseLinears().applies("cuda:1", torch.bfloat16)
    assert not FuseLinears().applies("cpu", torch.float32)


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TAKEN)
def test_it_is_taken_on_a_device(name, dtype, tmp_path):
    """Wider heads and rows than in the interpreter, by the loader itself."""
    config = TAKEN[name]()
    for field, value in {"hidden_size": 256, "head_dim": 64, "intermediate_size": 640}.items():
        if hasattr(config, field):
            setattr(config, field, value)
    save_model(tmp_path, config)
    loader = make_loader(tmp_path, device="cuda", dtype=str(dtype).removeprefix("torch."), skip_tokenizer_init=True)
    model = loader.load_model(None)
    assert model.device_decoder is not None
    if dtype == torch.float32:
        assert_right(tmp_path, model, new_tokens=NEW_TOKENS_ON_A_DEVICE)


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_captured_step_gives_the_same(tokens, pdl, tmp_path):
    """All but attention: captured once, replayed with other inputs in the same places."""
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    save_model(tmp_path, TAKEN["qwen3"]())
    model = make_loader(tmp_path, device="cuda", dtype="bfloat16", skip_tokenizer_init=True).load_model(None)
    backend = DenseBackend.make(model.kv_cache_specs, 8, 16, model.device)
    attend = type("Attend", (), {"blocks": backend.blocks, "attend": lambda _, layer, query, metadata, **call: query})
    model.bind(attend())
    model.device_decoder.pdl = pdl
    ids, positions, slots = (torch.zeros(tokens, dtype=torch.int64, device="cuda") for _ in range(3))
    metadata = type("Metadata", (), {"slot_mapping": slots, "plan": None, "is_captured": True})
    rows = torch.arange(tokens, device="cuda")
    model.forward(ids, positions, rows, metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.forward(ids, positions, rows, metadata)
    for start in (3, 20):
        ids.copy_(rows + start)
        positions.copy_(rows + start)
        slots.copy_(rows + 16 + start)
        graph.replay()
        replayed, keys = logits.clone(), backend.blocks.keys[1].clone()
        assert keys.flatten(1, 2)[1:].abs().sum() > 0
        torch.testing.assert_close(model.forward(ids, positions, rows, metadata), replayed, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(backend.blocks.keys[1], keys, rtol=2e-2, atol=2e-2)


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_joined_products_of_a_measured_shape_give_the_same(pdl, tmp_path):
    """All but attention of layers of Qwen3-0.6B's shape, captured, against torch's products."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    sizes = {"hidden_size": 1024, "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = TAKEN["qwen3"]()
    for field, value in {**sizes, "intermediate_size": 3072, "max_position_embeddings": 512}.items():
        setattr(config, field, value)
    save_model(tmp_path, config)
    model = make_loader(tmp_path, device="cuda", dtype="bfloat16", skip_tokenizer_init=True).load_model(None)
    backend = DenseBackend.make(model.kv_cache_specs, 20, 16, model.device)
    attend = type("Attend", (), {"blocks": backend.blocks, "attend": lambda _, layer, query, metadata, **call: query})
    model.bind(attend())
    decoder, joined = model.device_decoder, model.device_decoder.joined
    assert joined is not None
    joined.pdl_rows = range(4096 if pdl else 0)
    for count in (2, 8, 40, 100, 256):
        rows = torch.arange(count, device="cuda")
        metadata = type("Metadata", (), {"slot_mapping": rows + 16, "plan": None, "is_captured": True})
        decoder.joined = None
        wanted = model.forward(rows % 64, rows, rows, metadata).float()
        keys = backend.blocks.keys[1].float()
        backend.blocks.keys[1].zero_()
        decoder.joined = joined
        model.forward(rows % 64, rows, rows, metadata)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model.forward(rows % 64, rows, rows, metadata)
        for _ in range(3):
            graph.replay()
        assert float((found.float() - wanted).norm()) < 0.03 * float(wanted.norm())
        assert float((backend.blocks.keys[1].float() - keys).norm()) < 0.03 * float(keys.norm())
