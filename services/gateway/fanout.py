"""The fan-out: carries a plan out over the shards and merges what they find."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, NamedTuple

import numpy as np

from index_builder.segments.index_spec import Effort
from services import tasks
from services.deadline import Deadline
from services.gateway.collection_log import CollectionLog
from services.gateway.endpoints import ShardEndpoint
from services.gateway.served import Served, answered
from services.shard.rendering import RenderedHits, RenderedRow
from services.shard.replica import Hits, ShardAnswer
from services.telemetry import stage
from shard_router.errors import DeadlineExceeded, ShardUnavailable, StaleEpoch, Unavailable
from shard_router.fanout_plan import Ask, GiveUp, ShardQuestion, Wait, plan_fanout, stale_pause_s
from shard_router.filters import Filter
from shard_router.merge import merge
from shard_router.model import Hit, Include, Version
from shard_router.resharding import Copy

log = logging.getLogger(__name__)

_SEARCH, _FANOUT, _MERGE = stage("search"), stage("fanout"), stage("merge")

_NO_COPIES: Mapping[int, ShardEndpoint] = {}
#: Which method of a replica searches.
_Ask = Callable[[ShardEndpoint], Callable[..., Awaitable[ShardAnswer[Hits]]]]
#: Asks a replica what is asked of all.
_Call = Callable[[ShardEndpoint], Awaitable[ShardAnswer[Hits]]]


class Found(NamedTuple, Generic[Hits]):
    """What the shards found: hits by query, the positions all of it includes, coverage, and times.

    `as_of_ms` is the wall clock when the positions were read.
    """

    hits: list[Hits]
    #: By log; one of which no copy answered is left out.
    positions: Mapping[str, int]
    as_of_ms: int
    asked: int
    answered: int
    search_ms: float
    merge_ms: float
    #: Of the shard map it was planned by.
    epoch: int

    @property
    def complete(self) -> bool:
        """Whether every shard answered."""
        return self.answered == self.asked


def _values_of(replica: ShardEndpoint) -> Callable[..., Awaitable[ShardAnswer[list[Hit]]]]:
    return replica.search


def _rendered_of(replica: ShardEndpoint) -> Callable[..., Awaitable[ShardAnswer[RenderedHits]]]:
    return replica.search_rendered


class FanOut:
    """Asks one replica of every shard, each for its own slots as of one epoch of the map.

    Where a collection has several logs, one that follows each of them.
    """

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
        return self._search(served, queries, k, options, min_coverage, _values_of, merge)

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
        return self._search(served, queries, k, options, min_coverage, _rendered_of, _merged)

    async def _search(
        self,
        served: Served,
        queries: np.ndarray,
        k: int,
        options: "_Options",
        min_coverage: float,
        ask: _Ask[Hits],
        merge: Callable[[Sequence[Hits], int], Hits],
    ) -> Found[Hits]:
        began, as_of_ms = time.perf_counter(), int(time.time() * 1000)
        attempt = 0
        served.searched_s = time.monotonic()
        if served.assure is not None:
            await served.assure(options.deadline)
        while True:
            epoch, shards, logs = served.state.epoch, served.shard_map.shards, list(served.logs.values())
            call = partial(_call, queries, k, options, epoch, ask)
            #: Those of one log follow those of another.
            answers: Sequence[ShardAnswer[Hits] | None]
            try:
                if served.collection.replicas > 1:
                    answers = await asyncio.gather(*self._chosen(served, logs, call))
                elif len(shards) > 1 or len(logs) > 1:  # nobody to choose from
                    answers = await asyncio.gather(
                        *(_sole(served, log, shard, call) for log in logs for shard in shards)
                    )
                else:  # nothing to do side by side
                    answers = [await _sole(served, logs[0], shards[0], call)]
                break
            except StaleEpoch:
                # A replica has gone over to another map, or has yet to: what others said may not fit.
                attempt += 1
                pause_s = stale_pause_s(attempt)
                if options.deadline.left_s() <= pause_s:
                    raise DeadlineExceeded("planning by the shard map") from None
                await asyncio.sleep(pause_s)
        asked = len(shards)
        good = [answer for answer in answers if answer is not None]
        # A shard that lacks documents for now tells what it has, and does not count.
        whole = [answer is not None and answer.complete for answer in answers]
        count = asked if all(whole) else answered(whole, asked)
        if not good or count < min_coverage * asked:
            raise ShardUnavailable(count, asked, min_coverage)
        searched = time.perf_counter()
        if len(good) == 1:  # a shard's answer is ranked, and holds every document once
            hits = good[0].hits
        else:
            hits = [merge([answer.hits[i] for answer in good], k) for i in range(len(queries))]
        merge_s = time.perf_counter() - searched
        for answer in good:
            _SEARCH.took(answer.took_ms / 1e3, merge_s)
        _FANOUT.took(searched - began, merge_s)
        _MERGE.took(merge_s)
        return Found(
            hits,
            _positions(logs, answers, asked),
            as_of_ms,
            asked,
            count,
            (searched - began) * 1e3,
            merge_s * 1e3,
            epoch,
        )

    def _chosen(
        self, served: Served, logs: Sequence[CollectionLog], call: "_Call[Hits]"
    ) -> Iterator[Awaitable[ShardAnswer[Hits] | None]]:
        """The answers of the shards, of each log one after another; StaleEpoch."""
        for log in logs:
            loads = {shard: log.loads(shard) for shard in served.shard_map.shards}
            plan = plan_fanout(served.shard_map, loads, self._rng)
            chosen = {one.shard: one.replica for one in plan.calls}
            for shard in served.shard_map.shards:
                if shard in chosen:
                    yield self._one_of(served, log, shard, ShardQuestion(chosen[shard], loads[shard]), call)
                else:
                    yield _nobody()

    async def _one_of(
        self, served: Served, log: CollectionLog, shard: int, question: ShardQuestion, call: "_Call[Hits]"
    ) -> ShardAnswer[Hits] | None:
        """The first answer of a shard's copies; None where those that were asked failed."""
        asking: dict[asyncio.Task[ShardAnswer[Hits]], int] = {}

        def begin(number: int) -> None:
            copy = Copy(shard, number, log.database)
            asking[asyncio.create_task(self._counted(served, log, copy, call))] = number

        served.hedges.asked()
        begin(question.first)
        p95_ms = served.latencies.p95_ms
        try:
            while True:
                step: Ask | Wait | GiveUp = Wait()
                limit_s = p95_ms / 1e3 if p95_ms is not None and question.may_hedge else None
                done, _ = await asyncio.wait(asking, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    p95_ms, step = None, question.late(served.hedges)
                for task in done:
                    number, error = asking.pop(task), task.exception()
                    if error is None:
                        return task.result()
                    if isinstance(error, DeadlineExceeded | StaleEpoch):
                        raise error
                    _failed(served, Copy(shard, number, log.database), error)
                    step = question.failed(number, unavailable=isinstance(error, Unavailable))
                match step:
                    case Ask(number):
                        begin(number)
                    case GiveUp():
                        return None
        finally:
            await tasks.end(*asking)

    async def _counted(
        self, served: Served, log: CollectionLog, copy: Copy, call: "_Call[Hits]"
    ) -> ShardAnswer[Hits]:
        """A copy's answer, counted while it is under way, and its time taken."""
        replica = log.replicas.get(copy.shard, {}).get(copy.replica)
        if replica is None:
            raise Unavailable(f"replica {copy.replica} of shard {copy.shard} has left")
        began = time.perf_counter()
        log.in_flight[copy] = log.in_flight.get(copy, 0) + 1
        try:
            answer = await call(replica)
        finally:
            log.in_flight[copy] -= 1
        served.latencies.add((time.perf_counter() - began) * 1e3)
        return answer


class _Options(NamedTuple):
    """What every shard is asked alike."""

    filter: Filter | None
    exact: bool
    effort: Effort
    include: Include
    exclude: frozenset[str]
    deadline: Deadline


async def _sole(
    served: Served, log: CollectionLog, shard: int, call: "_Call[Hits]"
) -> ShardAnswer[Hits] | None:
    """The answer of a shard's only copy; None where it failed."""
    question: ShardQuestion | None = None
    while True:
        replica = log.replicas.get(shard, _NO_COPIES).get(0)
        if replica is None:
            return None
        try:
            return await call(replica)
        except (DeadlineExceeded, StaleEpoch):
            raise
        except Exception as error:
            question = question or ShardQuestion(0, (0.0,))
            if isinstance(question.failed(0, unavailable=isinstance(error, Unavailable)), GiveUp):
                _failed(served, Copy(shard, 0, log.database), error)
                return None


async def _nobody() -> None:
    """The answer of a shard that has no copy to ask."""


def _positions(
    logs: Sequence[CollectionLog], answers: Sequence[ShardAnswer[Hits] | None], shards: int
) -> dict[str, int]:
    """By log, the position that all of its answers include."""
    told: dict[str, int] = {}
    for at, log in enumerate(logs):
        its = [answer.position for answer in answers[at * shards : (at + 1) * shards] if answer is not None]
        if its:
            told[log.log_id] = min(its)
    return told


def _call(
    queries: np.ndarray, k: int, options: _Options, epoch: int, ask: _Ask[Hits], replica: ShardEndpoint
) -> Awaitable[ShardAnswer[Hits]]:
    """A copy's answer."""
    filter, exact, effort, include, exclude, deadline = options
    return ask(replica)(
        queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
        epoch=epoch, deadline=deadline,
    )  # fmt: skip


def _failed(served: Served, copy: Copy, error: BaseException) -> None:
    name = served.collection.name
    log.error("replica %d of shard %d of %s failed a search", copy.replica, copy.shard, name, exc_info=error)


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
