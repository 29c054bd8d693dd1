"""The fan-out: carries a plan out over the shards and merges what they find."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple

import numpy as np

from index_builder.segments.index_spec import Effort
from services.deadline import Deadline
from services.gateway.catalog import Served
from services.gateway.endpoints import ShardEndpoint
from services.shard.rendering import RenderedHits, RenderedRow
from services.shard.replica import Hits, ShardAnswer
from services.telemetry import stage
from shard_router.errors import DeadlineExceeded, ShardUnavailable
from shard_router.fanout_plan import plan_fanout
from shard_router.filters import Filter
from shard_router.merge import merge
from shard_router.model import Hit, Include, Version

log = logging.getLogger(__name__)

_FANOUT, _MERGE = stage("fanout"), stage("merge")


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

    def search(
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
    ) -> Awaitable[Found[list[Hit]]]:
        """The k best documents for every query (float32 [n, dim]); ShardUnavailable below `min_coverage`.

        A shard that fails is left out and shows in the coverage; a passed deadline fails the call.
        """
        options = _Options(filter, exact, effort, include, exclude, deadline)
        return self._search(served, queries, k, options, min_coverage, _values, merge)

    def search_rendered(
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
    ) -> Awaitable[Found[RenderedHits]]:
        """The same as `search`, with the hits as they go on the wire."""
        options = _Options(filter, exact, effort, include, exclude, deadline)
        return self._search(served, queries, k, options, min_coverage, _rendered, _merged)

    async def _search(
        self,
        served: Served,
        queries: np.ndarray,
        k: int,
        options: "_Options",
        min_coverage: float,
        ask: "_Ask[Hits]",
        merge: Callable[[Sequence[Hits], int], Hits],
    ) -> Found[Hits]:
        began, as_of_ms = time.perf_counter(), int(time.time() * 1000)
        if len(served.replicas) == 1:  # nothing to choose, nothing to do side by side
            [shard] = served.replicas
            asked, answers = 1, [await _outcome(served, shard, queries, k, options, ask)]
        else:
            loads = {shard: [0.0] for shard in served.replicas}
            plan = plan_fanout(served.shard_map, loads, self._rng)
            asked = len(plan.calls) + len(plan.unreachable)
            answers = await asyncio.gather(
                *(_outcome(served, call.shard, queries, k, options, ask) for call in plan.calls)
            )
        good = [answer for answer in answers if answer is not None]
        # A shard that lacks documents for now tells what it has, and does not count.
        answered = sum([answer.complete for answer in good])
        if not good or answered < min_coverage * asked:
            raise ShardUnavailable(answered, asked, min_coverage)
        searched = time.perf_counter()
        if len(good) == 1:  # a shard's answer is ranked, and holds every document once
            hits = good[0].hits
        else:
            hits = [merge([answer.hits[i] for answer in good], k) for i in range(len(queries))]
        merge_s = time.perf_counter() - searched
        _FANOUT.took(searched - began, merge_s)
        _MERGE.took(merge_s)
        return Found(
            hits,
            min([answer.position for answer in good]),
            as_of_ms,
            asked,
            answered,
            (searched - began) * 1e3,
            merge_s * 1e3,
        )


class _Options(NamedTuple):
    """What every shard is asked alike."""

    filter: Filter | None
    exact: bool
    effort: Effort
    include: Include
    exclude: frozenset[str]
    deadline: Deadline


#: Which of a replica's two searches is wanted.
_Ask = Callable[[ShardEndpoint], Callable[..., Awaitable[ShardAnswer[Hits]]]]


def _values(replica: ShardEndpoint) -> Callable[..., Awaitable[ShardAnswer[list[Hit]]]]:
    return replica.search


def _rendered(replica: ShardEndpoint) -> Callable[..., Awaitable[ShardAnswer[RenderedHits]]]:
    return replica.search_rendered


async def _outcome(
    served: Served,
    shard: int,
    queries: np.ndarray,
    k: int,
    options: _Options,
    ask: _Ask[Hits],
) -> ShardAnswer[Hits] | None:
    """A shard's answer; None where it failed, DeadlineExceeded where time is up."""
    filter, exact, effort, include, exclude, deadline = options
    try:
        return await ask(served.replicas[shard])(
            queries, k, filter=filter, exact=exact, effort=effort, include=include,
            exclude=exclude, deadline=deadline,
        )  # fmt: skip
    except DeadlineExceeded:
        raise
    except Exception as error:
        name = served.collection.name
        log.error("shard %d of %s failed a search", shard, name, exc_info=error)
        return None


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
