"""Ends a step that hangs in Python code, and says whose code it was."""

from __future__ import annotations

import ctypes
import threading
import time
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
        self._fired = self._arrived = False
        self._error = self._error_type()

    def __enter__(self) -> Self:
        self._fired = self._arrived = False
        self._thread_id = threading.get_ident()
        self._timer = threading.Timer(self.timeout_s, self._fire)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The step may end by itself just as the time runs out. An exception on its way is then let in here: taking it
        # back (SetAsyncExc with NULL) would leave CPython 3.11's eval breaker set, on which traced code spins for ever.
        try:
            if self._timer is not None:
                self._timer.cancel()
            with self._lock:
                self._timer = None
            while self._fired and not self._arrived:
                time.sleep(0)
        except StepTimeoutError:
            self._timer = None

    def _error_type(self) -> type[StepTimeoutError]:
        """Return an error class that notes when it is raised in the guarded thread, also if somebody wraps it."""
        watchdog = self

        class OwnTimeoutError(StepTimeoutError):
            def __init__(self, *args: object) -> None:
                watchdog._arrived = True
                super().__init__(*args)

        return OwnTimeoutError

    def _fire(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._fired = True
                target = ctypes.c_ulong(self._thread_id)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(self._error))
