"""Settings for every test of every distribution: no network, one thread, reproducible property tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings

if TYPE_CHECKING:
    from collections.abc import Generator

# Set before torch and transformers are imported. A test suite runs many tiny matrices, for which threads only cost.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test does take two threads, the one that waits must not keep the other's core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Triton's kernels are tested everywhere: where there is no CUDA device, in its interpreter. It is asked for before
# anything imports Triton, whose own functions are made for one or the other on import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: a shared machine pauses when it likes. Slow data generation is no fault either, only a wrong answer is.
settings.register_profile("folo", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("thorough", parent=settings.get_profile("folo"), max_examples=2000)
# A mutant need not be shown small, and it dies of the same examples each time.
settings.register_profile(
    "mutants",
    parent=settings.get_profile("folo"),
    phases=[Phase.explicit, Phase.generate],
    database=None,
    derandomize=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "folo"))


def pytest_collection_finish() -> None:
    """Have Triton's interpreter, where tests imported it, run as it does for the kernels' own tests."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        from folo_kernels.gpu import interpreter

        interpreter.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Measure no coverage in slow tests: it doubles their time, and they come where quick ones have been before."""
    measured = "coverage" in sys.modules and item.get_closest_marker("slow") is not None
    coverage = sys.modules["coverage"].Coverage.current() if measured else None
    if coverage is None:
        return (yield)
    coverage.stop()
    try:
        return (yield)
    finally:
        coverage.start()
