"""Native linears, feed-forwards and stacks give transformers' logits; what is not recognised runs as before."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_architectures import NEW_TOKENS, PROMPTS, assert_same_greedy
from tiny_models import ARCHITECTURES, PagedDecoder, make_loader, save_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from folo_attention.native import NativeBackend
from folo_hf import decoder as stacks
from folo_hf.decoder import _Place
from folo_hf.native import NativeLinear, NativeLinears, NativeMlp, gate_of
from folo_kernels.library import why_not
from folo_kernels.matrix import Epilogue, Format

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STACKS = ["llama", "llama-tied", "qwen2", "qwen2-sliding", "qwen3", "gemma", "gemma2", "gemma3", "mistral"]
"""What must run as a native stack."""


def load(folder, name, **options):
    save_model(folder, ARCHITECTURES[name]())
    return make_loader(folder, skip_tokenizer_init=True, **options).load_model(None)


def native_run(model):
    return PagedDecoder(model, backend=NativeBackend()).run(PROMPTS, NEW_TOKENS)


def assert_right(folder, tokens, logits):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, got, rows in zip(PROMPTS, tokens, logits, strict=True):
        assert_same_greedy(reference, got, rows, prompt)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(name, tmp_path):
    model = load(tmp_path, name)
    assert model._decoder is not None or name not in STACKS
    assert_right(tmp_path, *native_run(model))


def test_a_stack_stands_in_for_its_layers_while_a_native_store_is_bound(tmp_path):
    model = load(tmp_path, "llama")
    native_run(model)
    assert {type(layer) for layer in model.module.model.layers} == {_Place}
    assert all(seconds > 0 for seconds in model.stage_seconds().values())
    tokens, logits = PagedDecoder(model).run(PROMPTS, NEW_TOKENS)
    assert not any(isinstance(layer, _Place) for layer in model.module.model.layers)
    assert model.stage_seconds() == {}
    assert_right(tmp_path, tokens, logits)


@pytest.mark.parametrize("field", ["scale", "epsilon", "gate"])
def test_a_stack_that_would_give_wrong_logits_is_refused(field, tmp_path, monkeypatch):
    wrong = {"scale": 0.5, "epsilon": 0.1, "gate": Epilogue.GELU_TANH_GATE}[field]
    inner = stacks.LayerWeights
    monkeypatch.setattr(stacks, "LayerWeights", lambda **fields: inner(**fields | {field: wrong}))
    model = load(tmp_path, "llama")
    assert model._decoder is None
    assert_right(tmp_path, *native_run(model))


def test_two_engines_do_not_mix(tmp_path):
    models = [load(tmp_path / name, name) for name in ("llama", "gemma3")]
    runs = [native_run(model) for model in models]
    decoders = [PagedDecoder(model, backend=NativeBackend()) for model in models]
    assert [each.run(PROMPTS, NEW_TOKENS)[0] for each in decoders] == [tokens for tokens, _ in runs]
    assert runs[0][0] != runs[1][0]


def test_deterministic_mode_keeps_the_old_passes(tmp_path):
    model = load(tmp_path, "llama", deterministic=True)
    assert model._decoder is None
    assert not any(isinstance(module, (NativeLinear, NativeMlp)) for module in model.module.modules())


class Mlp(nn.Module):
    def __init__(self, activation=functional.silu):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = activation

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def gelu_tanh(x):
    return functional.gelu(x, approximate="tanh")


def mlp(activation=functional.silu):
    torch.manual_seed(0)
    found = Mlp(activation)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
    return found


def test_known_gates_are_recognised():
    assert gate_of(mlp()) == Epilogue.SILU_GATE
    assert gate_of(mlp(gelu_tanh)) == Epilogue.GELU_TANH_GATE


def test_others_are_not():
    assert gate_of(mlp(functional.gelu)) is None
    assert gate_of(mlp(functional.relu)) is None
    assert gate_of(nn.Linear(8, 8)) is None
    extra = mlp()
    extra.norm = nn.LayerNorm(8)
    assert gate_of(extra) is None
    hooked = mlp()
    hooked.up_proj.register_forward_hook(lambda module, args, output: output)
    assert gate_of(hooked) is None


@pytest.mark.parametrize("activation", [functional.silu, gelu_tanh])
def test_a_native_feed_forward_equals_the_plain_one(activation):
    model, x = nn.ModuleList([mlp(activation)]), torch.randn(1, 30, 8)
    with torch.no_grad():
        wanted = model[0](x)
        assert NativeLinears().run(model) == 1
        assert isinstance(model[0], NativeMlp)
        torch.testing.assert_close(model[0](x), wanted, rtol=1e-5, atol=1e-4)


def test_a_quantised_models_head_keeps_eight_bits(tmp_path):
    folder = save_model(tmp_path, transformers.LlamaConfig(**ARCHITECTURES["llama"]().to_diff_dict()))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    NativeLinears(Format.INT4).run(model)
    assert model.lm_head.matrix.format == Format.INT8
    assert model.model.layers[0].mlp.down.format == Format.INT4
