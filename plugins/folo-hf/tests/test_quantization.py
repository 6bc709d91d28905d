"""Quantised weights: what is refused before they are read, and that what runs is the rounded model and no other."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, PagedDecoder, make_loader, save_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from folo_core.errors import ConfigError, UnsupportedModelError
from folo_hf.native import NativeLinear, NativeMlp, packed_matrices
from folo_hf.passes import FusedPart
from folo_kernels.matrix import Format

PROMPT = [5, 9, 33, 7, 60, 61, 8, 8, 90, 11, 4, 77, 13]
MLP = ("gate_proj", "up_proj", "down_proj")


class OneCard:
    """A machine with a CUDA device, as far as names go."""

    def cuda_devices(self):
        return 1

    def cuda_capability(self, index):
        return (8, 0)

    def cuda_name(self, index):
        return "A100"


def load(folder, quantization, **fields):
    return make_loader(folder, quantization=quantization, skip_tokenizer_init=True, **fields).load_model(None)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(
    ("fields", "hardware", "words"),
    [
        ({"dtype": "bfloat16"}, None, r'bfloat16 on cpu.*give device="cpu" and dtype="float32"'),
        ({"deterministic": True}, None, r"deterministic=True.*give one of the two up"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_weights_are_read(quantization, fields, hardware, words, tmp_path):
    loader = make_loader(tmp_path, hardware, quantization=quantization, skip_tokenizer_init=True, **fields)
    for load_part in (loader.load_tokenizer, lambda: loader.load_model(None)):
        with pytest.raises(ConfigError, match=f"model.quantization: '{quantization}': .*{words}"):
            load_part()


def test_without_compiled_kernels_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("folo_hf.native.why_not", lambda: "none was compiled")
    with pytest.raises(ConfigError, match=r"model.quantization: 'int8': .*none was compiled.*leave quantization out"):
        load(tmp_path, "int8")


def test_a_model_of_stacked_experts_is_refused(tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["mixtral"]())
    with pytest.raises(UnsupportedModelError, match=r"model.quantization: 'int4': of MixtralForCausalLM, \d+ weights"):
        load(folder, "int4")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gpt2", "olmo2"])
def test_it_computes_with_the_rounded_weights(name, quantization, tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES[name]())
    model = load(folder, quantization)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        plain = dense(torch.tensor([PROMPT])).logits[0, -1]
        moved = give_rounded(dense, model.module)
        rounded = dense(torch.tensor([PROMPT])).logits[0, -1]
    _, (logits,) = PagedDecoder(model).run([PROMPT], 1)
    assert moved > 0
    torch.testing.assert_close(logits[0], rounded, rtol=0, atol=1e-4)
    assert (rounded - plain).abs().max() > 1e-3, "rounding shows, so the weights compared with are the rounded ones"


def give_rounded(dense, quantised):
    """Put the weights that ``quantised`` computes with into the linear layers of ``dense``; count them."""
    if dense.config.tie_word_embeddings:
        head = dense.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    modules = dict(quantised.named_modules())
    moved = 0
    for name, target in dense.named_modules():
        parent, _, leaf = name.rpartition(".")
        weight = rounded_weight(modules.get(name), modules.get(parent), leaf)
        if weight is not None:
            target.weight.data = weight.t() if isinstance(target, Conv1D) else weight
            moved += 1
    return moved


def rounded_weight(module, parent, leaf):
    if isinstance(module, NativeLinear):
        return module.weight
    if isinstance(module, FusedPart):
        return module.shared.linear.matrix.plain()[module._index]
    if isinstance(parent, NativeMlp) and leaf in MLP:
        return [*parent.gate_up.plain(), *parent.down.plain()][MLP.index(leaf)]
    return None


@pytest.mark.parametrize(("quantization", "inner"), [("int8", Format.INT8), ("int4", Format.INT4)])
def test_a_tied_head_is_rounded_to_8_bits_and_the_embedding_is_not(quantization, inner, tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["llama-tied"]())
    module = load(folder, quantization).module
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight
    assert torch.equal(module.get_input_embeddings().weight, saved)
    assert module.lm_head.matrix.format == Format.INT8
    assert (module.lm_head.weight - saved).abs().max() < saved.abs().max() / 127
    assert not torch.equal(module.lm_head.weight, saved)
    assert {matrix.format for matrix in packed_matrices(module.model)} == {inner}


def test_weights_in_float32_are_freed_and_what_is_left_is_told(tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["llama-tied"]())
    models = {quantization: load(folder, quantization) for quantization in (None, "int8", "int4")}
    assert {name.rsplit(".", 2)[-2] for name, _ in models["int4"].module.named_parameters() if "norm" not in name} == {
        "embed_tokens"
    }
    told = [model.info.weight_bytes for model in models.values()]
    assert told == sorted(told, reverse=True)
    assert told[2] < 0.4 * told[0]
    assert [model.info.quantization for model in models.values()] == [None, "int8", "int4"]
    kept = sum(parameter.nbytes for parameter in models["int4"].module.parameters())
    assert told[2] == kept + sum(matrix.nbytes for matrix in packed_matrices(models["int4"].module))


def test_the_weights_of_packed_torch_linears_are_counted(tmp_path):
    folder = save_model(tmp_path, ARCHITECTURES["llama"]())
    model = make_loader(folder, deterministic=True, skip_tokenizer_init=True).load_model(None)
    assert model.info.weight_bytes == 4 * model.info.num_parameters
