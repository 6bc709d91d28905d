"""A queue of requests in a policy's order."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from folo_core.request import Request

Entry = tuple[Any, int, "Request"]


class RequestQueue:
    """A heap for each tenant, with removal by id: push is O(log n), a removed request is skipped when it surfaces."""

    def __init__(self, order: Callable[[Request], Any]) -> None:
        self._order = order
        self._heaps: dict[str, list[Entry]] = {}
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
        heap = self._heaps.setdefault(request.tenant, [])
        heapq.heappush(heap, (self._order(request), request.arrival, request))

    def peek(self) -> Request:
        """Return the first request.

        Raises:
            IndexError: the queue is empty.
        """
        first = min(self._heads(), default=None)
        if first is None:
            raise IndexError("the queue is empty")
        return first[2]

    def firsts(self) -> list[Request]:
        """Return each tenant's first request, in queue order."""
        return [request for _, _, request in sorted(self._heads())]

    def remove(self, request_id: str) -> Request | None:
        """Take a request out, wherever it stands; None if it is not there."""
        return self._members.pop(request_id, None)

    def _heads(self) -> list[Entry]:
        heads = []
        for tenant, heap in list(self._heaps.items()):
            while heap and self._members.get(heap[0][2].request_id) is not heap[0][2]:
                heapq.heappop(heap)
            if heap:
                heads.append(heap[0])
            else:
                del self._heaps[tenant]
        return heads
