"""The open loop: a call is launched when it is due, however many are still under way."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from loadtests.drive.tally import NOT_SENT, OK, UNANSWERED, Tallies

#: What a call does, by its number of seconds into the run; its operation's name, then its work.
Due = tuple[str, Callable[[], Awaitable[object]]]


class OpenLoop:
    """Launches calls on one event loop and tallies them from when they were due.

    At most `max_in_flight` are under way; what is due beyond that waits, its clock running, and beyond
    `max_waiting` is not sent at all. Calls due before `counted_from_s` are made and not counted.
    """

    def __init__(
        self,
        due: Callable[[float], Due],
        tallies: Tallies,
        *,
        began_s: float,
        clock: Callable[[], float],
        code_of: Callable[[Exception], str],
        max_in_flight: int,
        max_waiting: int,
        counted_from_s: float = 0.0,
    ) -> None:
        self._due, self._tallies, self._clock, self._code_of = due, tallies, clock, code_of
        self._began_s, self._counted_from_s = began_s, counted_from_s
        self._max_in_flight, self._max_waiting = max_in_flight, max_waiting
        self._waiting: deque[tuple[float, Due]] = deque()
        self._running: dict[asyncio.Task[None], tuple[float, Due]] = {}

    def launch(self, at_s: float) -> None:
        """The call that is due at that second of the run."""
        due = self._due(at_s)
        if len(self._running) < self._max_in_flight:
            self._start(at_s, due)
        elif len(self._waiting) < self._max_waiting:
            self._waiting.append((at_s, due))
        else:
            self._missed(at_s, due, NOT_SENT)

    async def drain(self, within_s: float) -> None:
        """Wait for what is under way or waits; what is not done by then counts as unanswered."""
        until_s = self._clock() + within_s
        while self._running and (left_s := until_s - self._clock()) > 0:
            await asyncio.wait(self._running, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        for at_s, due in self._waiting:
            self._missed(at_s, due, NOT_SENT)
        self._waiting.clear()
        for at_s, due in self._running.values():
            self._missed(at_s, due, UNANSWERED)
        left, self._running = list(self._running), {}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _start(self, at_s: float, due: Due) -> None:
        task = asyncio.create_task(self._call(at_s, due))
        self._running[task] = (at_s, due)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if self._running.pop(task, None) is None:
            return
        if not task.cancelled():
            task.result()  # a defect of the driver's own has to be seen
        while self._waiting and len(self._running) < self._max_in_flight:
            self._start(*self._waiting.popleft())

    async def _call(self, at_s: float, due: Due) -> None:
        name, work = due
        sent_s = self._clock()
        code = OK
        try:
            await work()
        except Exception as error:
            code = self._code_of(error)
        if at_s < self._counted_from_s:
            return
        done_s, due_s = self._clock(), self._began_s + at_s
        self._tallies.of(name).answered(code, done_s - due_s, done_s - sent_s)
        self._tallies.lateness.add(sent_s - due_s)
        second = self._tallies.second(at_s - self._counted_from_s)
        second.latency.add(done_s - due_s)
        second.failed += code != OK

    def _missed(self, at_s: float, due: Due, code: str) -> None:
        if at_s >= self._counted_from_s:
            self._tallies.of(due[0]).codes[code] += 1
            self._tallies.second(at_s - self._counted_from_s).failed += 1
