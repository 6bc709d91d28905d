"""Compiles the kernels, once for each instruction set, when the distribution is built or installed."""

# ruff: noqa: INP001 (run by the build, not imported)

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "src" / "folo_kernels"
SOURCES = PACKAGE / "native"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]
VARIANTS = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "generic": [],
    },
    "aarch64": {"generic": []},
}
"""Compiler flags of each library, by machine."""


class CompileKernels(BuildHookInterface[Any]):
    """Puts compiled libraries into the wheel. Without a C++ compiler the wheel holds none, and Folo runs on torch."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile what is missing or older than its sources."""
        variants = VARIANTS.get(platform.machine(), {}) if sys.platform == "linux" else {}
        compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
        if not variants or compiler is None:
            self.app.display_warning("folo-kernels: no C++ compiler for this machine: built without native kernels")
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: compile_variant(compiler, *item), variants.items()))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] = ["src/folo_kernels/lib/*.so"]


def compile_variant(compiler: str, name: str, flags: list[str]) -> None:
    """Compile one library, unless the one that is there was made from the same sources and flags."""
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, *flags]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = PACKAGE / "lib"
    folder.mkdir(exist_ok=True)
    library, stamp = folder / f"folo-{name}.so", folder / f"folo-{name}.sha256"
    if library.is_file() and stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    partial = library.with_suffix(f".{os.getpid()}.partial")
    subprocess.run([compiler, *FLAGS, *flags, str(SOURCES / "kernels.cpp"), "-o", str(partial)], check=True)  # noqa: S603 (a compiler)
    partial.replace(library)
    stamp.write_text(digest.hexdigest())
