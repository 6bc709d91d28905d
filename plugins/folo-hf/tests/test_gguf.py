"""GGUF files are converted once, whole or not at all, and give the model that transformers reads from them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from tiny_models import PagedDecoder, make_loader
from transformers import AutoModelForCausalLM

import folo_hf.gguf
from folo_core.errors import ModelLoadError, UnsupportedModelError
from folo_hf.gguf import cache_folder, converted, fingerprint

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def tokens():
    """A byte-level vocabulary: the 256 bytes as GPT-2 spells them, two merges of them, and three special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*bytes_to_unicode().values(), "th", "the", "<|unk|>", "<|bos|>", "<|eos|>"]


def write_gguf(path, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    vocabulary = tokens()
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * 258 + [3] * 3)
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(259)
    writer.add_eos_token_id(260)
    random = np.random.default_rng(0)

    def add(name, *shape):
        data = random.normal(0, 1.5 * shape[-1] ** -0.5, shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", len(vocabulary), HIDDEN)
    add("output.weight", len(vocabulary), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{layer}.ffn_gate.weight", FFN, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", FFN, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FFN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLO_CACHE_DIR", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf")


def test_the_model_is_the_one_in_the_file(tiny):
    loader = make_loader(tiny)
    tokenizer = loader.load_tokenizer()
    model = loader.load_model(tokenizer)
    assert model.info.eos_token_ids == (260,)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    own = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32).eval()
    prompt = [5, 9, 33, 200, 60]
    (got,), _ = PagedDecoder(model).run([prompt], 10)
    wanted = own.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=[], pad_token_id=0)[
        0
    ].tolist()
    assert got == wanted


def test_the_second_start_reads_the_converted_folder(tiny, monkeypatch, capsys):
    folder = converted(tiny, torch.float32)
    assert "converting tiny.gguf" in capsys.readouterr().err
    monkeypatch.setattr(folo_hf.gguf, "_save", lambda *_: pytest.fail("converted again"))
    assert converted(tiny, torch.float32) == folder
    assert not capsys.readouterr().err
    assert folder.parent == cache_folder() / "gguf"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_a_folder_with_one_gguf_file_is_that_file(tiny, tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    tiny.rename(folder / "model.gguf")
    assert make_loader(folder, skip_tokenizer_init=True).load_model(None).info.num_layers == LAYERS
    write_gguf(folder / "other.gguf")
    with pytest.raises(ModelLoadError, match=r"several GGUF files \(model\.gguf, other\.gguf\)"):
        make_loader(folder, skip_tokenizer_init=True).load_model(None)


def test_content_and_dtype_name_the_folder(tiny, tmp_path):
    copy = write_gguf(tmp_path / "again" / "tiny.gguf") if (tmp_path / "again").mkdir() is None else None
    os.utime(copy, (1, 1))
    assert fingerprint(copy) == fingerprint(tiny)
    assert converted(copy, torch.float32) == converted(tiny, torch.float32) != converted(tiny, torch.bfloat16)
    copy.write_bytes(copy.read_bytes()[:-4] + b"\0\1\2\3")
    assert fingerprint(copy) != fingerprint(tiny)


def test_large_files_are_known_by_samples(tiny, monkeypatch):
    monkeypatch.setattr(folo_hf.gguf, "HASH_WHOLE", 10)
    monkeypatch.setattr(folo_hf.gguf, "_SAMPLE", 64)
    first = fingerprint(tiny)
    assert fingerprint(tiny) == first
    os.utime(tiny, (1, 1))
    assert fingerprint(tiny) != first


def test_an_interrupted_conversion_is_done_again(tiny, monkeypatch):
    real = folo_hf.gguf._save

    def half(path, folder, dtype):
        real(path, folder, dtype)
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(folo_hf.gguf, "_save", half)
    with pytest.raises(KeyboardInterrupt):
        converted(tiny, torch.float32)
    assert not [path for path in (cache_folder() / "gguf").iterdir() if path.is_dir()]
    monkeypatch.setattr(folo_hf.gguf, "_save", real)
    assert (converted(tiny, torch.float32) / "model.safetensors").is_file()


def test_leftovers_of_a_killed_process_are_cleared(tiny):
    (cache_folder() / "gguf").mkdir(parents=True)
    leftover = cache_folder() / "gguf" / f"tiny-{fingerprint(tiny)}-float32.partial"
    leftover.mkdir()
    (leftover / "junk").write_text("x")
    assert "junk" not in {path.name for path in converted(tiny, torch.float32).iterdir()}
    assert not leftover.exists()


def test_threads_that_start_together_convert_once(tiny, monkeypatch):
    real, calls = folo_hf.gguf._save, []
    monkeypatch.setattr(folo_hf.gguf, "_save", lambda *args: calls.append(1) or real(*args))
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: converted(tiny, torch.float32), range(3)))
    assert len(folders) == len(calls) == 1


def test_another_process_waits_for_the_lock(tiny):
    """A process that starts while this one converts finds the finished folder and converts nothing."""
    from filelock import FileLock

    name = f"tiny-{fingerprint(tiny)}-float32"
    (cache_folder() / "gguf").mkdir(parents=True)
    code = f"import torch, pathlib, folo_hf.gguf as g; print(g.converted(pathlib.Path({str(tiny)!r}), torch.float32))"
    with FileLock(cache_folder() / "gguf" / f"{name}.lock"):
        other = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        folo_hf.gguf._convert_into(cache_folder() / "gguf" / name, tiny, torch.float32)
    out, err = other.communicate(timeout=120)
    assert out.strip() == str(cache_folder() / "gguf" / name)
    assert "converting" not in err


@pytest.mark.parametrize("keep", [3, 4, 100, 4000, 60_000])
def test_a_truncated_file_is_refused_and_leaves_nothing(tiny, keep):
    tiny.write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf"):
        make_loader(tiny).load_tokenizer()
    folder = cache_folder() / "gguf"
    assert not folder.exists() or not [path for path in folder.iterdir() if path.is_dir()]


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "new.gguf", architecture="futuristic")
    with pytest.raises(UnsupportedModelError, match="futuristic"):
        make_loader(path).load_tokenizer()


def test_no_room_for_the_cache(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folo_hf.gguf, "_save", full)
    with pytest.raises(ModelLoadError, match=r"No space left.*FOLO_CACHE_DIR"):
        converted(tiny, torch.float32)


def test_a_cache_folder_that_cannot_be_made(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOLO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="FOLO_CACHE_DIR"):
        converted(tiny, torch.float32)
