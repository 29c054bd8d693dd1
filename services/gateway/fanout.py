"""The fan-out: carries a plan out over the shards and merges what they find."""

import asyncio
import logging
import random
import time
from dataclasses import dataclass

import numpy as np

from index_builder.segments.index_spec import Effort
from services.deadline import Deadline
from services.gateway.catalog import Served
from services.shard.replica import ShardAnswer
from shard_router.errors import DeadlineExceeded, ShardUnavailable
from shard_router.fanout_plan import plan_fanout
from shard_router.filters import Filter
from shard_router.merge import merge
from shard_router.model import Hit, Include

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What the shards found: hits by query, the log position all of it includes, coverage, and times.

    `as_of_ms` is the wall clock when the positions were read.
    """

    hits: list[list[Hit]]
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
    ) -> Found:
        """The k best documents for every query (float32 [n, dim]); ShardUnavailable below `min_coverage`.

        A shard that fails is left out and shows in the coverage; a passed deadline fails the call.
        """
        began, as_of_ms = time.perf_counter(), int(time.time() * 1000)
        loads = {shard: [0.0] for shard in served.replicas}
        plan = plan_fanout(served.shard_map, loads, self._rng)
        answers = await asyncio.gather(
            *(
                served.replicas[call.shard].search(
                    queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
                    deadline=deadline,
                )
                for call in plan.calls
            ),
            return_exceptions=True,
        )  # fmt: skip
        good: list[ShardAnswer] = []
        for call, answer in zip(plan.calls, answers, strict=True):
            if isinstance(answer, ShardAnswer):
                good.append(answer)
            elif isinstance(answer, DeadlineExceeded | asyncio.CancelledError):
                raise answer
            else:
                name = served.collection.name
                log.error("shard %d of %s failed a search", call.shard, name, exc_info=answer)
        asked = len(plan.calls) + len(plan.unreachable)
        if not good or len(good) < min_coverage * asked:
            raise ShardUnavailable(len(good), asked, min_coverage)
        searched = time.perf_counter()
        hits = [merge([answer.hits[i] for answer in good], k) for i in range(len(queries))]
        merged = time.perf_counter()
        return Found(
            hits,
            min(answer.position for answer in good),
            as_of_ms,
            asked,
            len(good),
            (searched - began) * 1e3,
            (merged - searched) * 1e3,
        )
