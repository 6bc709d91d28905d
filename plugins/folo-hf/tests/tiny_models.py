"""Tiny models with random weights, a tokenizer for them, and a small paged decoder that drives a LoadedModel."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from folo_attention.sdpa import SdpaBackend
from folo_core.attention.interface import AttentionMetadata
from folo_core.config import EngineConfig, ModelConfig
from folo_hf.loader import HfLoader

VOCAB = 96

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder, config, *, dtype=torch.float32):
    """A model of the config with random weights large enough for its choices to be clear."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        # Scaled to keep activations of order one, whatever the width.
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
    model.generation_config.pad_token_id = 0
    model.to(dtype).save_pretrained(folder)
    return folder


def save_tokenizer(folder, size=VOCAB, **special):
    words = {f"w{i}": i for i in range(size - 3)} | {"<unk>": size - 3, "<s>": size - 2, "</s>": size - 1}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106 (a token of text)
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special).save_pretrained(folder)  # noqa: S106
    return folder


def make_loader(folder, hardware=None, **fields):
    fields = {"device": "cpu", **fields}
    return HfLoader(EngineConfig(model=ModelConfig(model=str(folder), **fields)), hardware)


class PagedDecoder:
    """Greedy decoding of several sequences through scattered blocks, the smallest engine there can be."""

    def __init__(self, model, block_size=4, num_blocks=96):
        self.model, self.size = model, block_size
        self.backend = SdpaBackend()
        self.backend.allocate(model.kv_cache_specs, num_blocks, block_size, model.device)
        model.bind(self.backend)
        self.free = list(np.random.default_rng(1).permutation(np.arange(1, num_blocks)))

    def run(self, prompts, new_tokens, chunk=7):
        """Prompts enter one step after another, in chunks; returns tokens and the logits that chose them."""
        tokens = [list(prompt) for prompt in prompts]
        tables = [[] for _ in prompts]
        done = [0] * len(prompts)
        logits = [[] for _ in prompts]
        step, parts = 0, []
        while parts or step <= len(prompts):
            parts = [
                (i, done[i], min(len(tokens[i]), done[i] + chunk))
                for i in range(min(step + 1, len(prompts)))
                if len(logits[i]) < new_tokens
            ]
            step += 1
            rows = self.step(tokens, tables, parts) if parts else []
            for row, (i, _, end) in zip(rows, parts, strict=True):
                done[i] = end
                if end == len(tokens[i]):
                    logits[i].append(row)
                    tokens[i].append(int(row.argmax()))
        return tokens, [torch.stack(rows) for rows in logits]

    def step(self, tokens, tables, parts):
        slots = []
        for i, begin, end in parts:
            while len(tables[i]) * self.size < end:
                tables[i].append(self.free.pop())
            slots += [tables[i][p // self.size] * self.size + p % self.size for p in range(begin, end)]
        width = max(len(tables[i]) for i, *_ in parts)
        counts = [end - begin for _, begin, end in parts]
        device = self.model.device
        metadata = AttentionMetadata(
            num_tokens=sum(counts),
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            seq_lens=np.array([end for *_, end in parts], np.int32),
            block_tables=np.array([tables[i] + [0] * (width - len(tables[i])) for i, *_ in parts], np.int32),
            slot_mapping=torch.tensor(slots, device=device),
            block_size=self.size,
        )
        metadata.plan = self.backend.plan(metadata)
        return self.model.forward(
            torch.tensor([t for i, begin, end in parts for t in tokens[i][begin:end]], device=device),
            torch.tensor([p for _, begin, end in parts for p in range(begin, end)], device=device),
            torch.from_numpy(metadata.query_start[1:].astype(np.int64) - 1).to(device),
            metadata,
        )
