from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from folo_kernels import library as native

# Test modules are imported by path, so that equal names in other distributions do not clash; helpers are not.
sys.path.insert(0, str(Path(__file__).parent))

RUNNABLE = native.SUITABLE.get(torch.backends.cpu.get_cpu_capability(), ("generic",))
COMPILED = [name for name in RUNNABLE if (native.FOLDER / f"folo-{name}.so").is_file()]


@pytest.fixture(scope="module", params=COMPILED or ["none"])
def library(request):
    """Each library that this processor can run, on two threads, in place of the best one."""
    if request.param == "none":
        pytest.skip(str(native.why_not()))
    found = native.Library(native.FOLDER / f"folo-{request.param}.so")
    native.use_threads(found, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: found)
        yield found
    native.use_threads(found, torch.get_num_threads())
