"""The library that suits the processor is found, and what is missing is said with its mend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folo_kernels import library as native
from folo_kernels.matrix import PackedMatrix, Plain

needs_library = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder where libraries are looked for."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def test_without_a_library_the_mend_is_named(folder):
    with pytest.raises(
        native.KernelsUnavailableError, match=r"no compiled library.*install a C\+\+ compiler"
    ) as caught:
        native.load()
    assert str(folder) in str(caught.value)
    assert native.why_not() == str(caught.value)
    with pytest.raises(native.KernelsUnavailableError):
        PackedMatrix([Plain(torch.zeros(2, 2))])


def test_a_library_that_does_not_load_is_a_reason_too(folder):
    (folder / "folo-generic.so").write_bytes(b"no ELF")
    assert "folo-generic.so" in native.why_not()


@needs_library
@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT", "NO AVX"])
def test_the_best_suitable_library_is_taken(capability, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(native, "Library", lambda path: loaded.append(path.stem) or Fake())
    native.load.cache_clear()
    try:
        native.load()
    finally:
        native.load.cache_clear()
    names = {"AVX512": "avx512", "AVX2": "avx2"}
    wanted = names.get(capability, "generic")
    if (native.FOLDER / f"folo-{wanted}.so").is_file():
        assert loaded == [f"folo-{wanted}"]


class Fake:
    """Notes what it is told."""

    name = "fake"

    def set_team(self, entry, granted, threads, cpus, count):
        self.team = entry, granted, threads, list(cpus)[:count]


@needs_library
def test_a_library_is_loaded_once_and_there_is_no_why_not():
    assert native.load() is native.load()
    assert native.why_not() is None
    assert native.load().vector_lanes in {4, 8, 16}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = native.load().nonsense


@pytest.mark.parametrize("maps", ["", "7f00 r-xp /usr/lib/libomp.so.5\n", OSError("no /proc")])
def test_without_torchs_threads_there_is_one(maps, monkeypatch):
    def read_text(_path, encoding=None):
        if isinstance(maps, OSError):
            raise maps
        return maps

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        assert native._openmp_entries.__wrapped__() == (None, None)
    monkeypatch.setattr(native, "_openmp_entries", lambda: (None, None))
    fake = Fake()
    native.use_threads(fake, 2, (0, 1))
    assert fake.team == (None, None, 2, [0, 1])


@needs_library
def test_the_caller_alone_computes_the_same(monkeypatch):
    library = native.load()
    matrix, x = PackedMatrix([Plain(torch.randn(100, 50))]), torch.randn(30, 50)
    wanted = matrix.multiply(x)
    monkeypatch.setattr(native, "_openmp_entries", lambda: (None, None))
    native.use_threads(library, 2)
    try:
        found = matrix.multiply(x)
    finally:
        monkeypatch.undo()
        native.use_threads(library, torch.get_num_threads())
    assert torch.equal(found, wanted)


@needs_library
def test_torchs_own_threads_are_found():
    """Else every test of two threads would be one of one thread."""
    assert "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert all(native._openmp_entries())
