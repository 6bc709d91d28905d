"""Where a model is: a folder, a GGUF file or a hub id; and whether what lies there is whole and safe to open.

Everything here reads only names, sizes and small headers. Weights in pickle files are never opened, and code that a
checkpoint brings along is never imported.
"""

from __future__ import annotations

import json
import re
import struct
from enum import Enum
from pathlib import Path
from typing import Any

import attrs

from folo_core.errors import ModelLoadError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
GGUF_MAGIC = b"GGUF"
SAFETENSORS_INDEX = "model.safetensors.index.json"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""What is fetched from the hub: neither pickles nor code."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_MAX_HEADER = 100 * 2**20


class Kind(Enum):
    """What a model name points to."""

    FOLDER = "folder"
    GGUF = "gguf"


@attrs.frozen(slots=True)
class Source:
    """A model on this machine's disk."""

    kind: Kind
    path: Path


def locate(model: str, revision: str | None = None) -> Source:
    """Find the model, fetching it from the hub if it is no local path.

    Raises:
        ModelLoadError: there is nothing of that name, or it cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _single_file(path)
    if _looks_like_path(model):
        raise ModelLoadError(f"model: {model!r}: no such file or folder")
    return _in_folder(_from_hub(model, revision))


def _looks_like_path(model: str) -> bool:
    return not HUB_ID.fullmatch(model) or model.endswith((".gguf", ".safetensors", ".bin"))


def _single_file(path: Path) -> Source:
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
            return Source(Kind.GGUF, path)
    if path.suffix == ".gguf":
        raise ModelLoadError(f"model: '{path}': not a GGUF file: its first bytes are wrong; download it again")
    raise ModelLoadError(f"model: '{path}': give a GGUF file, or the folder that holds config.json and *.safetensors")


def _in_folder(path: Path) -> Source:
    """The folder, or the one GGUF file in it if it holds nothing else to load."""
    files = sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").is_file():
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ModelLoadError(f"model: '{path}': holds several GGUF files ({names}); name one of them")
        return _single_file(files[0])
    return Source(Kind.FOLDER, path)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub did not give it"
        raise ModelLoadError(
            f"model: {model!r}: no such folder here, not in the hub cache, and {state} ({_first_line(error)}); "
            "give a local folder or GGUF file, or check the id and the network and try again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        ModelLoadError: it is missing, or not a JSON object that names a model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelLoadError(f"model: '{folder}': has no config.json, so it is no transformers model folder")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise ModelLoadError(f"model: '{path}': holds a {type(config).__name__}, not a JSON object")
    if not isinstance(config.get("model_type"), str):
        raise ModelLoadError(f"model: '{path}': names no model_type, so its architecture is unknown")
    return config


def _read_json(path: Path) -> Any:  # noqa: ANN401 (any JSON value)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"model: '{path}': not readable as JSON: {_first_line(error)}") from error


def check_weights(folder: Path) -> None:
    """Check that the weights are safetensors files and that each is whole.

    Raises:
        ModelLoadError: they are missing, truncated, corrupt, or only there as pickles.
    """
    files = weight_files(folder)
    if not files:
        raise ModelLoadError(_no_weights(folder))
    for file in files:
        check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those that its index names, or all.

    Raises:
        ModelLoadError: the index is broken, or a file that it names is missing.
    """
    index = folder / SAFETENSORS_INDEX
    names = _shards(index) if index.is_file() else sorted(path.name for path in folder.glob("*.safetensors"))
    return [folder / name for name in names]


def weight_names(folder: Path) -> list[str]:
    """Names of all weights in the folder's safetensors files, which ``check_weights`` has found whole."""
    return [name for file in weight_files(folder) for name in _read_header(file)[1] if name != "__metadata__"]


def _shards(index: Path) -> list[str]:
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"model: '{index}': has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelLoadError(f"model: '{index}': names the shard {name!r}, which lies outside the folder")
        if not (index.parent / name).is_file():
            raise ModelLoadError(f"model: '{index.parent}': the shard {name} is missing; download it again")
    return names


def _no_weights(folder: Path) -> str:
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")])
    if pickles:
        return (
            f"model: '{folder}': its weights ({pickles[0].name}) are a pickle, which can run code when it is opened, "
            "and Folo opens none; use a revision with *.safetensors, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return f"model: '{folder}': holds no *.safetensors weights; download the model again"


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's header against its size (https://huggingface.co/docs/safetensors, Format).

    Raises:
        ModelLoadError: the file is truncated or its header is broken.
    """
    size = path.stat().st_size
    try:
        length, entries = _read_header(path)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"model: '{path}': truncated or no safetensors file; download it again") from error
    if size != expected:
        raise ModelLoadError(f"model: '{path}': has {size} bytes where its header says {expected}; download it again")


def _read_header(path: Path) -> tuple[int, Any]:
    """Length and content of a safetensors file's header."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER + 1  # noqa: PLR2004 (a u64)
        return length, json.loads(file.read(length) if length <= _MAX_HEADER else b"")


def check_tokenizer_files(folder: Path) -> None:
    """Check that the folder holds some tokenizer.

    Raises:
        ModelLoadError: it holds none.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise ModelLoadError(
            f"tokenizer: '{folder}': holds no tokenizer files; name another folder or hub id with tokenizer=, "
            "or set skip_tokenizer_init=True and send token ids"
        )
