"""The fan-out: carries a plan out over the shards and merges what they find."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from index_builder.segments.index_spec import Effort
from services.deadline import Deadline
from services.gateway.catalog import Served
from services.shard.rendering import RenderedHits, RenderedRow
from services.shard.replica import Hits, Replica, ShardAnswer
from shard_router.errors import DeadlineExceeded, ShardUnavailable
from shard_router.fanout_plan import plan_fanout
from shard_router.filters import Filter
from shard_router.merge import merge
from shard_router.model import Hit, Include, Version

log = logging.getLogger(__name__)

A = TypeVar("A")


class Found(NamedTuple, Generic[Hits]):
    """What the shards found: hits by query, the log position all of it includes, coverage, and times.

    `as_of_ms` is the wall clock when the positions were read.
    """

    hits: list[Hits]
    position: int
    as_of_ms: int
    asked: int
    answered: int
    search_ms: float
    merge_ms: float

    @property
    def complete(self) -> bool:
        """Whether every shard answered."""
        return self.answered == self.asked


class FanOut:
    """Asks one replica of every shard, each for its own slots."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def search(
        self,
        served: Served,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool,
        effort: Effort,
        include: Include,
        min_coverage: float,
        deadline: Deadline,
        exclude: frozenset[str] = frozenset(),
    ) -> Found[list[Hit]]:
        """The k best documents for every query (float32 [n, dim]); ShardUnavailable below `min_coverage`.

        A shard that fails is left out and shows in the coverage; a passed deadline fails the call.
        """

        def ask(replica: Replica) -> Awaitable[ShardAnswer[list[Hit]]]:
            return replica.search(
                queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
                deadline=deadline,
            )  # fmt: skip

        return await self._search(served, len(queries), ask, min_coverage, lambda parts: merge(parts, k))

    async def search_rendered(
        self,
        served: Served,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool,
        effort: Effort,
        include: Include,
        min_coverage: float,
        deadline: Deadline,
        exclude: frozenset[str] = frozenset(),
    ) -> Found[RenderedHits]:
        """The same as `search`, with the hits as they go on the wire."""

        def ask(replica: Replica) -> Awaitable[ShardAnswer[RenderedHits]]:
            return replica.search_rendered(
                queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
                deadline=deadline,
            )  # fmt: skip

        return await self._search(served, len(queries), ask, min_coverage, lambda parts: _merged(parts, k))

    async def _search(
        self,
        served: Served,
        queries: int,
        ask: Callable[[Replica], Awaitable[ShardAnswer[Hits]]],
        min_coverage: float,
        merge: Callable[[Sequence[Hits]], Hits],
    ) -> Found[Hits]:
        began, as_of_ms = time.perf_counter(), int(time.time() * 1000)
        asked, good = await self._ask(served, ask)
        if not good or len(good) < min_coverage * asked:
            raise ShardUnavailable(len(good), asked, min_coverage)
        searched = time.perf_counter()
        if len(good) == 1:  # a shard's answer is ranked, and holds every document once
            hits = good[0].hits
        else:
            hits = [merge([answer.hits[i] for answer in good]) for i in range(queries)]
        return Found(
            hits,
            min(answer.position for answer in good),
            as_of_ms,
            asked,
            len(good),
            (searched - began) * 1e3,
            (time.perf_counter() - searched) * 1e3,
        )

    async def _ask(self, served: Served, ask: Callable[[Replica], Awaitable[A]]) -> tuple[int, list[A]]:
        """How many shards there are to ask, and what those that answered said."""

        async def outcome(shard: int) -> A | None:
            try:
                return await ask(served.replicas[shard])
            except DeadlineExceeded:
                raise
            except Exception as error:
                name = served.collection.name
                log.error("shard %d of %s failed a search", shard, name, exc_info=error)
                return None

        if len(served.replicas) == 1:  # nothing to choose, nothing to do side by side
            [shard] = served.replicas
            answer = await outcome(shard)
            return 1, [] if answer is None else [answer]
        loads = {shard: [0.0] for shard in served.replicas}
        plan = plan_fanout(served.shard_map, loads, self._rng)
        answers = await asyncio.gather(*(outcome(call.shard) for call in plan.calls))
        asked = len(plan.calls) + len(plan.unreachable)
        return asked, [answer for answer in answers if answer is not None]


class _Scored(NamedTuple):
    """A rendered row with its score, as the merge of several shards wants it."""

    id: str
    score: float
    version: Version
    row: RenderedRow


def _merged(answers: Sequence[RenderedHits], k: int) -> RenderedHits:
    scored = [
        [
            _Scored(row.id, score, row.version, row)
            for row, score in zip(hits.rows, np.frombuffer(hits.scores, np.float32).tolist(), strict=True)
        ]
        for hits in answers
    ]
    best = merge(scored, k)
    return RenderedHits(
        [hit.row for hit in best], np.array([hit.score for hit in best], np.float32).tobytes()
    )
