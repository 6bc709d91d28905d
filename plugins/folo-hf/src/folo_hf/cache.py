"""Folo's cache folder, and small JSON files in it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs


def cache_folder() -> Path:
    """Folder of Folo's caches: ``FOLO_CACHE_DIR``, else the platform's user cache."""
    chosen = os.environ.get("FOLO_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("folo", appauthor=False))


def write_json(file: Path, content: Any) -> None:  # noqa: ANN401 (any JSON value)
    """Write a file whole or not at all; a cache that cannot be written is none, and no error."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
        with open(handle, "w", encoding="utf-8") as stream:  # noqa: PTH123 (an open descriptor)
            json.dump(content, stream)
        Path(partial).replace(file)
