"""Finds the compiled library that suits this processor, and lends it torch's threads."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "lib"

SUITABLE = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}
"""Names of libraries by what torch says this processor has, best first."""


class KernelsUnavailableError(RuntimeError):
    """There is no library for this machine."""


class Store(ctypes.Structure):
    """``Store`` of native/attention.hpp: one layer's keys and values."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("kv_heads", ctypes.c_int32),
        ("key_size", ctypes.c_int32),
        ("value_size", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("block_room", ctypes.c_int32),
        ("value_room", ctypes.c_int32),
    )


class Step(ctypes.Structure):
    """``Step`` of native/attention.hpp: one step's packed batch."""

    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_seqs", ctypes.c_int32),
        ("table_width", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
    )


class Attention(ctypes.Structure):
    """``Attention`` of native/attention.hpp: one layer's queries."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Matrix(ctypes.Structure):
    """``Matrix`` of native/matrix.hpp: packed weights."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("panel_bytes", ctypes.c_int64),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("num_panels", ctypes.c_int32),
        ("format", ctypes.c_int32),
    )


class Source(ctypes.Structure):
    """``Source`` of native/packing.hpp: plain weights."""

    _fields_ = (
        ("weights", ctypes.c_void_p * 4),
        ("biases", ctypes.c_void_p * 4),
        ("outputs", ctypes.c_int32 * 4),
        ("count", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    )


class Product(ctypes.Structure):
    """``Product`` of native/matrix.hpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("matrix", ctypes.POINTER(Matrix)),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("epilogue", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """``Layer`` of native/decoder.hpp."""

    _fields_ = (
        *((f"{name}_norm", ctypes.c_void_p) for name in ("input", "query", "key", "attention", "feed", "output")),
        *((name, ctypes.POINTER(Matrix)) for name in ("qkv", "out", "gate_up", "down")),
        ("store", ctypes.POINTER(Store)),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Rotary(ctypes.Structure):
    """``Rotary`` of native/decoder.hpp."""

    _fields_ = (("cosine", ctypes.c_void_p), ("sine", ctypes.c_void_p))


STAGES = ("norm", "qkv", "kv write", "attention", "attention out", "gate-up", "down")
"""``Stage`` of native/decoder.hpp."""


class Decoder(ctypes.Structure):
    """``Decoder`` of native/decoder.hpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("num_layers", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("seconds", ctypes.c_double * len(STAGES)),
    )


class DecoderStep(ctypes.Structure):
    """``DecoderStep`` of native/decoder.hpp."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("rotary", ctypes.POINTER(Rotary)),
        ("rotary_size", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "folo_lanes": (ctypes.c_int32, ()),
    "folo_panel_bytes": (ctypes.c_int64, (ctypes.c_int32, ctypes.c_int32)),
    "folo_set_team": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)),
    "folo_pack": (None, (ctypes.c_void_p,) * 4),
    "folo_unpack": (None, (ctypes.c_void_p,) * 2),
    "folo_multiply": (None, (ctypes.c_void_p,)),
    "folo_write": (None, (ctypes.c_void_p,) * 4),
    "folo_attend": (None, (ctypes.c_void_p,) * 3),
    "folo_normalise": (
        None,
        (*(ctypes.c_void_p,) * 2, ctypes.c_int32, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p),
    ),
    "folo_workspace_floats": (ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int32)),
    "folo_decode": (None, (ctypes.c_void_p,) * 3),
}


class Library:
    """The loaded library; its functions are attributes, named as in native/kernels.cpp without ``folo_``."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem.removeprefix("folo-")
        handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("folo_"), function)
        self.vector_lanes: int = self.lanes()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (a C function)
        raise AttributeError(name)


@functools.cache
def load() -> Library:
    """Load the library that suits this processor, with torch's threads.

    Raises:
        KernelsUnavailableError: none was compiled for it.
    """
    names = SUITABLE.get(torch.backends.cpu.get_cpu_capability(), ("generic",))
    found = next((path for name in names if (path := FOLDER / f"folo-{name}.so").is_file()), None)
    if found is None:
        raise KernelsUnavailableError(
            f"no compiled library among {', '.join(names)} in {FOLDER}: install a C++ compiler and folo-kernels again"
        )
    library = Library(found)
    use_threads(library, torch.get_num_threads())
    return library


@functools.cache
def settled() -> Library:
    """Load the library and settle once, by measuring, on how many threads it runs and whether they are bound."""
    from folo_kernels.threads import settle

    library = load()
    logger.info("native kernels: %s, %s", library.name, settle(library))
    return library


def why_not() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    try:
        load()
    except (KernelsUnavailableError, OSError, AttributeError) as error:  # the last: a library of another version
        return str(error)
    return None


def use_threads(library: Library, threads: int, cpus: tuple[int, ...] = ()) -> None:
    """Run on so many of torch's threads, bound to these processors if any are given."""
    array = (ctypes.c_int32 * max(1, len(cpus)))(*cpus)
    library.set_team(*_openmp_entries(), threads, array, len(cpus))


@functools.cache
def _openmp_entries() -> tuple[int | None, int | None]:
    """Addresses of ``GOMP_parallel`` and ``omp_get_num_threads`` in the OpenMP runtime that torch has loaded.

    None where it uses another runtime: then the caller runs alone.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None, None
    for path in sorted(set(re.findall(r"\s(/\S*libgomp\S*)$", maps, re.MULTILINE))):
        # Already loaded, so this gives the copy in use and no second one.
        runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        addresses = (
            ctypes.cast(entry, ctypes.c_void_p).value for entry in (runtime.GOMP_parallel, runtime.omp_get_num_threads)
        )
        return next(addresses), next(addresses)
    return None, None
