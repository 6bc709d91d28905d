from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import transformers

# Test modules are imported by path, so that equal names in other distributions do not clash; helpers are not.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import SMALL, save_model, save_tokenizer


@pytest.fixture(autouse=True)
def _private(tmp_path_factory, monkeypatch):
    """Neither the user's cache nor the network."""
    monkeypatch.setenv("FOLO_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "folo-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def llama_config():
    return transformers.LlamaConfig(**SMALL)


@pytest.fixture
def llama(tmp_path, llama_config):
    """Folder of a whole tiny Llama with its tokenizer."""
    save_model(tmp_path / "llama", llama_config)
    return save_tokenizer(tmp_path / "llama", bos_token="<s>", eos_token="</s>")  # noqa: S106


@pytest.fixture
def few_programs(monkeypatch):
    """Heads together in each program, as in long steps: the interpreter's time goes by programs.

    The kernels' own tests compare both ways; in steps of one token each head still has a program of its own.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("folo_kernels.gpu.layers.FEW_TOKENS", 1)
