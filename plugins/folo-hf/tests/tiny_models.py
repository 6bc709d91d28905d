"""Tiny models with random weights, a tokenizer for them, and a small paged decoder that drives a LoadedModel."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from folo_attention.sdpa import SdpaBackend
from folo_core.attention.interface import AttentionMetadata
from folo_core.config import CacheConfig, EngineConfig, ModelConfig
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


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
SLIDING = {"sliding_window": 8, "head_dim": 8}

ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen2-sliding": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, **SLIDING, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, **SLIDING, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: transformers.MistralConfig(**SMALL, **SLIDING),
    "gpt2": lambda: transformers.GPT2Config(**SMALL | {"n_positions": 128}),
    "gpt-bigcode": lambda: transformers.GPTBigCodeConfig(**SMALL | {"n_positions": 128}, multi_query=True),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "phi3": lambda: transformers.Phi3Config(**SMALL, sliding_window=8),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, **MOE, num_experts=4, shared_expert_intermediate_size=24
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **MOE, num_experts=4, head_dim=8),
    "granite": lambda: transformers.GraniteConfig(**SMALL, attention_multiplier=0.3, logits_scaling=2.0),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "stablelm": lambda: transformers.StableLmConfig(**SMALL),
    "cohere2": lambda: transformers.Cohere2Config(**SMALL, **SLIDING),
    "starcoder2": lambda: transformers.Starcoder2Config(**SMALL, sliding_window=8),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}  # fmt: skip


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


def make_loader(folder, hardware=None, *, deterministic=False, kv_cache_dtype="auto", **fields):
    fields = {"device": "cpu", **fields}
    model = ModelConfig(model=str(folder), **fields)
    cache = CacheConfig(kv_cache_dtype=kv_cache_dtype)
    return HfLoader(EngineConfig(model=model, cache=cache, deterministic=deterministic), hardware)


class PagedDecoder:
    """Greedy decoding of several sequences through scattered blocks, the smallest engine there can be."""

    def __init__(self, model, block_size=4, num_blocks=96, backend=None):
        self.model, self.size = model, block_size
        self.backend = SdpaBackend() if backend is None else backend
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
