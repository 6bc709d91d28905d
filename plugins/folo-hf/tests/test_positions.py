"""Rotary frequencies depend on the model alone, never on how long a neighbour has grown."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SMALL, PagedDecoder, make_loader, save_model
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig

from folo_hf.positions import UNLIMITED, position_limit


def longrope():
    half = 32 // 4 // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * half, "long_factor": [4.0] * half,
    }  # fmt: skip
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    return Phi3Config(**SMALL | lengths, rope_parameters=rope)


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return LlamaConfig(**SMALL | {"max_position_embeddings": 64}, rope_parameters=rope)


@pytest.mark.parametrize(
    ("config", "wanted", "limit"),
    [
        (LlamaConfig(**SMALL), None, 128),
        (LlamaConfig(**SMALL), 1000, 128),
        (longrope(), None, 16),
        (longrope(), 16, 16),
        (longrope(), 40, 64),
        (dynamic(), None, 16),
        (dynamic(), 40, 16),
        (PretrainedConfig(), None, UNLIMITED),
    ],
)
def test_limit(config, wanted, limit):
    assert position_limit(config, wanted) == limit


@pytest.mark.parametrize("length", [10, 30])
def test_long_frequencies_from_the_first_token_on(tmp_path, length):
    """Beyond the original length transformers uses the long factors too, so it is the oracle there."""
    folder = save_model(tmp_path, longrope())
    loader = make_loader(folder, skip_tokenizer_init=True, max_model_len=40)
    decoder = PagedDecoder(loader.load_model(None))
    prompts = [list(range(3, 3 + length)), [5, 6, 7]]
    _, (logits, short) = decoder.run(prompts, 1)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        # One position past the original length makes transformers choose the long factors for all.
        ids = [prompt + [0] * (17 - len(prompt)) for prompt in prompts]
        rows = [reference(torch.tensor([i])).logits[0, len(p) - 1] for i, p in zip(ids, prompts, strict=True)]
    torch.testing.assert_close(logits[0], rows[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(short[0], rows[1], rtol=0, atol=1e-4)


def test_short_frequencies_within_the_original_length(tmp_path):
    folder = save_model(tmp_path, longrope())
    model = make_loader(folder, skip_tokenizer_init=True).load_model(None)
    assert model.info.max_model_len == 16
    _, (logits,) = PagedDecoder(model).run([[5, 6, 7]], 1)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits[0], reference(torch.tensor([[5, 6, 7]])).logits[0, -1], rtol=0, atol=1e-4)
