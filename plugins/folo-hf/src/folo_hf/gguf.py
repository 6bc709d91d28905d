"""Converts a GGUF file to a folder of safetensors, once, in Folo's cache.

Reading GGUF means undoing its quantisation tensor by tensor, which takes most of a minute even for a small model.
The folder is named by the file's content and the dtype, so that a second start, from any environment, finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from typing import TYPE_CHECKING

from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from folo_core.errors import ModelLoadError, UnsupportedModelError
from folo_hf import lean
from folo_hf.cache import cache_folder, write_json
from folo_hf.quiet import quiet

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

CONVERSION = 1
"""Raised when the folders that conversion writes change, so that older ones are not used."""

HASH_WHOLE = 512 * 2**20
"""Files up to this many bytes are known by the digest of all their bytes; larger ones by size, time and samples."""

_SAMPLE = 2**20


def converted(path: Path, dtype: torch.dtype) -> Path:
    """The safetensors folder of a GGUF file; converts it if no earlier start did.

    Safe to call from several processes at once: one converts, the others wait and use its folder. A conversion that
    was interrupted leaves nothing that a later one would take for finished.

    Raises:
        ModelLoadError: the file cannot be read, or the cache folder cannot be written.
        UnsupportedModelError: transformers does not know the file's architecture.
    """
    name = f"{path.stem}-{fingerprint(path)}-{str(dtype).removeprefix('torch.')}"
    target = cache_folder() / "gguf" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{name}.lock")):
            if not target.is_dir():
                _convert_into(target, path, dtype)
    except OSError as error:
        raise ModelLoadError(
            f"model: '{path}': its safetensors could not be written to '{target.parent}' ({error}); "
            "free some space there or set FOLO_CACHE_DIR to another folder"
        ) from error
    return target


def fingerprint(path: Path) -> str:
    """Short hexadecimal digest that tells the file's content from any other's.

    A lean start reads a file again only if it was touched since its digest was last taken.
    """
    if not lean.asked():
        return _digest(path)
    note = cache_folder() / "gguf" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}.json"
    status = path.stat()
    state = [CONVERSION, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    try:
        known_state, known = json.loads(note.read_text(encoding="utf-8"))
        if known_state == state and re.fullmatch("[0-9a-f]{16}", known):
            return str(known)
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    digest = _digest(path)
    write_json(note, [state, digest])
    return digest


def _digest(path: Path) -> str:
    digest = hashlib.sha256(f"{CONVERSION}".encode())
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= HASH_WHOLE:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            for offset in (0, status.st_size // 2, status.st_size - _SAMPLE):
                file.seek(offset)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _convert_into(target: Path, path: Path, dtype: torch.dtype) -> None:
    """Convert into a folder beside ``target`` and rename it when it is complete."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    size = path.stat().st_size // 2**20
    _say(f"converting {path.name} ({size} MiB) to safetensors, once; this takes a moment")
    start = time.monotonic()
    try:
        _save(path, partial, dtype)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _say(f"converted in {time.monotonic() - start:.0f} s into {target}")


def _save(path: Path, folder: Path, dtype: torch.dtype) -> None:
    options = {"gguf_file": path.name, "trust_remote_code": False}
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **options)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        except OSError as error:
            raise ModelLoadError(f"model: '{path}': {error}") from error
        except Exception as error:
            raise _unreadable(path, error) from error
        _drop_quantisation_marks(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _unreadable(path: Path, error: Exception) -> ModelLoadError:
    text = str(error).strip() or type(error).__name__
    if "not supported" in text:
        return UnsupportedModelError(f"model: '{path}': {text}")
    return ModelLoadError(
        f"model: '{path}': transformers could not read it ({type(error).__name__}: {text}); "
        "it may be truncated: download it again, or use the model's safetensors folder"
    )


def _drop_quantisation_marks(model: PreTrainedModel) -> None:
    """The weights are plain now, but transformers would refuse to save a model that is marked as quantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _say(text: str) -> None:
    sys.stderr.write(f"folo: {text}\n")
    sys.stderr.flush()
