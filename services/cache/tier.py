"""The cache that callers see: L1 in this process, Redis behind it, opaque bytes in both."""

import logging
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from redis.exceptions import RedisError

from services.cache.exchange import Exchange
from services.cache.frame import seal
from services.cache.hot_keys import TOLD, HotKey
from services.cache.leases import Leases
from services.cache.policy import S3Fifo, entry_bytes
from services.cache.redis_cluster import RedisCluster
from services.cache.redis_tier import CONNECTIONS, RedisTier, SecondTier
from services.cache.redis_url import RedisUrl
from services.cache.server import Server
from services.cache.writes import MAX_VALUE_BYTES

logger = logging.getLogger(__name__)

#: Hot keys with figures in the metrics.
RANKS = 10
#: The line of a tier of which there is nothing to tell.
_NOTHING: dict[str, int | str] = {
    "name": "REDIS",
    "state": "off",
    **dict.fromkeys(
        ("hits", "misses", "entries", "bytes", "evictions", "errors", "eviction_storms", "removed", "purges"),
        0,
    ),
}


class Found(NamedTuple):
    """A value, and the tier that had it: `L1` or `REDIS`."""

    value: bytes
    tier: str


class CacheTier:
    """Values by key from the nearest tier that has them; a hint, whose loss costs time and nothing else.

    No method raises for what happens to Redis, and `get_many` never waits longer than `op_timeout_ms`.
    `l1_bytes` 0 turns L1 off, `redis_url` None turns Redis off; a ValueError where it is not a URL. All
    of it belongs to one event loop. `rng` spreads the pauses between probes.
    """

    def __init__(
        self,
        *,
        l1_bytes: int,
        redis_url: str | None,
        op_timeout_ms: int = 50,
        max_pending: int = 10_000,
        rng: random.Random | None = None,
    ) -> None:
        self._l1: S3Fifo[bytes] = S3Fifo(l1_bytes)
        self._l1_hits = 0
        self._l1_misses = 0
        rng = rng or random.Random()
        self._redis: SecondTier | None = None
        if redis_url is not None:
            self._redis = self._behind(RedisUrl.parse(redis_url), op_timeout_ms, max_pending, rng)
        #: Keys that are hot over all gateways, as of the last exchange.
        self._hot: frozenset[bytes] = frozenset()
        self.exchange = Exchange(self._redis, self._treat_as_hot, rng=rng)
        self.leases = Leases(self._redis, rng=rng)

    def _behind(self, url: RedisUrl, op_timeout_ms: int, max_pending: int, rng: random.Random) -> SecondTier:
        if url.cluster:
            return RedisCluster(
                url, self._promote, op_timeout_ms=op_timeout_ms, max_pending=max_pending, rng=rng
            )
        server = Server(url, url.seeds[0], connections=CONNECTIONS, op_timeout_ms=op_timeout_ms)
        return RedisTier(server, self._promote, op_timeout_ms=op_timeout_ms, max_pending=max_pending, rng=rng)

    async def open(self) -> None:
        """Looks for Redis, a second at most; one that is away is used when it comes."""
        if self._redis:
            await self._redis.open()
        await self.exchange.open()

    async def close(self) -> None:
        """Writes what is queued for Redis, a second at most, and leaves it."""
        await self.leases.close()
        await self.exchange.close()
        if self._redis:
            await self._redis.close()

    def peek(self, key: bytes) -> bytes | None:
        """The value in L1, if it is there. A miss is not counted: the `get_many` that follows counts it."""
        value = self._l1.get(key)
        if value is not None:
            self._l1_hits += 1
            self.exchange.windows.saw(key)
        return value

    async def get_many(self, keys: Sequence[bytes], *, far: bool = True) -> list[Found | None]:
        """What the tiers hold, in the order of the keys; a value found in Redis is in L1 from then on.

        Without `far` Redis is not asked, and the call does not wait.
        """
        self.exchange.windows.saw_all(keys)
        found: list[Found | None] = []
        missing: list[bytes] = []
        for key in keys:
            value = self._l1.get(key)
            if value is None:
                missing.append(key)
                found.append(None)
            else:
                found.append(Found(value, "L1"))
        self._l1_hits += len(keys) - len(missing)
        self._l1_misses += len(missing)
        if not missing or not far or not self._redis:
            return found
        values = await self._redis.fetch(missing)
        if values:
            for i, key in enumerate(keys):
                if found[i] is None and (value := values.get(key)) is not None:
                    found[i] = Found(value, "REDIS")
        return found

    def put_many(
        self, items: Sequence[tuple[bytes, bytes]], *, ttl_s: float | None = None, far: bool = True
    ) -> None:
        """Hold the values: in L1 at once and, with `far`, in Redis soon, where they live `ttl_s` seconds.

        L1 forgets by use, not by time: a value must say itself until when it holds.
        """
        for key, value in items:
            self._hold(key, value)
            if self._redis and far:
                self._redis.offer(key, value, ttl_s)

    @property
    def shared(self) -> bool:
        """Whether other gateways use the same Redis."""
        return self.exchange.others > 0

    def is_hot(self, key: bytes) -> bool:
        """Whether the key is among those asked for most, over all gateways."""
        return key in self._hot

    def held(self, key: bytes) -> bytes | None:
        """The value in L1, if it is there; not a read."""
        return self._l1.look(key)

    async def look_behind(self, key: bytes) -> bytes | None:
        """The value in Redis, by now, of a key that was missed; not counted as another read."""
        return (await self._redis.fetch([key])).get(key) if self._redis else None

    async def look_behind_many(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """The values in Redis, by now, of keys that were missed, by key; not counted as other reads."""
        return await self._redis.fetch(keys) if self._redis else {}

    async def publish(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        """As `put_many` for one value, and Redis has it on return, if it can have it at all."""
        if self._redis is None or len(value) > MAX_VALUE_BYTES:
            self.put_many([(key, value)], ttl_s=ttl_s)
            return
        self._hold(key, value)
        try:
            await self._redis.run(key, "SET", key, seal(value), "PX", round(ttl_s * 1000))
        except (RedisError, OSError) as error:
            logger.debug("a value was not published: %s", error)

    def drop(self, key: bytes) -> None:
        """Forget the key in L1, so that the next `get_many` asks Redis."""
        self._l1.delete(key)

    def _promote(self, key: bytes, value: bytes) -> None:
        """A value that came from Redis; one put here in the meantime is newer and stays."""
        if key not in self._l1:
            self._hold(key, value)

    def _hold(self, key: bytes, value: bytes) -> None:
        self._l1.put(key, value, entry_bytes(key, value))
        if key in self._hot:
            self._l1.pin((key,))

    def hot_keys(self, count: int) -> list[HotKey]:
        """What is asked for most over all gateways, most asked first."""
        return self.exchange.most_asked(count)

    def stats_of_hottest(self) -> dict[str, dict[str, float]]:
        """The keys asked for most, by rank from 1: how often at least, and which part of all reads that is.

        Of the last one to two windows, over all gateways, so every gateway tells the same; of a key nothing
        else is told.
        """
        hottest = self.hot_keys(TOLD)[:RANKS]
        return {
            str(rank): {"reads": each.count, "share": each.share}
            for rank, each in enumerate(hottest, start=1)
        }

    def _treat_as_hot(self, hot: frozenset[bytes]) -> None:
        """Pinned in L1 and spread over slots from now on."""
        self._hot = hot
        self._l1.pin(hot)
        if self._redis:
            self._redis.spread(hot)

    def tiers(self) -> list[dict[str, int | str]]:
        """A line of CacheStats for each tier, nearest first; state is up, down or off."""
        l1 = {
            **_NOTHING,
            "name": "L1",
            "hits": self._l1_hits,
            "misses": self._l1_misses,
            "entries": len(self._l1),
            "bytes": self._l1.held_bytes,
            "evictions": self._l1.evictions,
            "state": "up" if self._l1.budget_bytes else "off",
        }
        return [l1, self._redis.describe() if self._redis else dict(_NOTHING)]

    def stats(self) -> dict[str, float]:
        """Counters and gauges of both tiers."""
        return {
            "l1_hits_total": self._l1_hits,
            "l1_misses_total": self._l1_misses,
            "l1_entries": len(self._l1),
            "l1_bytes": self._l1.held_bytes,
            "l1_evictions_total": self._l1.evictions,
            "hot_keys": len(self._hot),
            "other_gateways": self.exchange.others,
            **self.leases.stats(),
            **(self._redis.stats() if self._redis else {}),
        }
