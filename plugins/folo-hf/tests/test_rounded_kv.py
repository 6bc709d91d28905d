"""Keys and values in float8: scales, what models compute with them, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
from test_low_bit import OneCard
from tiny_models import ARCHITECTURES, PagedDecoder, make_loader, save_model
from transformers import AutoModelForCausalLM

from folo_attention.sdpa import SdpaBackend
from folo_core.errors import ConfigError
from folo_hf.attention import AttentionBridge
from folo_hf.model import HfLoadedModel
from folo_hf.passes import FuseLinears
from folo_hf.probe import probe
from folo_hf.rounded_kv import LARGEST, MARGIN, scale_for, with_rounded_kv
from folo_kernels.gpu import interpreter

PROMPTS = [[5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13], [40]]


@pytest.mark.parametrize("peak", [1e-4, 0.9, 1.0, 55.9, 56.0, 57.0, 448.0, 3e4])
def test_a_scale_is_the_smallest_power_of_two_that_makes_room(peak):
    scale = scale_for(peak)
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
    assert MARGIN * peak / scale <= LARGEST < 2 * MARGIN * peak / scale


def test_what_is_zero_throughout_has_a_scale():
    assert scale_for(0.0) == 1.0


@pytest.mark.parametrize(
    ("fields", "hardware", "words"),
    [
        ({"device": "cpu"}, None, r"on cpu: takes a CUDA device of compute capability 8\.9 or more"),
        ({"device": "cuda"}, OneCard((8, 6)), r"Some card has compute capability 8\.6 and fp8 needs 8\.9"),
        ({"device": "cuda", "dtype": "float32"}, OneCard(), r"float32 on cuda:0: give dtype='float16' or 'bfloat16'"),
    ],
)
def test_what_a_device_cannot_do_is_refused_before_weights_are_read(fields, hardware, words, tmp_path):
    loader = make_loader(tmp_path, hardware, kv_cache_dtype="fp8", **fields)
    with pytest.raises(ConfigError, match=rf"cache\.kv_cache_dtype: 'fp8': .*{words}.*leave kv_cache_dtype 'auto'"):
        loader.load_tokenizer()


def probed(folder, name, dtype=torch.float32, device="cpu", **sizes):
    bridge = AttentionBridge()
    options = {"dtype": dtype, "attn_implementation": bridge.name}
    config = ARCHITECTURES[name]()
    config.update(sizes)
    # On its device first, as when it is loaded: what is fused moves no more.
    module = AutoModelForCausalLM.from_pretrained(save_model(folder, config), **options).eval().to(device)
    FuseLinears().run(module)
    return module, bridge, probe(module, bridge)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "deepseek-v3"])
def test_the_probe_tells_each_layers_largest_key_and_value(name, tmp_path):
    module, bridge, shape = probed(tmp_path, name)
    backend = SdpaBackend()
    model = HfLoadedModel(module, bridge, shape, info=None)
    PagedDecoder(model, backend=backend).run(PROMPTS, 1)
    for layer, peaks in enumerate(shape.peaks):
        for cache, peak in zip((backend._keys[layer], backend._values[layer]), peaks, strict=True):
            assert peak / 3 < float(cache.abs().max()) < 3 * peak, "other tokens, but no other order"
    rounded = with_rounded_kv(shape, None)
    before, after = (sum(spec.bytes_per_token() for spec in each.specs) for each in (shape, rounded))
    assert before == 4 * after
    scales = [(spec.k_scale, spec.v_scale) for spec in rounded.specs]
    assert scales == [(scale_for(key), scale_for(value)) for key, value in shape.peaks]
    assert {spec.dtype for spec in rounded.specs} == {torch.float8_e4m3fn}


def logits_of(model, decoder, specs):
    """The first logits ``[1, vocab_size]`` after a prompt in two chunks, over blocks on a device."""
    from folo_attention.triton import TritonBackend

    model.device_decoder, model.kv_cache_specs = decoder, specs
    return PagedDecoder(model, backend=TritonBackend(max_rows=8)).run([PROMPTS[0][:3]], 1, chunk=2)[1][0].float()


def distance(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, id="interpreted"),
        pytest.param("cuda", torch.bfloat16, id="cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.usefixtures("few_programs")
def test_fused_kernels_store_what_the_backend_stores(device, dtype, tmp_path, monkeypatch):
    """The decoder writes keys and values itself, other forwards have the backend write them: by the same scales."""
    triton_runs(device)
    from folo_hf.device_decoder import device_decoder

    # Compiled kernels want no heads as narrow as the interpreter's.
    sizes = {} if device == "cpu" else {"hidden_size": 256, "head_dim": 64, "intermediate_size": 640}
    module, bridge, shape = probed(tmp_path, "qwen3", dtype, device, **sizes)
    # The trial at load is of other tests, and slow in the interpreter.
    monkeypatch.setattr("folo_hf.device_decoder._try", lambda *_: 0.0)
    decoder = device_decoder(module, bridge, shape, 64)
    decoder.thin_rows = 0
    rounded = with_rounded_kv(shape, decoder)
    assert all(scale != 1 for scales in decoder.scales for scale in scales)
    model = HfLoadedModel(module, bridge, rounded, info=None)
    plain = logits_of(model, None, rounded.specs)
    fused = logits_of(model, decoder, rounded.specs)
    assert distance(fused, plain) <= (1e-4 if dtype == torch.float32 else 0.05)
    decoder.scales = [(1.0, 1.0)] * len(decoder.scales)
    exact = logits_of(model, decoder, shape.specs)
    # Triton's interpreter (3.6) rounds to float8 wrongly.
    assert 1e-4 < distance(fused, exact) < (0.3 if device == "cpu" else 0.1)


def triton_runs(device):
    pytest.importorskip("triton", reason="Triton is not installed")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported for a CUDA device")
    if device == "cpu":
        interpreter.enable()
    if device == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("needs a CUDA device of compute capability 8.9 (nox -s gpu)")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_loaded_model_decodes_near_its_own_logits(name, tmp_path):
    triton_runs("cuda")
    from folo_attention.triton import TritonBackend

    folder = save_model(tmp_path, ARCHITECTURES[name]())
    found = []
    for kind in ("auto", "fp8"):
        options = {"device": "cuda", "dtype": "bfloat16", "skip_tokenizer_init": True}
        model = make_loader(folder, kv_cache_dtype=kind, **options).load_model(None)
        assert model.info.kv_cache_dtype == (None if kind == "auto" else "fp8")
        found.append((model.info.kv_bytes_per_token, PagedDecoder(model, backend=TritonBackend()).run(PROMPTS, 1)[1]))
    (wide, exact), (narrow, rounded) = found
    assert wide == 2 * narrow
    for one, other in zip(rounded, exact, strict=True):
        assert distance(one.float(), other.float()) < 0.1
