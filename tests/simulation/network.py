"""What the processes of a simulated cluster run on: conditions, a bad network, and clocks of their own."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from shard_router.errors import Unavailable

#: How often a follower looks, and how long a call takes at most.
FOLLOW_S, CALL_S = 0.06, 0.4


@dataclass
class Conditions:
    """How hard a world is."""

    #: Shares of messages that are lost, and that are very late.
    lost: float
    late: float
    #: How often a follower lags behind, and for how long at most.
    lags: float
    lag_s: float
    #: How long a follower's read waits at most for its turn at the database.
    queue_s: float
    #: How long a page of a backfill takes at most to be taken in.
    page_s: float
    #: How long a gateway waits for a copy before it asks whether it has a lease.
    apply_s: float
    #: How often something happens between a coordinator's storing of a state and its telling of it.
    disturbed: float
    #: Crashes, pauses and the like, a second.
    chaos: float
    #: Whether some gateways only write and others only read, so that neither learn of a map by the other.
    apart: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> "Conditions":
        """Each of them kind or hard, whatever the others are."""

        def either(kind: float, hard: float) -> float:
            return rng.choice((kind, hard))

        return cls(
            lost=either(0.02, 0.08),
            late=either(0.03, 0.15),
            lags=either(0.15, 0.5),
            lag_s=either(10 * FOLLOW_S, 20 * FOLLOW_S),
            queue_s=either(0.0, 0.4),
            page_s=either(0.0, 0.3),
            apply_s=either(CALL_S, CALL_S / 4),
            disturbed=either(0.2, 0.6),
            chaos=either(0.5, 2.0),
            apart=rng.random() < 0.7,
        )


class Network:
    """Carries calls, some of them badly."""

    def __init__(self, rng: random.Random, conditions: Conditions) -> None:
        self.rng, self.conditions = rng, conditions

    async def call(
        self, caller: "Process", work: Callable[[], Awaitable[Any]], limit_s: float = CALL_S
    ) -> Any:
        """What `work` returns at the other end; Unavailable if a message is lost or it takes too long."""
        life = caller.life
        # What is on its way arrives, whether the caller still waits or not.
        delivery = asyncio.ensure_future(self._deliver(work, limit_s))
        delivery.add_done_callback(lambda one: one.cancelled() or one.exception())
        done, _ = await asyncio.wait([delivery], timeout=limit_s)
        await caller.awake(life)
        if not done or delivery.cancelled():
            raise Unavailable("no answer")
        return delivery.result()

    async def _deliver(self, work: Callable[[], Awaitable[Any]], limit_s: float) -> Any:
        await self._travel(limit_s)
        answer = await work()
        await self._travel(limit_s)
        return answer

    async def _travel(self, limit_s: float) -> None:
        if self.rng.random() < self.conditions.lost:
            await asyncio.sleep(2 * limit_s)
            raise Unavailable("lost")
        await asyncio.sleep(
            self.rng.uniform(0.001, 0.01) * (40 if self.rng.random() < self.conditions.late else 1)
        )


class Process:
    """Something with a clock of its own that may pause, and crash."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.speed, self._offset_s = rng.uniform(0.996, 1.004), rng.uniform(0, 1000)
        self._paused_until_s = 0.0
        #: One more with each crash; what was begun in an earlier life does not go on.
        self.life = 0
        self._tasks: list[asyncio.Task[None]] = []

    def now(self) -> float:
        return self._offset_s + asyncio.get_running_loop().time() * self.speed

    def pause(self, seconds: float) -> None:
        self._paused_until_s = asyncio.get_running_loop().time() + seconds

    async def awake(self, life: int | None = None) -> None:
        """Return once this is not paused; CancelledError where its life is over."""
        while (left_s := self._paused_until_s - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        if life is not None and life != self.life:
            raise asyncio.CancelledError

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    def crash(self) -> None:
        self.life += 1
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
