"""The online face: the same engine on a thread of its own, and an async stream per request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.errors import EngineDeadError
from folo_core.plugins.assembly import build_components
from folo_core.plugins.manager import load_registry
from folo_core.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from folo_core.components import Components
    from folo_core.engine.input_processor import Prompt
    from folo_core.engine.reporting import EngineStats
    from folo_core.outputs import RequestOutput
    from folo_core.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class _Stream:
    """One request's outputs on their way to the event loop; a slow reader of cumulative ones skips to the newest."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.keep_all = True
        self._items: deque[RequestOutput | BaseException] = deque()
        self._ready = asyncio.Event()

    def put(self, item: RequestOutput | BaseException) -> None:
        """Deliver an item. Called on the event loop."""
        if self._items and not self.keep_all:
            self._items.clear()
        self._items.append(item)
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Wait for the next output; raise if the engine sent an error instead."""
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item


class AsyncEngine:
    """Serves concurrent callers. Use as ``async with``, or call ``shutdown`` at the end."""

    def __init__(self, components: Components) -> None:
        self.engine = Engine(components)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._request_ids = itertools.count()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="folo-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_options(cls, model: str, **options: Any) -> Self:  # noqa: ANN401 (each option's section judges its type)
        """Build from flat keywords, as ``LLM`` does."""
        config = EngineConfig.from_options(model=model, **options)
        registry = load_registry(block=config.blocked_plugins, strict=config.strict_plugins)
        return cls(build_components(config, registry))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive() and self._failure is None

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Stream a request's outputs. Leaving the loop early, or being cancelled, aborts the request.

        Raises:
            RequestError: the prompt cannot be served, or the id is in use.
            ParamsError: the parameters do not fit the model.
            EngineDeadError: the engine has stopped.
        """
        request_id = f"async-{next(self._request_ids)}" if request_id is None else request_id

        def start() -> None:
            self.engine.add_request(request_id, prompt, sampling_params, priority=priority, tenant=tenant)

        return self._stream(request_id, start)

    def fork(
        self,
        request_id: str,
        new_request_id: str | None = None,
        *,
        at: int | None = None,
        row: int = 0,
        params: SamplingParams | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Branch a running request and stream the branch's outputs, which begin with what it took over.

        See ``Engine.fork``. Leaving the loop early, or being cancelled, aborts the branch, not its source.

        Raises:
            RequestError: an id is unknown or in use, or ``at`` or ``row`` names what is not there.
            ParamsError: ``params`` do not fit.
            EngineDeadError: the engine has stopped.
        """
        new_id = f"async-{next(self._request_ids)}" if new_request_id is None else new_request_id

        def start() -> None:
            self.engine.fork(request_id, new_id, at=at, row=row, params=params)

        return self._stream(new_id, start)

    async def _stream(self, request_id: str, start: Callable[[], None]) -> AsyncGenerator[RequestOutput, None]:
        """Start a request on the engine's thread and yield its outputs; abort it if the reader leaves."""
        stream = _Stream(asyncio.get_running_loop())
        finished = False
        try:
            await self._call(lambda: self._open(request_id, stream, start))
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished and self.is_alive:
                self._commands.put(lambda: self._abort_stream(request_id, stream))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with ``finish_reason="abort"``. Unknown ids are ignored."""
        await self._call(lambda: self._deliver(self.engine.abort(request_id)))

    async def stats(self) -> EngineStats:
        """Return queues, memory and the prefix cache's hit rate as they are between two steps."""
        found: list[EngineStats] = []
        await self._call(lambda: found.append(self.engine.stats()))
        return found[0]

    async def reset_prefix_cache(self) -> None:
        """Forget what was computed for earlier prompts."""
        await self._call(self.engine.reset_prefix_cache)

    async def shutdown(self) -> None:
        """Stop the engine's thread; requests still running are aborted first."""
        if self._thread.is_alive():
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)

    async def _call(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the engine's thread and wait for it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def run() -> None:
            try:
                function()
            except Exception as error:  # noqa: BLE001 (it belongs to the caller)
                loop.call_soon_threadsafe(_settle, done, error)
            else:
                loop.call_soon_threadsafe(_settle, done, None)

        self._require_alive()
        self._commands.put(run)
        while not done.done():
            await asyncio.wait([done], timeout=1.0)
            if not done.done() and not self._thread.is_alive():
                self._require_alive()
        await done

    def _require_alive(self) -> None:
        if not self.is_alive:
            message = "the engine has stopped" if self._failure is None else f"the engine has failed: {self._failure}"
            raise EngineDeadError(message) from self._failure

    def _open(self, request_id: str, stream: _Stream, start: Callable[[], None]) -> None:
        start()
        stream.keep_all = self.engine.requests[request_id].params.output_kind is RequestOutputKind.DELTA
        self._streams[request_id] = stream

    def _abort_stream(self, request_id: str, stream: _Stream) -> None:
        """Abort for a reader that left, unless the id has been given to a newer request."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.engine.abort(request_id)

    def _work(self) -> None:
        """Step while there is work, and sleep on the command queue while there is none."""
        try:
            while self._run_commands():
                self._deliver(self.engine.step())
        except BaseException as error:
            logger.exception("the engine has failed")
            self._failure = error
        self._close()

    def _run_commands(self) -> bool:
        """Run what callers asked for; return False when asked to stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_unfinished_requests)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            if self.engine.has_unfinished_requests and self._commands.empty():
                return True

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs to their streams, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | BaseException]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, items in by_loop.items():
            _put_all(loop, items)

    def _close(self) -> None:
        """Tell every reader that nothing more will come."""
        if self._failure is None:
            self._deliver(self.engine.abort(list(self.engine.requests)))
        for stream in self._streams.values():
            message = f"the engine has failed: {self._failure}" if self._failure else "the engine has stopped"
            error = EngineDeadError(message)
            error.__cause__ = self._failure
            _put_all(stream.loop, [(stream, error)])
        self._streams.clear()


def _put_all(loop: asyncio.AbstractEventLoop, items: list[tuple[_Stream, RequestOutput | BaseException]]) -> None:
    def put() -> None:
        for stream, item in items:
            stream.put(item)

    if not loop.is_closed():
        loop.call_soon_threadsafe(put)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
