"""Whatever is wrong with a model's files is said in one clear error, and code that comes with a model never runs."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, make_loader, save_model, save_tokenizer

from folo_core.errors import ModelLoadError


def load(folder, **fields):
    loader = make_loader(folder, **fields)
    return loader.load_model(loader.load_tokenizer())


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_fixture_itself_loads(llama):
    assert load(llama).info.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "model.gguf", "~/nowhere", "a/b/c"])
def test_missing_path(name):
    with pytest.raises(ModelLoadError, match=r"no such file or folder"):
        load(name)


@pytest.mark.parametrize("name", ["no-such-model", "some-org/no-such-model"])
def test_hub_id_without_a_network(name):
    with pytest.raises(ModelLoadError, match=rf"'{name}'.*HF_HUB_OFFLINE is set.*give a local folder"):
        load(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelLoadError, match="give a GGUF file, or the folder"):
        load(tmp_path / "model.safetensors")


def test_no_config(llama):
    (llama / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load(llama)


CORRUPT = [b"", b"{", b"\xff\xfe", b"[1]", b"null", b'{"a": 1}', b'{"model_type": 3}', b"[" * 10**5]


@pytest.mark.parametrize("content", CORRUPT)
def test_corrupt_config(llama, content):
    (llama / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        make_loader(llama).load_model(None)


def test_config_that_contradicts_itself(llama):
    edit_json(llama / "config.json", hidden_size=33, head_dim=None)
    with pytest.raises(ModelLoadError, match="model: "):
        load(llama)


def test_unknown_architecture(llama):
    edit_json(llama / "config.json", model_type="llama99")
    with pytest.raises(ModelLoadError, match="'llama99' is unknown to the installed transformers"):
        make_loader(llama).load_model(None)


def test_another_models_config(llama):
    edit_json(llama / "config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(ModelLoadError, match=r"lacks \d+ weights.*q_norm|q_norm"):
        make_loader(llama).load_model(None)


def test_weights_of_another_shape(llama):
    edit_json(llama / "config.json", intermediate_size=64)
    with pytest.raises(ModelLoadError, match="model: "):
        make_loader(llama).load_model(None)


def test_no_weights(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"holds no \*\.safetensors"):
        load(llama)


@pytest.mark.parametrize("keep", [0, 5, 40, 3000, -1])
def test_truncated_weights(llama, keep):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors': (truncated|has \d+ bytes)"):
        load(llama)


def test_weights_that_are_something_else(llama):
    (llama / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 1000)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        load(llama)


def test_incomplete_weights_are_not_filled_with_random_numbers(llama):
    path = llama / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights \(model\.layers\.1\.self_attn\.q_proj\.weight\)"):
        load(llama)


def test_missing_shard(llama):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00002.safetensors is missing"):
        load(llama)


def test_shard_outside_the_folder(llama):
    shutil.copy(llama / "model.safetensors", llama.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="outside the folder"):
        load(llama)


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_never_opened(llama, tmp_path, name):
    marker = tmp_path / "ran"
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(pickle.dumps(Canary(marker)))
    with pytest.raises(ModelLoadError, match=r"pickle.*safetensors"):
        load(llama)
    assert not marker.exists()
    pickle.loads((llama / name).read_bytes())  # noqa: S301 (the canary does sing when it is let out)
    assert marker.exists()


@pytest.fixture
def canary_code(llama, tmp_path):
    """A module in the model's folder that writes a file when it is imported."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\nclass Mine(LlamaForCausalLM): ...\n"
    (llama / "code.py").write_text(code)
    return marker


def test_code_of_an_unknown_architecture_is_refused(llama, canary_code):
    edit_json(
        llama / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"},
    )
    with pytest.raises(ModelLoadError, match=r"auto_map.*runs no code"):
        make_loader(llama).load_model(None)
    assert not canary_code.exists()


def test_code_beside_a_known_architecture_is_passed_over(llama, canary_code):
    edit_json(llama / "config.json", auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"})
    assert type(load(llama).module).__module__.startswith("transformers.models.llama")
    assert not canary_code.exists()


def test_tokenizer_code_is_refused(llama, canary_code):
    (llama / "tokenizer.json").unlink()
    edit_json(
        llama / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", "code.Mine"]}
    )
    with pytest.raises(ModelLoadError, match="tokenizer"):
        make_loader(llama).load_tokenizer()
    assert not canary_code.exists()


def test_no_tokenizer(llama):
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer files.*skip_tokenizer_init"):
        load(llama)
    loader = make_loader(llama, skip_tokenizer_init=True)
    assert loader.load_tokenizer() is None
    assert loader.load_model(None).info.vocab_size == VOCAB


def test_broken_tokenizer(llama):
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer: .*skip_tokenizer_init"):
        load(llama)


def test_tokenizer_from_elsewhere(llama, tmp_path):
    other = save_tokenizer(tmp_path / "other", size=50, eos_token="</s>")  # noqa: S106
    assert len(make_loader(llama, tokenizer=str(other)).load_tokenizer()) == 50


def test_a_larger_tokenizer_grows_the_embeddings(tmp_path, llama_config, caplog):
    save_model(tmp_path, llama_config)
    save_tokenizer(tmp_path, size=VOCAB + 5, eos_token="</s>")  # noqa: S106 (a token of text)
    first, second = load(tmp_path), load(tmp_path)
    assert f"has {VOCAB + 5} tokens, the model's vocabulary {VOCAB}" in caplog.text
    assert first.info.vocab_size == VOCAB + 5
    embeddings = first.module.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[VOCAB:], embeddings[:VOCAB].mean(0).expand(5, -1))
    assert torch.equal(embeddings, second.module.get_input_embeddings().weight)


def test_a_smaller_tokenizer_is_no_fault(tmp_path, llama_config, caplog):
    save_model(tmp_path, llama_config)
    save_tokenizer(tmp_path, size=VOCAB - 5, bos_token="<s>", eos_token="</s>", pad_token="</s>")  # noqa: S106
    assert load(tmp_path).info.vocab_size == VOCAB
    assert not caplog.text


def test_a_failed_load_leaves_no_attention_registered(llama):
    from transformers import AttentionInterface

    before = set(AttentionInterface._global_mapping)
    edit_json(llama / "config.json", intermediate_size=64)
    with pytest.raises(ModelLoadError):
        make_loader(llama).load_model(None)
    assert set(AttentionInterface._global_mapping) <= before
