"""An event loop without I/O whose time passes only when nothing is left to do at the present moment."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs the same coroutines in the same order every time."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        self._selector = self  # asked below for events, of which there are none

    def time(self) -> float:
        """Seconds since the world began."""
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Let time pass until the next timer."""
        assert timeout is not None, "everybody waits, and for nothing"
        self._now_s += timeout
        return []

    def _process_events(self, events: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that does no I/O; what it leaves running is cancelled."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        # Some take a cancellation for a crash that they live with, and begin something else.
        while left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left, timeout=0.001))
        asyncio.set_event_loop(None)
        loop.close()
