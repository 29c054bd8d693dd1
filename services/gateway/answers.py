"""The answer cache as the read paths see it: look up, compute once, keep.

An entry says which log position it certainly includes and is served only while nothing later is known
(or within the staleness the collection or the request allows). What is known comes from this gateway's own
commits, never from Redis.
"""

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from protos.ringfort import v1 as pb
from services.cache import keys
from services.cache.envelope import AnswerEntry, fresh
from services.cache.single_flight import SingleFlight
from services.cache.tier import CacheTier
from services.gateway.catalog import Served

TIERS = {"L1": pb.L1, "REDIS": pb.REDIS}


@dataclass(frozen=True, slots=True)
class Computed:
    """A serialized answer, the log position it includes, when that was read, and whether it may be kept."""

    body: bytes
    position: int
    as_of_ms: int
    complete: bool
    timings: pb.Timings


@dataclass(frozen=True, slots=True)
class Cached:
    """A serialized answer out of a cache, and which tier it came from."""

    body: bytes
    served_from: "pb.ServedFrom.ValueType"


class Answers:
    """Serialized answers by what was asked."""

    def __init__(self, cache: CacheTier, *, ttl_s: float) -> None:
        self._cache = cache
        self._ttl_s = ttl_s
        self._flights = SingleFlight()
        self._superseded = 0

    def key(self, served: Served, ranker_version: str, query: bytes, options: bytes) -> bytes:
        """The name of an answer: everything it depends on but the documents themselves."""
        c = served.collection
        return keys.answer_key(
            c.uid, c.tenant, c.generation, c.schema_version, ranker_version, query, options
        )

    async def get(self, served: Served, key: bytes, at_least: int, max_staleness_ms: int) -> Cached | None:
        """The answer of that name, if one is kept and still good enough.

        It includes the log up to position `at_least`, whatever staleness is allowed.
        """
        value = self._cache.peek(key)
        if value is not None:
            return self._good(served, key, value, "L1", at_least, max_staleness_ms)
        return (await self.get_many(served, [key], at_least, max_staleness_ms))[0]

    async def get_many(
        self, served: Served, names: Sequence[bytes], at_least: int, max_staleness_ms: int
    ) -> list[Cached | None]:
        """The same for many, in order, with one read of each tier."""
        return [
            None
            if found is None
            else self._good(served, name, found.value, found.tier, at_least, max_staleness_ms)
            for name, found in zip(names, await self._cache.get_many(names), strict=True)
        ]

    async def once(
        self,
        served: Served,
        key: bytes,
        min_coverage: float,
        compute: Callable[[], Coroutine[Any, Any, Computed]],
    ) -> Computed:
        """Compute an answer, or share the computation of an equal request that is under way; keep it.

        A computation is shared only between requests that know of the same writes, so nobody is handed an
        answer older than a write acknowledged before the request came, and that ask for the same coverage.
        """

        async def lead() -> Computed:
            made = await compute()
            self.keep(served, [(key, made)])
            return made

        return await self._flights.run((key, served.position, min_coverage), lead)

    def keep(self, served: Served, answers: Sequence[tuple[bytes, Computed]]) -> None:
        """Keep the answers that may be kept."""
        items = [
            (key, AnswerEntry({served.log_id: made.position}, made.body, made.as_of_ms).encode())
            for key, made in answers
            if made.complete
        ]
        if items:
            self._cache.put_many(items, ttl_s=self._ttl_s)

    def _good(
        self, served: Served, key: bytes, value: bytes, tier: str, at_least: int, max_staleness_ms: int
    ) -> Cached | None:
        entry = AnswerEntry.decode(value)
        if entry is None:
            return None
        known = {served.log_id: served.position}
        seen = entry.positions.get(served.log_id, 0) >= at_least
        if seen and fresh(entry, known, int(time.time() * 1000), max_staleness_ms):
            return Cached(entry.body, TIERS[tier])
        self._superseded += 1
        if max_staleness_ms == 0:
            self._cache.drop(key)
        return None

    def stats(self) -> dict[str, float]:
        """Entries refused because a write had moved past them, and recomputes under way and avoided."""
        return {"superseded_total": self._superseded, **self._flights.stats()}
