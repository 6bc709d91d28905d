"""Seconds from the start of a process to its first token, with empty caches of compiled kernels and with full ones."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")
"""Variables that say where compiled kernels and Folo's own findings are kept."""


@attrs.frozen(kw_only=True)
class Start:
    """One start."""

    ready: float
    """Seconds from the process's start until the engine takes requests."""
    first_token: float
    """Seconds until the first token."""


def measure(folder: Path, device: str, options: dict[str, Any], *, limit: float) -> dict[str, Start]:
    """Start twice with caches of their own, which the first start fills. The folder holds real weights."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="folo-caches-") as caches:
        environment = os.environ | {name: str(Path(caches) / name.lower()) for name in CACHES}
        for which in ("cold", "warm"):
            begin = time.perf_counter()
            found[which] = _start(folder, device, options, environment, limit)
            limit -= time.perf_counter() - begin
    return found


def _start(folder: Path, device: str, options: dict[str, Any], environment: dict[str, str], limit: float) -> Start:
    command = [sys.executable, __file__, str(folder), "--device", device, "--options", json.dumps(options)]
    start = time.time()  # the child compares with it: both read the machine's clock
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        raise SystemExit(f"a start failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    times = json.loads(done.stdout.splitlines()[-1])
    return Start(ready=times["ready"] - start, first_token=times["first"] - start)


def write_folder(empty: Path, folder: Path, device: str) -> Path:
    """Write the random weights of a folder that has only their header, so that a start really reads them."""
    import torch
    from transformers import AutoConfig

    import random_weights

    if not (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(empty)
        module = random_weights.draw(config, dtype=torch.bfloat16, device=device)
        module.save_pretrained(folder, max_shard_size="4GB")
    return folder


def main() -> None:
    """Start an engine, make one token, and print the times of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    from folo_core import LLM, SamplingParams

    llm = LLM(args.folder, device=args.device, skip_tokenizer_init=True, **args.options)
    ready = time.time()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    output = llm.generate([1, 2, 3, 4], params, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 1
    print(json.dumps({"ready": ready, "first": time.time()}))


if __name__ == "__main__":
    main()
