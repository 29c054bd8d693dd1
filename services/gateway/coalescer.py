"""Calls that ask alike travel together: those of one turn of the event loop, and those that came while a few
were under way. Nobody waits on a timer."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services import tasks
from services.deadline import Deadline
from shard_router.errors import DeadlineExceeded, Overloaded, Unavailable

Kind = TypeVar("Kind", bound=Hashable)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class _Call(Generic[Item, Answer]):
    item: Item
    rows: int
    deadline: Deadline
    answer: "asyncio.Future[Answer]"


@dataclass(slots=True)
class _Lane(Generic[Item, Answer]):
    """Calls of one kind."""

    waiting: deque[_Call[Item, Answer]] = field(default_factory=deque)
    flying: int = 0


class Coalescer(Generic[Kind, Item, Answer]):
    """Gathers calls of a kind into batches of at most `batch_rows` rows, or one call that has more.

    `send(kind, items, deadline)` carries a batch out, with the latest of its callers' deadlines, and gives
    an answer for each. At most `in_flight` batches of a kind are under way, and at most `queue_rows` rows
    wait. What a batch fails with, each of its callers gets.
    """

    def __init__(
        self,
        send: Callable[[Kind, Sequence[Item], Deadline], Awaitable[Sequence[Answer]]],
        stage: str,
        *,
        batch_rows: int = 64,
        in_flight: int = 2,
        queue_rows: int = 8_192,
    ) -> None:
        self._send, self._stage = send, stage
        self._batch_rows, self._queue_rows = batch_rows, queue_rows
        #: May be changed at any time.
        self.in_flight = in_flight
        self._lanes: dict[Kind, _Lane[Item, Answer]] = {}
        self._flights: set[asyncio.Task[None]] = set()
        self._closed = False
        self.waiting_rows = 0
        self.calls = self.batches = 0

    async def ask(self, kind: Kind, item: Item, rows: int, deadline: Deadline) -> Answer:
        """The answer to one call; Overloaded, DeadlineExceeded, Unavailable, or what its batch got."""
        left_s = deadline.require(self._stage)
        if self._closed:
            raise Unavailable(f"{self._stage} is closing")
        if self.waiting_rows and self.waiting_rows + rows > self._queue_rows:
            raise Overloaded(self._stage, self._queue_rows)
        loop = asyncio.get_running_loop()
        call: _Call[Item, Answer] = _Call(item, rows, deadline, loop.create_future())
        lane = self._lanes.get(kind)
        if lane is None:
            lane = self._lanes[kind] = _Lane()
        if not lane.waiting and lane.flying < self.in_flight:
            loop.call_soon(self._launch, kind, lane)
        lane.waiting.append(call)
        self.waiting_rows += rows
        self.calls += 1
        timer = loop.call_later(left_s, self._expire, call.answer)
        try:
            return await call.answer
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Fail what waits, and give up what is under way."""
        self._closed = True
        for lane in self._lanes.values():
            for call in lane.waiting:
                if not call.answer.done():
                    call.answer.set_exception(Unavailable(f"{self._stage} is closing"))
            lane.waiting.clear()
        self.waiting_rows = 0
        await tasks.end(*self._flights)

    def _launch(self, kind: Kind, lane: _Lane[Item, Answer]) -> None:
        while lane.waiting and lane.flying < self.in_flight:
            batch = self._taken(lane)
            if batch:
                lane.flying += 1
                self.batches += 1
                flight = asyncio.create_task(self._fly(kind, lane, batch))
                self._flights.add(flight)
                flight.add_done_callback(self._flights.discard)
        if not lane.waiting and not lane.flying and self._lanes.get(kind) is lane:
            del self._lanes[kind]

    def _taken(self, lane: _Lane[Item, Answer]) -> list[_Call[Item, Answer]]:
        """The next batch; whoever left or is late is no part of it."""
        batch: list[_Call[Item, Answer]] = []
        rows = 0
        while lane.waiting and (not batch or rows + lane.waiting[0].rows <= self._batch_rows):
            call = lane.waiting.popleft()
            self.waiting_rows -= call.rows
            if not call.answer.done():
                batch.append(call)
                rows += call.rows
        return batch

    async def _fly(self, kind: Kind, lane: _Lane[Item, Answer], batch: Sequence[_Call[Item, Answer]]) -> None:
        latest = max((call.deadline for call in batch), key=lambda deadline: deadline.at_s)
        try:
            answers = await self._send(kind, [call.item for call in batch], latest)
            for call, answer in zip(batch, answers, strict=True):
                if not call.answer.done():
                    call.answer.set_result(answer)
        except BaseException as error:
            gone = not isinstance(error, Exception)
            for call in batch:
                if not call.answer.done():
                    call.answer.set_exception(Unavailable(f"{self._stage} is closing") if gone else error)
            if gone:
                raise
        finally:
            lane.flying -= 1
            self._launch(kind, lane)

    def _expire(self, answer: "asyncio.Future[Answer]") -> None:
        if not answer.done():
            answer.set_exception(DeadlineExceeded(self._stage))
