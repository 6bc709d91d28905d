"""Packed and fused linears compute what the plain ones do, one row the same bits as many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

import folo_hf.native
from folo_hf.native import NativeLinears, NativeMlp
from folo_hf.passes import FusedPart, PackedLinear, PackLinears, run_passes
from folo_kernels.library import why_not

SIZES = st.sampled_from([1, 3, 8, 31, 64, 200])


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, st.integers(0, 40), st.booleans())
def test_packed_linear_equals_the_plain_one(inputs, outputs, rows, bias):
    torch.manual_seed(inputs * outputs)
    plain = nn.Linear(inputs, outputs, bias=bias)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(1, rows, inputs)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), rtol=0, atol=2e-5)
    assert torch.equal(packed.weight, plain.weight)


class Block(nn.Module):
    """Siblings as decoder layers have them, called in a given order on given inputs."""

    def __init__(self, bias):
        super().__init__()
        self.q_proj = nn.Linear(24, 32, bias=bias)
        self.k_proj = nn.Linear(24, 16, bias=bias)
        self.v_proj = nn.Linear(24, 16, bias=bias)

    def forward(self, inputs, order):
        return [getattr(self, f"{name}_proj")(x) for name, x in zip(order, inputs, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["qkv", "vkq", "qqkv", "kk", "qkvqkv"])
@pytest.mark.parametrize("same_input", [True, False])
def test_siblings_share_a_product_whatever_their_order(bias, order, same_input):
    torch.manual_seed(0)
    block = Block(bias)
    first = torch.randn(1, 5, 24)
    inputs = [first if same_input else torch.randn(1, 5, 24) for _ in order]
    with torch.no_grad():
        wanted = block(inputs, order)
        assert PackLinears().run(block) == 3
        assert isinstance(block.q_proj, FusedPart)
        for _ in range(2):
            torch.testing.assert_close(block(inputs, order), wanted, rtol=0, atol=2e-5)


class Mlp(nn.Module):
    """A gated feed-forward as decoder layers have them."""

    def __init__(self, activation, factor=1.0):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 24)
        self.act_fn, self.factor = activation, factor

    def forward(self, x):
        return self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.skipif(why_not() is not None, reason="no kernels for this machine")
def test_feed_forwards_made_alike_are_judged_once_and_others_by_themselves(monkeypatch):
    judged = []
    judge = folo_hf.native.gate_of
    monkeypatch.setattr(folo_hf.native, "gate_of", lambda module: judged.append(module) or judge(module))
    kinds = [nn.SiLU(), nn.SiLU(), nn.GELU(approximate="tanh"), nn.Tanh(), nn.SiLU()]
    mlps = [Mlp(kind, factor) for kind, factor in zip(kinds, [1.0, 1.0, 1.0, 1.0, 2.0], strict=True)]
    x = torch.randn(3, 24)
    model = nn.Sequential(*mlps)
    with torch.no_grad():
        wanted = [mlp(x) for mlp in mlps]
        NativeLinears().run(model)
        for mlp, expected in zip(model, wanted, strict=True):
            torch.testing.assert_close(mlp(x), expected, rtol=0, atol=2e-5)
    assert judged == [mlps[0], *mlps[2:]]
    assert [isinstance(mlp, NativeMlp) for mlp in model] == [True, True, True, False, False]


def test_a_full_round_computes_once_and_keeps_nothing(monkeypatch):
    block = Block(bias=True)
    PackLinears().run(block)
    shared = block.q_proj.shared
    calls = []
    monkeypatch.setattr(shared.linear, "forward", lambda x, inner=shared.linear.forward: calls.append(1) or inner(x))
    x = torch.randn(2, 24)
    block([x, x, x], "qkv")
    assert len(calls) == 1
    assert shared._input is None
    assert not shared._pieces


def test_siblings_that_do_not_match_are_packed_apart():
    block = Block(bias=True)
    block.k_proj = nn.Linear(24, 16, bias=False)
    x = torch.randn(3, 24)
    with torch.no_grad():
        wanted = block([x, x, x], "qkv")
        assert PackLinears().run(block) == 3
        torch.testing.assert_close(block([x, x, x], "qkv"), wanted, rtol=0, atol=2e-5)
    assert {type(child) for child in block.children()} == {PackedLinear}


def test_layers_that_do_more_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    model = nn.ModuleList([Scaled(4, 4), hooked, nn.Linear(4, 4)])
    assert PackLinears().run(model) == 1
    assert [type(child) for child in model] == [Scaled, nn.Linear, PackedLinear]


def test_conv1d_of_gpt2_is_a_linear_layer(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, config)).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        wanted = model(ids).logits
        assert run_passes(model, "cpu", torch.float32) == ["pack-linears"]
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)
    assert not any(isinstance(module, (Conv1D, nn.Linear)) for module in model.modules())


def test_a_tied_head_keeps_its_embedding(tmp_path, llama_config):
    llama_config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, llama_config)).eval()
    before = model.get_input_embeddings().weight.clone()
    run_passes(model, "cpu", torch.float32)
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert torch.equal(model.lm_head.weight, before)


def test_plain_weights_are_freed(tmp_path, llama_config):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, llama_config)).eval()
    run_passes(model, "cpu", torch.float32)
    assert {name.rsplit(".", 2)[-2] for name, _ in model.named_parameters() if "norm" not in name} == {"embed_tokens"}


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cpu", torch.float16), ("cuda:0", torch.float32)]
)
def test_only_float32_on_a_cpu_is_packed(device, dtype):
    model = nn.ModuleList([nn.Linear(4, 4)])
    assert run_passes(model, device, dtype) == []
    assert type(model[0]) is nn.Linear
