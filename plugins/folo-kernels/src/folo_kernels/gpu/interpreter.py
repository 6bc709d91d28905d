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
    _patch_once()
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


def _patch_once() -> None:
    """Have the language be patched once a launch: Triton 3.6 does it again in each call of a function by a kernel.

    It then looks through the whole language for what is left to patch, and finds nothing: most of a launch's time.
    """
    from triton.runtime import interpreter

    if isinstance(interpreter._patch_lang, _PatchOnce):  # noqa: SLF001 (there is no public place)
        return
    interpreter._patch_lang = _PatchOnce(interpreter)  # noqa: SLF001


class _PatchOnce:
    """Triton's ``_patch_lang``, which remembers until the launch ends which modules it has patched."""

    def __init__(self, interpreter: Any) -> None:  # noqa: ANN401 (Triton has no types)
        self._patch = interpreter._patch_lang  # noqa: SLF001
        self._make_scope = interpreter._LangPatchScope  # noqa: SLF001
        self._modules = (interpreter.tl, interpreter.tl.core)
        self._launch: Any = None
        self._patched: set[frozenset[int]] = set()

    def __call__(self, fn: Any) -> Any:  # noqa: ANN401
        """Patch what ``fn`` sees of the language; return the scope whose ``restore`` undoes it."""
        seen = frozenset(id(value) for value in fn.__globals__.values() if any(value is each for each in self._modules))
        if self._launch is None:
            return self._begin(fn, seen)
        if seen not in self._patched:
            self._patched.add(seen)
            # Triton never restores what a called function had patched; here it ends with the launch.
            self._launch._changes += self._patch(fn)._changes  # noqa: SLF001
        return self._make_scope()

    def _begin(self, fn: Any, seen: frozenset[int]) -> Any:  # noqa: ANN401
        self._launch, self._patched = self._patch(fn), {seen}
        restore = self._launch.restore

        def end() -> None:
            self._launch = None
            restore()

        self._launch.restore = end
        return self._launch
