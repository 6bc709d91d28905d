"""The models that are measured: their shapes as transformers' configurations, and folders that stand for them."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from pathlib import Path

BF16 = 2
"""Bytes of a bfloat16 number."""


@attrs.frozen(kw_only=True)
class Shape:
    """A model without its weights."""

    name: str
    like: str
    """Whose shape it is."""
    config: dict[str, Any]
    """What stands in ``config.json``."""
    max_model_len: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers, in bfloat16."""
        config = self.config
        return 2 * BF16 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of all layers."""
        config = self.config
        hidden, head = config["hidden_size"], config["head_dim"]
        attention = hidden * head * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
        return int(config["num_hidden_layers"] * (attention + 3 * hidden * config["intermediate_size"]))

    @property
    def head_parameters(self) -> int:
        """Numbers in the matrix that gives the logits."""
        return int(self.config["vocab_size"] * self.config["hidden_size"])

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads, in bfloat16: of an untied embedding it reads only a few rows."""
        return BF16 * (self.layer_parameters + self.head_parameters)


def _qwen3(**sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_parameters": rope}
    return config | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "dtype": "bfloat16"} | sizes


def _llama(**sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": rope}
    return config | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "bfloat16"} | sizes


A = Shape(
    name="A",
    like="Qwen3-0.6B",
    max_model_len=4096,
    config=_qwen3(
        vocab_size=151_936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, max_position_embeddings=40_960,
    ),
)  # fmt: skip
B = Shape(
    name="B",
    like="Llama-3.1-8B",
    max_model_len=4096,
    config=_llama(
        vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=14_336, max_position_embeddings=131_072,
    ),
)  # fmt: skip

_TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_TINY |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
TINY_A = Shape(name="A", like="Qwen3, tiny", max_model_len=128, config=_qwen3(**_TINY))
TINY_B = Shape(name="B", like="Llama, tiny", max_model_len=128, config=_llama(**_TINY))


def shapes(*, tiny: bool) -> dict[str, Shape]:
    """Return the models by letter."""
    return {"A": TINY_A, "B": TINY_B} if tiny else {"A": A, "B": B}


def write_empty_folder(shape: Shape, folder: Path) -> Path:
    """Write a folder whose weights are a hole: a whole header, and zeros that take no room on the disk.

    A loader that fills the weights itself (``random_weights``) finds all it checks before it would read them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    tied = set(getattr(module, "all_tied_weights_keys", ()))
    header, end = {}, 0
    for name, weight in module.state_dict().items():
        if name not in tied:
            start, end = end, end + BF16 * weight.numel()
            header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder
