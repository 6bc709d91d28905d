"""Which model to load, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from folo_core.validation import INT64_MAX, Checked, as_int, as_optional_int, boolean, integer, one_of, text

if TYPE_CHECKING:
    import torch

    from folo_core.validation import Data

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTIZATIONS = ("int8", "int4", "fp8")
_ALIASES = {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}
_PART = r"[A-Za-z0-9][\w.:-]*"


def as_dtype(value: str | torch.dtype) -> Data:
    """Canonical name of a dtype given as a name, an alias (``half``, ``bf16``) or a torch.dtype, without torch."""
    is_torch = (type(value).__module__, type(value).__name__) == ("torch", "dtype")
    if not is_torch and not isinstance(value, str):
        return value
    name = str(value).lower().removeprefix("torch.")
    name = _ALIASES.get(name, name)
    return name if name in DTYPES else value


def as_device(value: str | torch.device) -> Data:
    """Name of a device given as a name or a torch.device, without torch."""
    is_torch = (type(value).__module__, type(value).__name__) == ("torch", "device")
    return str(value) if is_torch or isinstance(value, str) else value


@attrs.frozen(slots=True, kw_only=True, repr=False)
class ModelConfig(Checked):
    """The model, its tokenizer and the numbers it runs in."""

    model: str = attrs.field(
        metadata=text(mend="must be a model: a folder, a GGUF file, a hub id or an alias such as 'demo'")
    )
    """A folder, a GGUF file, a hub id, or an alias that a plugin offers."""
    tokenizer: str | None = attrs.field(default=None, metadata=text(optional=True))
    """Where the tokenizer is, if not with the model."""
    dtype: str = attrs.field(default="auto", converter=as_dtype, metadata=one_of(*DTYPES))
    """Numbers of the weights and activations; ``auto`` chooses by the device."""
    quantization: str | None = attrs.field(default=None, metadata=one_of(*QUANTIZATIONS, optional=True))
    """Bits in which the loader stores the weights that products read, rounding them; None keeps them in ``dtype``.
    Activations, keys and values stay in ``dtype``, but that with ``fp8`` the inputs of products are rounded, too.
    A loader that cannot do it refuses to load the model."""
    device: str = attrs.field(
        default="auto",
        converter=as_device,
        metadata=text(pattern=r"[a-z]+(:\d+)?", mend="must be 'auto' or a device such as 'cpu', 'cuda' or 'cuda:0'"),
    )
    """Where the model runs; ``auto`` takes the first accelerator, else the CPU."""
    revision: str | None = attrs.field(default=None, metadata=text(optional=True))
    """Branch, tag or commit of a hub model."""
    max_model_len: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """Longest sequence in tokens, prompt and output; None for the longest the model's positions allow."""
    seed: int = attrs.field(default=0, converter=as_int, metadata=integer(low=0, high=INT64_MAX))
    """From which requests without a seed draw theirs."""
    skip_tokenizer_init: bool = attrs.field(default=False, metadata=boolean())
    """Load no tokenizer: prompts and outputs are token ids."""
    loader: str = attrs.field(
        default="auto", metadata=text(pattern=_PART, mend="must be 'auto' or the name of a model loader")
    )
    """Name of a model loader plugin; ``auto`` takes the first that can load the model."""
    attention: str = attrs.field(
        default="auto", metadata=text(pattern=_PART, mend="must be 'auto' or the name of an attention backend")
    )
    """Name of an attention backend plugin; ``auto`` takes the best for the device."""
    graphs: bool = attrs.field(default=True, metadata=boolean())
    """On CUDA, record the decode steps of a model that allows it, and replay them: a launch in place of hundreds."""
    chat_template: str | None = attrs.field(default=None, metadata=text(optional=True))
    """Jinja template, or a file with one, in place of the model's own."""
