"""A queue of requests in a policy's order."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from folo_core.request import Request


class RequestQueue:
    """A heap with removal by id: push is O(log n), a removed request is skipped when it surfaces."""

    def __init__(self, order: Callable[[Request], Any]) -> None:
        self._order = order
        self._heap: list[tuple[Any, int, Request]] = []
        self._members: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __bool__(self) -> bool:
        return bool(self._members)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._members

    def __iter__(self) -> Iterator[Request]:
        """Iterate in arrival order of the pushes, not in queue order."""
        return iter(self._members.values())

    def push(self, request: Request) -> None:
        """Add a request."""
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (self._order(request), request.arrival, request))

    def peek(self) -> Request:
        """Return the first request.

        Raises:
            IndexError: the queue is empty.
        """
        while self._members.get(self._heap[0][2].request_id) is not self._heap[0][2]:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def remove(self, request_id: str) -> Request | None:
        """Take a request out, wherever it stands; None if it is not there."""
        return self._members.pop(request_id, None)
