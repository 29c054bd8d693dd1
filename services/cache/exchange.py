"""Gateways tell each other through Redis what they are asked for most, and so that they are there."""

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from typing import Any

from redis.exceptions import RedisError

from services import tasks
from services.cache.background import start
from services.cache.frame import seal, unseal
from services.cache.hot_keys import TOLD, Gateways, HotKey, HotWindows, Report, hot, most_asked
from services.cache.keys import HOT_KEYS
from services.cache.redis_tier import SecondTier

logger = logging.getLogger(__name__)

#: How often reports are exchanged; the first at once.
EVERY_S = 2.0
#: Reports are gone so long after the last gateway.
TTL_MS = 120_000
#: More gateways than these are not listened to.
MAX_GATEWAYS = 1_024


class Exchange:
    """Counts reads, and tells `on_hot` the keys that are hot over all gateways; alone without `second`."""

    def __init__(
        self,
        second: SecondTier | None,
        on_hot: Callable[[frozenset[bytes]], None],
        *,
        rng: Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._second = second
        self._on_hot = on_hot
        self._clock = clock
        self._name = rng.randbytes(8)
        self._gateways = Gateways()
        self._others: dict[bytes, Report] = {}
        self._task: asyncio.Task[None] | None = None
        self.windows = HotWindows(clock())

    @property
    def others(self) -> int:
        """How many other gateways use the same Redis."""
        return len(self._others)

    async def open(self) -> None:
        """Exchanges reports once, and from then on behind the scenes."""
        await self.turn()
        self._task = start(self._run())

    async def close(self) -> None:
        """Ends the exchange and takes its own report back, if Redis is there."""
        if self._task is None:
            return
        await tasks.end(self._task)
        self._task = None
        if self._second:
            await self._ask("HDEL", self._name)

    async def turn(self) -> None:
        """One exchange."""
        report = self.windows.report(self._clock())
        if self._second:
            await self._ask("HSET", self._name, seal(report.encode()))
            await self._ask("PEXPIRE", TTL_MS)
            replies = await self._ask("HGETALL")
            self._others = self._gateways.hear(self._read(replies) if isinstance(replies, dict) else {})
            if gone := self._gateways.forgotten():
                await self._ask("HDEL", *gone)
        self._on_hot(hot(self._most_asked(report, TOLD)))

    def most_asked(self, count: int) -> list[HotKey]:
        """What is asked for most, here as of now and elsewhere as last told."""
        return self._most_asked(self.windows.report(self._clock(), count), count)

    def _most_asked(self, mine: Report, count: int) -> list[HotKey]:
        return most_asked([mine, *self._others.values()], count)

    def _read(self, replies: dict[bytes, bytes]) -> dict[bytes, Report]:
        reports = {}
        for gateway, data in list(replies.items())[:MAX_GATEWAYS]:
            mine = gateway == self._name
            payload = unseal(data) if isinstance(data, bytes) and not mine else None
            if payload is not None and (report := Report.decode(payload)) is not None:
                reports[gateway] = report
        return reports

    async def _ask(self, command: str, *arguments: Any) -> Any:
        """The reply, None where there is none: whoever is away is not heard, and comes back."""
        assert self._second is not None
        try:
            return await self._second.run(HOT_KEYS, command, HOT_KEYS, *arguments)
        except (RedisError, OSError) as error:
            logger.debug("hot keys were not exchanged: %s", error)
            if str(error).startswith("WRONGTYPE"):  # somebody's, in the place of the reports
                await self._ask("DEL")
            return None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await self.turn()
