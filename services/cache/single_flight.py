"""One recompute at a time per key."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from shard_router.errors import DeadlineExceeded

T = TypeVar("T")


class _Flight:
    __slots__ = ("task", "waiters")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.waiters = 0


class SingleFlight:
    """Callers who ask for the same key at the same time share one computation.

    The first caller's function runs in a task of its own, so that its caller may leave: the others go
    on waiting. When all have left it is cancelled. Its result goes to everyone, and so does its
    failure, as all asked the same thing at the same time; but a failure that belongs to the first
    caller alone (DeadlineExceeded, cancellation) makes the next one run its own function.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}
        self._avoided = 0

    async def run(self, key: Hashable, fn: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `fn()`, or the same key's function already under way, returns or raises."""
        while True:
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight(asyncio.get_running_loop().create_task(fn()))
            flight.waiters += 1
            try:
                result: T = await asyncio.shield(flight.task)
            except DeadlineExceeded:
                if leads:
                    raise
                continue
            except asyncio.CancelledError:
                if leads or not flight.task.cancelled() or _is_cancelled():
                    raise
                continue
            finally:
                self._leave(key, flight)
            self._avoided += not leads
            return result

    def _leave(self, key: Hashable, flight: _Flight) -> None:
        flight.waiters -= 1
        if not flight.waiters:
            flight.task.cancel()
        if (flight.task.done() or not flight.waiters) and self._flights.get(key) is flight:
            del self._flights[key]

    def stats(self) -> dict[str, float]:
        """Computations under way, and those that callers were spared."""
        return {"recomputes": len(self._flights), "recomputes_avoided_total": self._avoided}


def _is_cancelled() -> bool:
    """Whether the calling task itself was asked to stop."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
