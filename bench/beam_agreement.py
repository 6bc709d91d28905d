"""How often beam search gives transformers' own hypotheses, and how far scores lie apart: the whole cross product.

The end-to-end suite tests a part of it in a minute. This runs every prompt of every architecture with every width,
length penalty and mode of early stopping, and the demo model's 32 real prompts, and prints how many of the searches
agree outright, in all of their ``width`` hypotheses. Every difference is judged as the suite judges it: both
hypotheses are scored again densely, and anything but a tie stops the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from folo_core import LLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "end_to_end"), str(ROOT / "plugins" / "folo-hf" / "tests")]


@attrs.frozen
class Pair:
    """One model in both engines."""

    llm: LLM
    reference: PreTrainedModel
    eos: list[int]
    new_tokens: int


def compare(pair: Pair, prompts: list[list[int]], case: tuple[int, float, bool | str]) -> tuple[int, float]:
    """Search once with both; return how many searches agree outright and the largest difference of scores."""
    from test_beam import assert_same, reference

    from folo_beam import BeamParams

    width, penalty, early = case
    params = BeamParams(width=width, length_penalty=penalty, early_stopping=early, n=width, max_tokens=pair.new_tokens)
    outputs = pair.llm.generate(prompts, params, use_tqdm=False)
    expected = reference(pair.reference, prompts, pair.eos, width, penalty, early, pair.new_tokens)
    rows = list(zip(prompts, outputs, expected, strict=True))
    equal = sum(assert_same(pair.reference, prompt, penalty, output.outputs, found) for prompt, output, found in rows)
    gaps = [
        abs((completion.score or 0.0) - score)
        for _, output, found in rows
        for completion, (_, score) in zip(output.outputs, found, strict=True)
        if score is not None
    ]
    return equal, max(gaps, default=0.0)


def tiny(name: str) -> tuple[int, int, float]:
    """Compare one architecture; return searches, those that agree outright, and the largest difference of scores."""
    from test_beam import CASES, EOS, NEW_TOKENS, build, prompts_of

    from folo_core import LLM

    with tempfile.TemporaryDirectory() as folder:
        model = build(folder, name)
        llm = LLM(
            folder, skip_tokenizer_init=True, dtype="float32", num_blocks=4000, block_size=4, max_model_len=64,
            max_num_seqs=512, max_num_batched_tokens=4096,
        )  # fmt: skip
        prompts = [prompt for batch in prompts_of(name) for prompt in batch]
        pair = Pair(llm, model, EOS[name], NEW_TOKENS)
        found = [compare(pair, prompts, case) for case in CASES]
    return len(prompts) * len(CASES), sum(equal for equal, _ in found), max(gap for _, gap in found)


def demo() -> tuple[int, int, float]:
    """Compare the demo model's real prompts at width 4."""
    import torch
    from prompts import PROMPTS
    from transformers import AutoModelForCausalLM

    from folo_core import LLM
    from folo_demo_model.plugin import demo_model
    from folo_hf.gguf import converted

    llm = LLM("demo", dtype="float32", max_model_len=512)
    model = AutoModelForCausalLM.from_pretrained(converted(demo_model(), torch.float32), dtype=torch.float32).eval()
    tokenizer = llm.get_tokenizer()
    prompts = sorted((tokenizer.encode(prompt) for prompt in PROMPTS[:32]), key=len)
    eos = list(llm.engine.inputs.info.eos_token_ids)
    pair = Pair(llm, model, eos, 24)
    parts = [compare(pair, prompts[i : i + 8], (4, 1.0, False)) for i in range(0, 32, 8)]
    return 32, sum(equal for equal, _ in parts), max(gap for _, gap in parts)


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["llama", "qwen3", "gemma2", "gpt-neox", "demo"])
    for name in parser.parse_args().models:
        start = time.perf_counter()
        searches, equal, gap = demo() if name == "demo" else tiny(name)
        took = time.perf_counter() - start
        print(
            f"{name:9} {searches:5} searches: {equal} agree outright, {searches - equal} up to ties; "
            f"scores at most {gap:.1e} apart ({took:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
