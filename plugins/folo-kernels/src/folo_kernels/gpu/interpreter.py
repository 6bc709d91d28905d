"""Runs Triton kernels on a CPU, in Triton's interpreter, so that tests need no device."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

VARIABLE = "TRITON_INTERPRET"


def enable() -> str | None:
    """Have Triton interpret the kernels that this process imports from now on.

    Returns:
        None, or the reason why that cannot be.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get(VARIABLE) != "1" and "triton" in sys.modules:
        return f"triton was imported before: set {VARIABLE}=1 in the environment"
    os.environ[VARIABLE] = "1"
    _mend_range()
    return None


def _mend_range() -> None:
    """Let a loop run up to a number that was loaded: Triton 3.6 keeps it in an array that numpy 2.4 makes no int of."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_folo_mended"):
        return
    original = interpreter._patch_lang_tensor  # noqa: SLF001 (there is no public place)

    def patch(tensor: Any, scope: Any) -> None:  # noqa: ANN401 (Triton has no types)
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch  # noqa: SLF001
    interpreter._folo_mended = True  # noqa: SLF001
