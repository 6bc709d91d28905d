"""What an earlier start found out about a model, kept in Folo's cache so that the next start need not ask again.

Only a lean start (``folo_hf.lean``) remembers, and only on the CPU. A finding holds for the very files, options, code
and processor it was made with: its file is named by a digest of all of them, and holds JSON.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
import transformers

import folo_kernels
from folo_core.attention.interface import KVCacheSpec
from folo_hf import lean
from folo_hf.attention import AttentionCall
from folo_hf.cache import cache_folder, write_json
from folo_hf.probe import ModelShape

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 2
"""Raised when what a finding says changes."""


@attrs.frozen
class Memory:
    """The finding about one model, if there is one."""

    file: Path | None
    finding: dict[str, Any] = attrs.field(factory=dict)

    @property
    def plain_names(self) -> bool:
        """Whether transformers is known to rename and merge none of the checkpoint's weights."""
        return self.finding.get("plain_names") is True

    @property
    def decoder_tried(self) -> bool:
        """Whether the whole model is known to give its own logits through the kernels."""
        return self.finding.get("decoder_tried") is True

    def shape(self, module: torch.nn.Module) -> ModelShape | None:
        """What the probe found out, for the module just loaded; None if it must run."""
        found = self.finding.get("shape")
        modules = dict(module.named_modules())
        try:
            return None if found is None else _shape(found, modules)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def keep(self, module: torch.nn.Module, shape: ModelShape, **known: bool) -> None:
        """Remember what this start found out, unless it is known; ``known`` are this class's properties."""
        if self.file is None or self.finding:
            return
        names = {id(each): name for name, each in module.named_modules()}
        specs = [{**attrs.asdict(spec), "dtype": str(spec.dtype).removeprefix("torch.")} for spec in shape.specs]
        found = {
            "specs": specs,
            "layers": [names[key] for key in sorted(shape.layers, key=shape.layers.__getitem__)],
            "calls": [attrs.asdict(call) for call in shape.calls],
            "vocab_size": shape.vocab_size,
        }
        write_json(self.file, {**known, "shape": found})


def _shape(found: dict[str, Any], modules: dict[str, torch.nn.Module]) -> ModelShape:
    specs = [KVCacheSpec(**{**spec, "dtype": getattr(torch, spec["dtype"])}) for spec in found["specs"]]
    layers = {id(modules[name]): index for index, name in enumerate(found["layers"])}
    calls = [AttentionCall(**call) for call in found["calls"]]
    if not len(specs) == len(layers) == len(calls):
        raise ValueError(found)
    return ModelShape(specs=specs, layers=layers, calls=calls, vocab_size=int(found["vocab_size"]))


def recall(folder: Path, device: str, **options: Any) -> Memory:  # noqa: ANN401 (what makes another model of the files)
    """The memory of a model folder, loaded with these options."""
    if not lean.asked() or device != "cpu":
        return Memory(None)
    release = lean.release_of(Path(transformers.__file__).parent / "models")
    if release is None:
        return Memory(None)
    digest = hashlib.sha256(json.dumps([VERSION, release, list(_circumstances(folder)), options]).encode())
    file = cache_folder() / "findings" / f"{digest.hexdigest()[:32]}.json"
    try:
        finding = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Memory(file)
    return Memory(file, finding if isinstance(finding, dict) else {})


def _circumstances(folder: Path) -> Iterator[Any]:
    """What a finding hangs on besides options: the model's files, Folo's own code, torch and the processor."""
    yield [str(folder.resolve()), torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability()]
    own, kernels = Path(__file__).parent, Path(folo_kernels.__file__).parent
    code = [*own.glob("*.py"), *kernels.glob("*.py"), *kernels.glob("lib/*.so")]
    for file in [*sorted(code), *sorted(folder.glob("*.json")), *sorted(folder.glob("*.safetensors"))]:
        status = file.stat()
        yield [file.name, status.st_size, status.st_mtime_ns]
