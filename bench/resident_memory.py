"""How much resident memory an engine gains over 10,000 requests: a tiny random Llama through ``LLM``.

``python bench/resident_memory.py [REQUESTS]``. oneDNN keeps code for every number of rows that a packed linear layer
has seen, so a step of every size and a tenth of the requests come first; what that takes is told apart.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from folo_core import LLM, SamplingParams

VOCAB = 512
BATCH = 100
STEP_TOKENS = 64


def resident_bytes() -> int:
    """Return the bytes of this process that lie in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def save_tiny_llama(folder: str) -> None:
    """Write a model of two small layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=VOCAB - 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def serve(llm: LLM, count: int, generator: random.Random) -> int:
    """Run ``count`` requests in batches, and return how many tokens they brought; some are left before their end."""
    tokens = 0
    for _ in range(count // BATCH):
        beginning = [generator.randrange(VOCAB)] * 16
        prompts = [
            beginning[: generator.choice([0, 16])]
            + [generator.randrange(VOCAB) for _ in range(generator.randint(1, 24))]
            for _ in range(BATCH)
        ]
        params = [
            SamplingParams(temperature=generator.choice([0.0, 0.8]), max_tokens=generator.randint(1, 6))
            for _ in range(BATCH)
        ]
        left = generator.randrange(BATCH)
        finished = llm.generate_as_finished([{"prompt_token_ids": prompt} for prompt in prompts], params)
        for number, (_, output) in enumerate(finished):
            tokens += len(output.outputs[0].token_ids)
            if number == left:
                break  # aborts the rest of this batch
        finished.close()  # type: ignore[attr-defined]
    return tokens


def main() -> None:
    """Print the growth."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_llama(folder)
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="float32",
            max_num_seqs=32,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=STEP_TOKENS,
            num_blocks=48,
            block_size=16,
            enable_prefix_caching=True,
            swap_space="16MiB",
        )
        generator = random.Random(0)  # noqa: S311 (a mix of requests, no secret)
        cold = resident_bytes()
        for size in range(1, STEP_TOKENS):
            llm.generate([{"prompt_token_ids": [size] * size}], SamplingParams(max_tokens=1))
        serve(llm, count // 10, generator)
        before, started = resident_bytes(), time.perf_counter()
        tokens = serve(llm, count, generator)
        seconds = time.perf_counter() - started
        grown = resident_bytes() - before
    stats = llm.engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    warm = f"{(before - cold) / 1e6:+.1f} MB by {STEP_TOKENS} sizes of steps and {count // 10} requests"
    print(f"resident memory: {cold / 1e6:.1f} MB with the model, {warm}, {grown / 1e6:+.1f} MB by {count} more")
    print(
        f"{tokens} tokens in {seconds:.0f} s, {stats.num_preemptions} preemptions, {stats.num_swaps} swaps, "
        f"{stats.prefix_cache.num_hit_tokens} tokens found in the prefix cache"
    )


if __name__ == "__main__":
    main()
