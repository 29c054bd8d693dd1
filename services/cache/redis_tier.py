"""The second tier on one server: shared between gateways, always optional.

Every operation is bounded and judged by one breaker; while the server is away callers do not wait for it and
a background task looks for it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from redis.exceptions import ResponseError

from services import tasks
from services.cache.background import start
from services.cache.breaker import Breaker
from services.cache.commands import Commands
from services.cache.health import Health
from services.cache.reads import LANES, MAX_BATCH_KEYS, Reads, Values
from services.cache.redis_url import CONNECT_TIMEOUT_MS
from services.cache.server import Server
from services.cache.survey import Survey
from services.cache.writes import Writes

logger = logging.getLogger(__name__)

#: Of one server: the reading lanes, the writer, the commands' lane, the watcher.
CONNECTIONS = LANES + 3
#: How often entries, bytes and evictions are read off a server that is up.
SURVEY_EVERY_S = 10.0


class SecondTier(Protocol):
    """What stands behind L1: one server, or a Cluster of them."""

    async def open(self) -> None:
        """Looks for it once, a second at most, and starts the background tasks; never fails."""

    async def close(self) -> None:
        """Writes what is queued, as far as that takes one second, and ends everything."""

    async def fetch(self, keys: Sequence[bytes]) -> Values:
        """The values it holds of these keys, by key, within op_timeout_ms; never fails."""

    def offer(self, key: bytes, payload: bytes, ttl_s: float | None) -> None:
        """Queue one value to be written; `ttl_s` None keeps it until room is needed."""

    async def run(self, key: bytes, *command: Any) -> Any:
        """The reply to a command on that key, within op_timeout_ms; RedisError or OSError for none."""

    async def evaluate(self, script: str, keys: Sequence[bytes], *arguments: Any) -> bytes:
        """What a script says of its keys, a byte for each, treating each by itself; errors as of `run`."""

    def spread(self, hot: frozenset[bytes]) -> None:
        """These keys are asked for most, by all gateways together."""

    def describe(self) -> dict[str, int | str]:
        """Its line in CacheStats."""

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges."""


class RedisTier:
    """Values by key on one server; reads wait at most `op_timeout_ms`, writes not at all.

    `on_value` gets every value that is read; `on_outage` is called when the server is given up for now.
    """

    def __init__(
        self,
        server: Server,
        on_value: Callable[[bytes, bytes], None],
        *,
        op_timeout_ms: int,
        max_pending: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
        on_outage: Callable[[], None] = lambda: None,
    ) -> None:
        self.server = server
        self.health = Health(Breaker(rng), clock)
        self._reads = Reads(
            server, self.health, on_value, op_timeout_ms=op_timeout_ms, max_pending=max_pending
        )
        self._writes = Writes(server, self.health, max_pending=max_pending, give_up_ms=CONNECT_TIMEOUT_MS)
        self._commands = Commands(server, self.health, max_pending=max_pending)
        self._on_outage = on_outage
        self._survey = Survey()
        self._watcher: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """As of any second tier."""
        await self._probe()
        self._watcher = start(self._watch())
        self._writer = start(self._writes.run())

    async def close(self) -> None:
        """As of any second tier."""
        if self._writer:
            self._writes.finish()
            await asyncio.wait([self._writer], timeout=CONNECT_TIMEOUT_MS / 1000)
            if len(self._writes):
                logger.warning("stopped with %d values not written to redis", len(self._writes))
        await tasks.end(self._watcher, self._writer)
        await self._reads.close()
        await self._commands.close()
        await self.server.close()

    async def fetch(self, keys: Sequence[bytes]) -> Values:
        """As of any second tier."""
        return await self._reads.fetch(keys)

    def offer(self, key: bytes, payload: bytes, ttl_s: float | None) -> None:
        """As of any second tier."""
        self._writes.offer(key, payload, ttl_s)

    async def run(self, key: bytes, *command: Any) -> Any:
        """As of any second tier."""
        return await self._commands.run(*command)

    async def evaluate(self, script: str, keys: Sequence[bytes], *arguments: Any) -> bytes:
        """As of any second tier; many keys are a few calls, so that none holds up who comes behind it."""
        pieces = [keys[i : i + MAX_BATCH_KEYS] for i in range(0, len(keys), MAX_BATCH_KEYS)]
        replies = await asyncio.gather(
            *(self._commands.run("EVAL", script, len(piece), *piece, *arguments) for piece in pieces)
        )
        return b"".join(replies)

    def spread(self, hot: frozenset[bytes]) -> None:
        """On one server they all lie together anyway."""

    async def _watch(self) -> None:
        """Finds the server again while it is away; reads its numbers while it is there."""
        while True:
            due_s = self.health.probe_due_s
            if due_s is not None:
                self._on_outage()
                await asyncio.sleep(due_s)
                await self._probe()
                continue
            await self._look()
            self.health.opened.clear()
            if self.health.allows:
                await wait(self.health.opened, SURVEY_EVERY_S)

    async def _probe(self) -> None:
        try:
            await self.server.ping()
        except Exception as error:  # whatever went wrong, the probe did not come through
            self.health.probed(error)
        else:
            self.health.probed(None)

    async def _look(self) -> None:
        try:
            news = self._survey.look(await self.server.numbers())
        except ResponseError:
            return  # a server may forbid INFO to us; the numbers stay zero
        except Exception as error:  # an idle tier notices an outage here
            self.health.failed(error)
            return
        if news:
            logger.warning("%s", news)

    def describe(self) -> dict[str, int | str]:
        """As of any second tier; entries, bytes and evictions are the whole server's, seconds old."""
        return described(self.stats(), "up" if self.health.allows else "down")

    def stats(self) -> dict[str, float]:
        """As of any second tier."""
        last = self._survey.last
        return {
            "redis_up": float(self.health.allows),
            "redis_hits_total": self._reads.hits,
            "redis_misses_total": self._reads.misses,
            "redis_corrupt_total": self._reads.corrupt,
            "redis_reads_total": self._reads.batches,
            "redis_reads_shed_total": self._reads.shed,
            "redis_writes_total": self._writes.written,
            "redis_writes_refused_total": self._writes.refused,
            "redis_writes_dropped_total": self._writes.dropped,
            "redis_writes_pending": len(self._writes),
            "redis_errors_total": self.health.errors,
            "redis_timeouts_total": self.health.timeouts,
            "redis_outages_total": self.health.outages,
            "redis_entries": last.entries if last else 0,
            "redis_bytes": last.bytes if last else 0,
            "redis_evictions_total": self._survey.evicted,
            "redis_eviction_storms_total": self._survey.eviction_storms,
            "redis_removed_total": self._survey.removed,
            "redis_purges_total": self._survey.purges,
        }


def described(stats: Mapping[str, float], state: str) -> dict[str, int | str]:
    """A second tier's line in CacheStats out of its figures."""
    return {
        "name": "REDIS",
        "hits": int(stats["redis_hits_total"]),
        "misses": int(stats["redis_misses_total"]),
        "entries": int(stats["redis_entries"]),
        "bytes": int(stats["redis_bytes"]),
        "evictions": int(stats["redis_evictions_total"]),
        "errors": int(stats["redis_errors_total"] + stats["redis_timeouts_total"]),
        "state": state,
        "eviction_storms": int(stats["redis_eviction_storms_total"]),
        "removed": int(stats["redis_removed_total"]),
        "purges": int(stats["redis_purges_total"]),
    }


async def wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or so long."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
