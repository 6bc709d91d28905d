"""The demo model, once through Folo and once through transformers, from the same converted weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models of every architecture are built by the loader's own tests.
sys.path.append(str(Path(__file__).parents[2] / "plugins" / "folo-hf" / "tests"))


@pytest.fixture(scope="session")
def demo() -> Any:
    """The demo model through Folo, in fp32, many sequences at once."""
    from folo_core import LLM

    return LLM("demo", dtype="float32", max_model_len=512, max_num_seqs=16, max_num_batched_tokens=256, max_logprobs=-1)


@pytest.fixture(scope="session")
def demo_folder(demo: Any) -> Path:
    """The folder of safetensors that the loader made of the GGUF file."""
    from folo_demo_model.plugin import demo_model
    from folo_hf.gguf import converted

    return converted(demo_model(), torch.float32)


@pytest.fixture(scope="session")
def reference(demo_folder: Path) -> Any:
    """The same weights through transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()
