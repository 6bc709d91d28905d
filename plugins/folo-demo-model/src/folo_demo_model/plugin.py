"""Entry point: the alias ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from folo_core.errors import ModelLoadError
from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ModelAliasSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
REINSTALL = 'python -m pip install --force-reinstall --no-deps "folo-demo-model"'


def demo_model(folder: Path | None = None) -> Path:
    """The GGUF file that ``demo`` stands for.

    Raises:
        ModelLoadError: the file is not where this distribution was installed with it.
    """
    path = (folder or Path(__file__).parent / "weights") / FILE_NAME
    if not path.is_file():
        raise ModelLoadError(f"model 'demo': {path} is missing from the installation; run: {REINSTALL}")
    return path


@hookimpl
def folo_model_aliases() -> Sequence[ModelAliasSpec]:
    """Offer ``demo``."""
    return [
        ModelAliasSpec(
            name="demo",
            help="SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), 135M parameters, GGUF Q4_1",
            factory=demo_model,
            capabilities=frozenset({"chat", "gguf"}),
        )
    ]
