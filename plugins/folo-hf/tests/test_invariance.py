"""With ``deterministic``, a token's logits are the same bits alone, in a batch, in chunks, on one thread and on two."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, SMALL, PagedDecoder, make_loader, save_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, activations

from folo_attention.fixed import FixedOrderBackend
from folo_core.errors import ConfigError, UnsupportedModelError
from folo_hf import invariance
from folo_hf.invariance import STEADY, SteadyActivation, SteadyActivations, SteadyRows, padded_linear

PROMPTS = [[5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13], [40], list(range(10, 40))]
NEW_TOKENS = 5
ODD = SMALL | {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 50}
CONFIGS = ARCHITECTURES | {"llama-odd": lambda: transformers.LlamaConfig(**ODD)}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def load(folder, name, **options):
    save_model(folder, CONFIGS[name]())
    return make_loader(folder, skip_tokenizer_init=True, **options).load_model(None)


def trial(model, backend, order, chunk, threads=2):
    """Tokens and logits of every prompt, by its place in ``PROMPTS``."""
    torch.set_num_threads(threads)
    decoder = PagedDecoder(model, backend=backend())
    tokens, logits = decoder.run([PROMPTS[i] for i in order], NEW_TOKENS, chunk=chunk)
    return {i: (tokens[place], logits[place]) for place, i in enumerate(order)}


def differs(one, other):
    return any(one[i][0] != other[i][0] or not torch.equal(one[i][1], other[i][1]) for i in other)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_keeps_its_bits(name, tmp_path):
    model = load(tmp_path, name, deterministic=True)
    assert model.info.batch_invariant
    wanted = trial(model, FixedOrderBackend, [0, 1, 2], 7)
    for order, chunk, threads in [([0], 100, 2), ([1], 100, 1), ([2], 1, 2), ([2, 0, 1], 3, 1), ([1, 2, 0], 16, 2)]:
        assert not differs(wanted, trial(model, FixedOrderBackend, order, chunk, threads)), (order, chunk, threads)


@pytest.mark.parametrize("name", ["llama-odd", "mixtral"])
def test_the_default_mode_does_differ(name, tmp_path):
    """Else the test above would prove nothing."""
    from folo_attention.sdpa import SdpaBackend

    model = load(tmp_path, name)
    assert not model.info.batch_invariant
    wanted = trial(model, SdpaBackend, [0, 1, 2], 7)
    assert any(
        differs(wanted, trial(model, SdpaBackend, order, chunk)) for order, chunk in [([2], 1), ([2, 0, 1], 100)]
    )


def test_only_models_that_need_it_run_under_the_mode(tmp_path):
    guards = {name: load(tmp_path / name, name, deterministic=True)._guard for name in ("llama", "mixtral")}
    assert guards["mixtral"] is SteadyRows
    assert guards["llama"] is not SteadyRows


def test_logits_are_transformers_own(tmp_path):
    model = load(tmp_path, "qwen3-moe", deterministic=True)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    for place, (tokens, logits) in trial(model, FixedOrderBackend, [0, 1, 2], 7).items():
        with torch.no_grad():
            own = reference(torch.tensor([tokens])).logits[0, len(PROMPTS[place]) - 1 : -1]
        torch.testing.assert_close(logits, own, rtol=0, atol=1e-4)


def test_a_model_that_depends_on_the_number_of_rows_is_refused_by_name(tmp_path, monkeypatch):
    inner = transformers.models.llama.modeling_llama.LlamaMLP.forward

    def forward(self, x):
        return inner(self, x) * (1 + 1e-6 * x.shape[1])

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM gives a token other bits in a step of 1 tokens"):
        load(tmp_path, "llama", deterministic=True)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_refused_before_the_weights_are_read(dtype, tmp_path):
    loader = make_loader(tmp_path / "nothing", deterministic=True, dtype=dtype)
    with pytest.raises(ConfigError, match=rf'deterministic: True: {dtype} on cpu.*dtype="float32"'):
        loader.load_model(None)


@pytest.mark.parametrize("kind", [*STEADY, nn.GELU])
def test_a_steady_activation_equals_the_plain_one(kind):
    plain = nn.Sequential(kind())
    x = torch.cat([torch.randn(5000) * 4, torch.tensor([0.0, -0.0, 200.0, -200.0, math.inf, 1e-30])])
    wanted = plain(x)
    assert SteadyActivations().run(plain) == 1
    assert isinstance(plain[0], SteadyActivation)
    torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-6)
    assert plain(torch.tensor([math.nan])).isnan().all()


def test_a_steady_activation_does_not_depend_on_an_elements_place():
    x = torch.randn(40_000)
    for kind in STEADY:
        plain = nn.Sequential(kind())
        SteadyActivations().run(plain)
        whole = plain(x)
        for first, last in [(0, 1), (3, 17), (5, 38_000), (39_999, 40_000)]:
            assert torch.equal(plain(x[first:last].clone()), whole[first:last])


def test_the_plain_activation_does():
    x = torch.randn(40_000)
    whole = functional.silu(x)
    assert any(not torch.equal(functional.silu(x[: 8 * i + 7]), whole[: 8 * i + 7]) for i in range(50))


def test_other_approximations_of_gelu_keep_their_own():
    model = nn.Sequential(nn.GELU(approximate="tanh"), activations.NewGELUActivation(), nn.ReLU())
    x = torch.randn(1000)
    wanted = model(x)
    assert SteadyActivations().run(model) == 1
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 70), st.sampled_from([1, 5, 33, 64]), st.sampled_from([1, 6, 50]), st.booleans())
def test_a_padded_linear_is_the_plain_one(rows, inputs, outputs, bias):
    torch.manual_seed(rows)
    linear, x = nn.Linear(inputs, outputs, bias=bias).requires_grad_(requires_grad=False), torch.randn(2, rows, inputs)
    torch.testing.assert_close(padded_linear(x, linear.weight, linear.bias), linear(x), rtol=0, atol=2e-5)


def test_the_mode_reaches_functions_that_no_pass_does():
    x, weight = torch.randn(33, 64), torch.randn(48, 64)
    narrow = x[:, :7].clone()
    with SteadyRows():
        many = functional.linear(x, weight), torch.sigmoid(narrow), functional.silu(narrow, inplace=True)
        one = functional.linear(x[5:6], weight), x[5:6, :7].clone().sigmoid(), functional.silu(x[5:6, :7])
    assert all(torch.equal(all_rows[5:6], row) for all_rows, row in zip(many, one, strict=True))
    assert set(invariance.STEADY_CALLS) >= {functional.linear, functional.silu, torch.sigmoid}
