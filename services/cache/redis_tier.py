"""The second tier: Redis, shared between gateways, always optional.

Every operation is bounded and judged by one breaker; while Redis is away callers do not wait for it and a
background task looks for it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from services.cache.background import end, start
from services.cache.breaker import Breaker
from services.cache.health import Health
from services.cache.reads import LANES, Reads
from services.cache.writes import Writes

logger = logging.getLogger(__name__)

#: A new connection may take this long, in the background; callers wait op_timeout_ms at most.
CONNECT_TIMEOUT_MS = 1_000
#: How often entries, bytes and evictions are read off a server that is up.
SURVEY_EVERY_S = 10.0


class RedisTier:
    """Values by key in the Redis at `url`; reads wait at most `op_timeout_ms`, writes not at all.

    ValueError where the URL is not one. `on_value` gets every value that is read.
    """

    def __init__(
        self,
        url: str,
        on_value: Callable[[bytes, bytes], None],
        *,
        op_timeout_ms: int,
        max_pending: int,
        rng: random.Random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # One connection per reading lane, one for the writer, one for the probe. RESP2 and no driver
        # name: a new connection costs no round trip beyond AUTH. Retries are the breaker's business.
        pool = ConnectionPool.from_url(
            url,
            max_connections=LANES + 2,
            protocol=2,
            driver_info=None,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=op_timeout_ms / 1000,
            socket_connect_timeout=CONNECT_TIMEOUT_MS / 1000,
            socket_read_size=256 * 1024,
        )
        self._redis = Redis.from_pool(pool)
        self.health = Health(Breaker(rng), clock)
        self.reads = Reads(
            self._redis, self.health, on_value, op_timeout_ms=op_timeout_ms, max_pending=max_pending
        )
        self.writes = Writes(self._redis, self.health, max_pending=max_pending, give_up_ms=CONNECT_TIMEOUT_MS)
        self._watcher: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._entries = 0
        self._bytes = 0
        self._evictions = 0

    async def open(self) -> None:
        """Looks for the server once (a second at most) and starts the background tasks; never fails."""
        await self._probe()
        self._watcher = start(self._watch())
        self._writer = start(self.writes.run())

    async def close(self) -> None:
        """Writes what is queued, as far as that takes one second, and ends everything."""
        if self._writer:
            self.writes.finish()
            await asyncio.wait([self._writer], timeout=CONNECT_TIMEOUT_MS / 1000)
            if len(self.writes):
                logger.warning("stopped with %d values not written to redis", len(self.writes))
        await end([task for task in (self._watcher, self._writer) if task])
        await self.reads.close()
        await self._redis.aclose()

    async def _watch(self) -> None:
        """Finds Redis again while it is away; reads its numbers while it is there."""
        while True:
            due_s = self.health.probe_due_s
            if due_s is not None:
                await asyncio.sleep(due_s)
                await self._probe()
                continue
            await self._survey()
            self.health.opened.clear()
            if self.health.allows:
                await _wait(self.health.opened, SURVEY_EVERY_S)

    async def _probe(self) -> None:
        try:
            await self._redis.ping()
        except Exception as error:  # whatever went wrong, the probe did not come through
            self.health.probed(error)
        else:
            self.health.probed(None)

    async def _survey(self) -> None:
        try:
            self._entries = int(await self._redis.dbsize())
            self._bytes = int((await self._redis.info("memory"))["used_memory"])
            self._evictions = int((await self._redis.info("stats"))["evicted_keys"])
        except ResponseError:
            pass  # a server may forbid INFO to us; the numbers stay zero
        except Exception as error:  # an idle tier notices an outage here
            self.health.failed(error)

    def describe(self) -> dict[str, int | str]:
        """The tier's line in CacheStats; entries, bytes and evictions are the whole server's, seconds old."""
        return {
            "name": "REDIS",
            "hits": self.reads.hits,
            "misses": self.reads.misses,
            "entries": self._entries,
            "bytes": self._bytes,
            "evictions": self._evictions,
            "errors": self.health.errors + self.health.timeouts,
            "state": "up" if self.health.allows else "down",
        }

    def stats(self) -> dict[str, float]:
        """Counters and gauges of the tier."""
        return {
            "redis_up": float(self.health.allows),
            "redis_hits_total": self.reads.hits,
            "redis_misses_total": self.reads.misses,
            "redis_corrupt_total": self.reads.corrupt,
            "redis_reads_total": self.reads.batches,
            "redis_reads_shed_total": self.reads.shed,
            "redis_writes_total": self.writes.written,
            "redis_writes_refused_total": self.writes.refused,
            "redis_writes_dropped_total": self.writes.dropped,
            "redis_writes_pending": len(self.writes),
            "redis_errors_total": self.health.errors,
            "redis_timeouts_total": self.health.timeouts,
            "redis_outages_total": self.health.outages,
            "redis_entries": self._entries,
            "redis_bytes": self._bytes,
            "redis_evictions_total": self._evictions,
        }


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
