"""Ends a step that hangs in Python code, and says whose code it was."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING

from folo_core.errors import StepTimeoutError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class StepWatchdog:
    """Raises StepTimeoutError inside the guarded thread when a step runs past its time.

    CPython delivers the exception between two bytecodes, so a loop in Python is interrupted at once and a
    blocking call in C when it returns. As a context manager it guards one step at a time.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._thread_id = 0
        self._fired = False

    def __enter__(self) -> Self:
        self._fired = False
        self._thread_id = threading.get_ident()
        self._timer = threading.Timer(self.timeout_s, self._fire)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._timer is not None  # noqa: S101 (set on entering)
        self._timer.cancel()
        with self._lock:
            if self._fired and not isinstance(error, StepTimeoutError):
                # The step ended by itself just as the time ran out: take the undelivered exception back.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), None)
            self._timer = None

    def _fire(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._fired = True
                target = ctypes.c_ulong(self._thread_id)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(StepTimeoutError))
