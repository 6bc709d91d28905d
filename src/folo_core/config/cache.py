"""How much memory keys and values get, and how it is divided."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs

from folo_core.validation import (
    INT64_MAX,
    Checked,
    Relation,
    as_float,
    as_int,
    as_optional_int,
    boolean,
    integer,
    number,
    one_of,
    rule,
)

if TYPE_CHECKING:
    from folo_core.validation import (
        Data,
    )

MAX_BLOCK_SIZE = 256
KV_CACHE_DTYPES = ("auto", "fp8")
_UNITS = {"": 1} | {f"{p}b": 1000**i for i, p in enumerate(("", "k", "m", "g", "t"))}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)", re.ASCII)


def as_bytes(value: int | str) -> Data:
    """Bytes of a size such as ``2GiB``, ``1.5 GB`` or ``4096``; anything else unchanged."""
    if not isinstance(value, str):
        return as_int(value)
    match = _SIZE.fullmatch(value.strip().lower())
    if match is None or match[2] not in _UNITS:
        return value
    whole, _, fraction = match[1].partition(".")
    # Integer arithmetic: a float would round sizes beyond 2**53.
    return int(whole + fraction) * _UNITS[match[2]] // 10 ** len(fraction)


def as_optional_bytes(value: int | str | None) -> Data:
    """Like ``as_bytes``, with None for None."""
    return None if value is None else as_bytes(value)


def _size(*, low: int, optional: bool = False) -> dict[str, Any]:
    mend = f"must be a size of at least {low}: a whole number of bytes, or text such as '2GiB' or '512 MiB'"
    return rule(lambda value: type(value) is int and low <= value <= INT64_MAX, mend, optional=optional)


def _is_block_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_BLOCK_SIZE and value & (value - 1) == 0


def _one_budget(cache: CacheConfig) -> str | None:
    if cache.num_blocks is None or cache.kv_cache_bytes is None:
        return None
    return f"num_blocks: {cache.num_blocks}: contradicts kv_cache_bytes ({cache.kv_cache_bytes}); give only one"


def _prefix_cache_is_on(cache: CacheConfig) -> str | None:
    if cache.prefix_cache_size is None or cache.enable_prefix_caching:
        return None
    return f"prefix_cache_size: {cache.prefix_cache_size}: has no effect; set enable_prefix_caching = true"


def _prefix_cache_fits(cache: CacheConfig) -> str | None:
    if cache.prefix_cache_size is None or cache.num_blocks is None or cache.prefix_cache_size <= cache.num_blocks:
        return None
    return f"prefix_cache_size: {cache.prefix_cache_size}: must be <= num_blocks ({cache.num_blocks})"


@attrs.frozen(slots=True, kw_only=True, repr=False)
class CacheConfig(Checked):
    """The paged key-value cache."""

    RELATIONS = (
        Relation(("num_blocks", "kv_cache_bytes"), _one_budget),
        Relation(("prefix_cache_size", "enable_prefix_caching"), _prefix_cache_is_on),
        Relation(("prefix_cache_size", "num_blocks"), _prefix_cache_fits),
    )

    block_size: int = attrs.field(
        default=16,
        converter=as_int,
        metadata=rule(_is_block_size, f"must be a power of two from 1 to {MAX_BLOCK_SIZE}"),
    )
    """Tokens per block; a power of two."""
    gpu_memory_utilization: float = attrs.field(default=0.9, converter=as_float, metadata=number(above=0, high=1))
    """Share of the device's memory for weights, activations and cache together."""
    kv_cache_bytes: int | None = attrs.field(
        default=None, converter=as_optional_bytes, metadata=_size(low=1, optional=True)
    )
    """Budget of the cache in bytes, in place of ``gpu_memory_utilization``; accepts ``"2GiB"``."""
    num_blocks: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """Number of blocks, in place of either budget."""
    kv_cache_dtype: str = attrs.field(default="auto", metadata=one_of(*KV_CACHE_DTYPES))
    """Numbers that keys and values are stored in: ``auto`` is the model's dtype; ``fp8`` is float8 (e4m3), half the
    bytes of 16-bit numbers, on CUDA devices that have it."""
    swap_space: int = attrs.field(default=0, converter=as_bytes, metadata=_size(low=0))
    """Host memory for swapped-out sequences, in bytes; accepts ``"4GiB"``; 0 for none."""
    enable_prefix_caching: bool = attrs.field(default=False, metadata=boolean())
    """Keep the blocks of finished prompts for later prompts with the same beginning."""
    prefix_cache_size: int | None = attrs.field(
        default=None, converter=as_optional_int, metadata=integer(low=1, optional=True)
    )
    """Most blocks kept for that; None for as many as are free."""
