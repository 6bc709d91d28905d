from __future__ import annotations

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
