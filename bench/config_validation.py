"""What validation costs: building SamplingParams, fitting a batch of them to a model, reading an EngineConfig.

A batch is checked with ``validate_batch`` and, for comparison, one by one, as 1,000 uses of one object and as 1,000
objects of their own. Checks that keep the engine safe run at construction or at admission, never later.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from folo_core.config import EngineConfig, ModelConfig, dumps_json, dumps_toml, load
from folo_core.sampling_params import SamplingParams, validate_batch
from timing import measure, show

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 50_000
BATCH = 1000
FULL = {
    "n": 2,
    "best_of": 4,
    "temperature": 0.8,
    "top_p": 0.95,
    "top_k": 50,
    "min_p": 0.05,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "seed": 7,
    "stop": ["\n\n", "END"],
    "stop_token_ids": [1, 2, 3],
    "bad_words": ["never"],
    "max_tokens": 256,
    "min_tokens": 8,
    "logprobs": 5,
    "logit_bias": dict.fromkeys(range(16), 1.0),
    "allowed_token_ids": list(range(64)),
}


def one_by_one(batch: list[SamplingParams]) -> None:
    """Check each request by itself."""
    for params in batch:
        params.validate_for(VOCAB)


def rows(folder: Path) -> dict[str, tuple[Callable[[], object], int]]:
    """Every measured piece of work, by name, with how often to call it in a run."""
    config = EngineConfig(model="demo", cache={"kv_cache_bytes": "2GiB"}, extra_config={"trace": {"depth": 3}})
    files = {"TOML": folder / "folo.toml", "JSON": folder / "folo.json"}
    files["TOML"].write_text(dumps_toml(config), encoding="utf-8")
    files["JSON"].write_text(dumps_json(config), encoding="utf-8")
    usual = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 64}
    same = [SamplingParams(**usual)] * BATCH
    distinct = [SamplingParams(**usual, seed=seed) for seed in range(BATCH)]
    return {
        "SamplingParams()": (SamplingParams, 2000),
        "SamplingParams(temperature, top_p, max_tokens)": (lambda: SamplingParams(**usual), 2000),
        "SamplingParams(18 fields, 64 allowed ids)": (lambda: SamplingParams(**FULL), 500),
        "validate_batch, 1,000 times one object": (lambda: validate_batch(same, vocab_size=VOCAB), 50),
        "the same, one by one": (lambda: one_by_one(same), 5),
        "validate_batch, 1,000 distinct objects": (lambda: validate_batch(distinct, vocab_size=VOCAB), 5),
        "the same, one by one (distinct)": (lambda: one_by_one(distinct), 5),
        "ModelConfig(model)": (lambda: ModelConfig(model="demo"), 1000),
        "EngineConfig(model)": (lambda: EngineConfig(model="demo"), 500),
        "EngineConfig.from_options(6 keywords)": (_from_options, 100),
        "load a TOML file": (lambda: load(files["TOML"]), 50),
        "load a JSON file": (lambda: load(files["JSON"]), 50),
    }


def _from_options() -> EngineConfig:
    return EngineConfig.from_options(
        model="demo", dtype="half", seed=1, max_model_len=128, max_num_seqs=8, block_size=32
    )


def main() -> None:
    """Print one line per piece of work, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, in microseconds")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        results = {name: measure(work, calls=calls) for name, (work, calls) in rows(Path(folder)).items()}
    if as_json:
        plain = {name: {"median_us": m * 1e6, "best_us": b * 1e6} for name, (m, b) in results.items()}
        print(json.dumps(plain, indent=2))
        return
    for name, (median, best) in results.items():
        show(name, median, best)


if __name__ == "__main__":
    main()
