"""Renders chat templates within limits of time and size, in a helper process (see ``template_worker``)."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from folo_core.errors import RequestError

SECONDS = 5.0
MAX_CHARS = 4 * 2**20

_START_SECONDS = 30.0
"""Allowed in addition while the helper process starts, which a loaded machine can draw out."""


class TemplateRenderer:
    """Owns the helper process: started at the first chat, replaced after a template that ran too long."""

    def __init__(self, seconds: float = SECONDS, max_chars: int = MAX_CHARS) -> None:
        self.seconds = seconds
        self.max_chars = max_chars
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The rendered text. May be called from any thread.

        Raises:
            RequestError: the template refuses the conversation, or exceeds the limits; or the conversation holds
                something that is no JSON.
        """
        try:
            request = json.dumps({"template": template, "variables": variables, "max_chars": self.max_chars})
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages: not plain JSON data: {error}") from error
        with self._lock:
            reply = self._ask(request)
        if "error" in reply:
            raise RequestError(f"chat_template: {reply['error']}")
        return reply["text"]

    def _ask(self, request: str) -> dict[str, str]:
        worker = self._worker
        if worker is None or not worker.alive():
            worker = self._worker = _Worker()
            weakref.finalize(self, worker.stop)
            worker.ask('{"template": "", "variables": {}, "max_chars": 1}', _START_SECONDS)
        try:
            reply: dict[str, str] = json.loads(worker.ask(request, self.seconds))
        except TimeoutError:
            self._drop(worker)
            return {"error": f"the template ran for more than {self.seconds:g} s and was stopped"}
        except OSError:
            self._drop(worker)
            return {"error": "the template ended the process that renders it (out of memory?)"}
        return reply

    def _drop(self, worker: _Worker) -> None:
        worker.stop()
        self._worker = None


class _Worker:
    """The process, and a thread that reads its replies: a pipe cannot be read with a timeout on every platform."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("template_worker.py"))
        # -P: the script's folder is this package, whose modules must not shadow the standard library's.
        self._process = subprocess.Popen(  # noqa: S603 (our own script)
            [sys.executable, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._replies), daemon=True).start()

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: str, seconds: float) -> bytes:
        """The reply line.

        Raises:
            TimeoutError: there was none in time.
            OSError: the process is gone.
        """
        assert self._process.stdin is not None  # noqa: S101 (opened as a pipe)
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        try:
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if not reply:
            raise OSError("the process ended")
        return reply

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None  # noqa: S101 (opened as a pipe)
        self._process.stdin.close()


def _read_lines(pipe: IO[bytes], replies: queue.SimpleQueue[bytes]) -> None:
    """Hand on each line, and an empty one at the end."""
    with pipe:
        for line in pipe:
            replies.put(line)
    replies.put(b"")
