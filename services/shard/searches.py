"""Searches of one replica: they wait together, share scans, and run in the search threads.

What arrives in one turn of the event loop is handed over together. While nobody searches, what is known to be
short is run by the event loop itself: waking a thread would take longer.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import faiss
import numpy as np

from index_builder.segments import similarity
from index_builder.segments.index_spec import Effort
from services.deadline import Deadline
from services.shard.filter_cache import FilterCache
from services.shard.rendering import RenderedHits, Rendering
from services.shard.search_queue import Piece, SearchQueue
from services.shard.views import Ranking, Snapshot, View
from services.telemetry import stage
from shard_router import filters
from shard_router.errors import DeadlineExceeded, Overloaded, Unavailable
from shard_router.filters import Filter
from shard_router.model import Attributes, Hit, Include, Metric

log = logging.getLogger(__name__)

_FAISS = stage("faiss")

_QUEUE_ROWS = 8192
#: Smallest number of neighbours looked for; above it powers of two, so that like calls share a scan.
_LEAST_K = 10
_NO_ATTRIBUTES: Attributes = {}
#: Estimated work that a further thread is worth waking for: with less, threads only take the interpreter from
#: each other and from the event loop. And the most that the event loop does itself.
_JOB_MS, _LOOP_MS = 4.0, 1.0
#: Estimated work of several kinds that a thread does before it wakes the event loop, which costs as much as a
#: short search.
_TURN_MS = 1.0
#: A query's estimated work before the first of its kind, which is too much for the event loop, and how fast
#: later ones change that.
_UNKNOWN_MS, _LEARNING = 1.5, 0.1
#: Kinds of search whose work is remembered.
_KINDS_MOST = 1_024


@dataclass(eq=False, slots=True)
class _Search:
    """One caller's queries, float32 [n, dim], and what becomes of them."""

    queries: np.ndarray
    k: int
    #: k and more, so that excluded documents can be left out.
    wanted: int
    filter: Filter | None
    exact: bool
    effort: Effort
    include: Include
    exclude: frozenset[str]
    #: Hits as RenderedHits, not as values.
    rendered: bool
    deadline: Deadline
    snapshot: Snapshot
    #: Searches of the same kind share a scan.
    kind: Hashable
    #: Estimated work of one query.
    query_ms: float
    answer: "asyncio.Future[list[Any]]"
    #: By query.
    hits: list[Any] = field(default_factory=list)
    missing: int = 0
    #: Of the batches that its queries were in, the longest.
    searched_s: float = 0.0


class _Batch(NamedTuple):
    """Pieces that were searched together, and the hits of their rows, in order, or why there are none."""

    pieces: Sequence[Piece[_Search]]
    hits: list[Any]
    failure: Exception | None = None


class Searches:
    """Runs searches on snapshots. Belongs to the event loop it was made on."""

    def __init__(
        self, metric: Metric, threads: ThreadPoolExecutor, cache: FilterCache, rendering: Rendering
    ) -> None:
        self._metric, self._threads, self._cache, self._rendering = metric, threads, cache, rendering
        self._loop = asyncio.get_running_loop()
        #: More at once than there are processors would only wait there instead of sharing scans here.
        self._most_jobs = len(os.sched_getaffinity(0))
        #: Guards the queue and the count of jobs, which the search threads touch too.
        self._lock = threading.Lock()
        self._queue: SearchQueue[_Search] = SearchQueue(_QUEUE_ROWS)
        self._queued_ms = 0.0
        self._jobs = 0
        #: Of this turn of the event loop, handed over at its end.
        self._arrived: list[_Search] = []
        #: Work of one query by kind of search, learned.
        self._query_ms: dict[Hashable, float] = {}
        #: Unanswered, in order of arrival.
        self._open: dict[_Search, None] = {}
        #: Goes off at the earliest deadline that was seen since it was set.
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at_s = 0.0
        self._closed = False
        self._settled = asyncio.Event()
        self.searches = self.queries = self.batches = 0

    @property
    def waiting_rows(self) -> int:
        """Queries that wait for a thread."""
        return self._queue.rows + sum(len(search.queries) for search in self._arrived)

    async def search(
        self,
        snapshot: Snapshot,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool,
        effort: Effort,
        include: Include,
        exclude: frozenset[str],
        rendered: bool,
        deadline: Deadline,
    ) -> list[Any]:
        """The best k documents of each query, float32 [n, dim], as of the snapshot or later.

        A list of Hits a query, or one RenderedHits where `rendered`. Overloaded where too many queries
        wait, DeadlineExceeded, Unavailable while closing.
        """
        left_s = deadline.require("shard search")
        if self._closed:
            raise Unavailable("the replica is closing")
        wanted = k + len(exclude)
        wanted = _LEAST_K if wanted <= _LEAST_K else 1 << (wanted - 1).bit_length()
        count = len(queries)
        if not count:
            return []
        kind = (None if filter is None else filters.digest(filter), exact, effort, wanted)
        search = _Search(
            queries, k, wanted, filter, exact, effort, include, exclude, rendered, deadline, snapshot,
            kind, self._query_ms.get(kind, _UNKNOWN_MS), self._loop.create_future(), [None] * count, count,
        )  # fmt: skip
        if not self._arrived:
            self._loop.call_soon(self._hand_over)
        self._arrived.append(search)
        self.searches += 1
        self.queries += count
        self._open[search] = None
        if self._alarm is None or deadline.at_s < self._alarm_at_s:
            self._set_alarm(deadline.at_s, left_s)
        try:
            hits = await search.answer
        finally:
            del self._open[search]
        _FAISS.took(search.searched_s)
        return hits

    async def close(self) -> None:
        """Fail what waits, and return when no thread is searching."""
        self._closed = True
        with self._lock:
            waiting = self._arrived + list(self._queue.drain())
            self._queued_ms = 0.0
            if not self._jobs:
                self._settled.set()
        self._arrived.clear()
        for search in waiting:
            self._fail(search, Unavailable("the replica is closing"))
        await self._settled.wait()
        if self._alarm is not None:
            self._alarm.cancel()

    def _hand_over(self) -> None:
        """Give what arrived to as many threads as it is worth, or do it here."""
        arrived = self._arrived[:]
        self._arrived.clear()
        refused: dict[_Search, Exception] = {}
        with self._lock:
            for search in arrived:
                try:
                    # A later snapshot serves an earlier search only if it is of the same slots.
                    key = search.kind, search.snapshot.since
                    self._queue.put(key, search, len(search.queries))
                    self._queued_ms += len(search.queries) * search.query_ms
                except Overloaded as full:
                    refused[search] = full
            here = self._take() if not self._jobs and self._queued_ms <= _LOOP_MS else []
            wanted = min(self._most_jobs, -(-self._queued_ms // _JOB_MS))
            while self._jobs < wanted:
                try:
                    self._threads.submit(self._work)
                except RuntimeError:  # the threads were shut down
                    closing = Unavailable("the replica is closing")
                    refused |= dict.fromkeys(self._queue.drain(), closing)
                    break
                self._jobs += 1
        self._deliver(self._searched(here))
        for search, error in refused.items():
            self._fail(search, error)

    def _set_alarm(self, at_s: float, left_s: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at_s = at_s
        self._alarm = self._loop.call_later(left_s, self._fail_the_late)

    def _fail_the_late(self) -> None:
        """End the searches whose time is up, and wait for the next one's."""
        self._alarm = None
        for search in list(self._open):
            if search.deadline.left_s() <= 0:
                self._fail(search, DeadlineExceeded("shard search"))
        left = [search.deadline for search in self._open if not search.answer.done()]
        if left:
            first = min(left, key=lambda deadline: deadline.at_s)
            self._set_alarm(first.at_s, first.left_s())

    def _work(self) -> None:
        """Search a share of what waits, then go to the back of the line of jobs if more does."""
        with self._lock:
            taken = self._take()
        if searched := self._searched(taken):
            self._loop.call_soon_threadsafe(self._deliver, searched)
        left: list[_Search] = []
        with self._lock:
            if self._queue.rows:
                try:
                    self._threads.submit(self._work)
                    return
                except RuntimeError:  # the threads were shut down: nobody else will come
                    left = list(self._queue.drain())
            self._queued_ms = 0.0
            self._jobs -= 1
            settled = self._closed and not self._jobs
        for search in left:
            self._loop.call_soon_threadsafe(self._fail, search, Unavailable("the replica is closing"))
        if settled:
            self._loop.call_soon_threadsafe(self._settled.set)

    def _take(self) -> list[list[Piece[_Search]]]:
        """A job's share of what waits, by kind, as far as the first may wait for the others."""
        jobs, taken_ms = max(1, self._jobs), 0.0
        share = -(-self._queue.rows // jobs)
        taken: list[list[Piece[_Search]]] = []
        while self._queue.rows and share > 0 and taken_ms < _TURN_MS:
            pieces = self._queue.take(jobs)
            taken.append(pieces)
            share -= sum(piece.stop - piece.start for piece in pieces)
            taken_ms += sum((piece.stop - piece.start) * piece.item.query_ms for piece in pieces)
        # Sums in another order leave crumbs, which a thread would be woken for.
        self._queued_ms = self._queued_ms - taken_ms if self._queue.rows else 0.0
        return taken

    def _searched(self, taken: Sequence[Sequence[Piece[_Search]]]) -> list[_Batch]:
        """What came of these, searched here and now, less those who got an answer meanwhile.

        Those who are late were told so when it happened, like those who left.
        """
        wanted = ([piece for piece in pieces if not piece.item.answer.done()] for pieces in taken)
        return [self._batch(pieces) for pieces in wanted if pieces]

    def _batch(self, pieces: Sequence[Piece[_Search]]) -> _Batch:
        searching_s = time.perf_counter()
        # Processor time: what others take meanwhile is no work of these.
        began_s = time.thread_time()
        try:
            hits = self._search(pieces)
        except Exception as error:
            log.exception("a batch of %d searches failed", len(pieces))
            return _Batch(pieces, [], error)
        searched_s = time.perf_counter() - searching_s
        for piece in pieces:
            piece.item.searched_s = max(piece.item.searched_s, searched_s)
        self._learn(pieces[0].item.kind, (time.thread_time() - began_s) * 1e3 / len(hits))
        return _Batch(pieces, hits)

    def _learn(self, kind: Hashable, query_ms: float) -> None:
        """Remember what a query of that kind took; one that was held up counts for no more than twice."""
        known = self._query_ms.get(kind)
        if known is None and len(self._query_ms) >= _KINDS_MOST:
            self._query_ms.clear()
        if known is not None:
            query_ms = known + _LEARNING * (min(query_ms, 2 * known) - known)
        self._query_ms[kind] = query_ms

    def _search(self, pieces: Sequence[Piece[_Search]]) -> list[Any]:
        """The hits of every row of the pieces, in order."""
        # OpenMP's own threads are far slower under contention than ours; the setting is per thread.
        faiss.omp_set_num_threads(1)
        first = pieces[0].item
        if len(pieces) == 1:
            snapshot, rows = first.snapshot, first.queries[pieces[0].start : pieces[0].stop]
        else:
            snapshot = max((piece.item.snapshot for piece in pieces), key=lambda one: one.position)
            rows = np.concatenate([piece.item.queries[piece.start : piece.stop] for piece in pieces])
        with np.errstate(over="ignore", invalid="ignore"):  # vectors near the end of float32's range
            ranking = snapshot.search(
                similarity.prepare(rows, self._metric),
                first.wanted,
                filter=first.filter,
                exact=first.exact,
                effort=first.effort,
                cache=self._cache,
            )
        found = _Found(ranking, self._rendering)
        hits: list[Any] = []
        for piece in pieces:
            search = piece.item
            make = found.rendered if search.rendered else found.values
            queries = range(len(hits), len(hits) + piece.stop - piece.start)
            hits += [make(query, search.k, search.include, search.exclude) for query in queries]
        return hits

    def _deliver(self, searched: Sequence[_Batch]) -> None:
        """Hand the hits of batches to their callers; on the event loop."""
        self.batches += len(searched)
        for batch in searched:
            first = 0
            for piece in batch.pieces:
                search, rows = piece.item, piece.stop - piece.start
                if batch.failure is not None:
                    self._fail(search, batch.failure)
                    continue
                search.hits[piece.start : piece.stop] = batch.hits[first : first + rows]
                first += rows
                search.missing -= rows
                if not search.missing and not search.answer.done():
                    search.answer.set_result(search.hits)

    @staticmethod
    def _fail(search: _Search, error: Exception) -> None:
        if not search.answer.done():
            search.answer.set_exception(error)


class _Found:
    """A ranking's rows as hits, in either form."""

    def __init__(self, ranking: Ranking, rendering: Rendering) -> None:
        self._ranking, self._rendering = ranking, rendering
        self._rows: list[list[int]] = ranking.rows.tolist()
        self._parts: Sequence[Iterable[int]] = (
            ranking.parts.tolist() if len(ranking.views) > 1 else [repeat(0)] * len(self._rows)
        )

    def rendered(self, query: int, k: int, include: Include, exclude: frozenset[str]) -> RenderedHits:
        """The best k as they go on the wire."""
        ranking = self._ranking
        count = min(k + len(exclude), ranking.counts[query])
        rows, scores = self._rows[query][:count], ranking.scores[query]
        hits = self._rendering.rows(ranking.views, self._parts[query], rows, include)
        if exclude:
            kept = [at for at, hit in enumerate(hits) if hit.id not in exclude][:k]
            return RenderedHits([hits[at] for at in kept], scores[kept].tobytes())
        return RenderedHits(hits, scores[:count].tobytes())

    def values(self, query: int, k: int, include: Include, exclude: frozenset[str]) -> list[Hit]:
        """The best k as values."""
        ranking = self._ranking
        rows = self._rows[query][: min(k + len(exclude), ranking.counts[query])]
        hits: list[Hit] = []
        for part, row, score in zip(self._parts[query], rows, ranking.scores[query].tolist(), strict=False):
            view = ranking.views[part]
            if len(hits) < k and view.id_at(row) not in exclude:
                hits.append(_hit(view, row, score, include))
        return hits


def _hit(view: View, row: int, score: float, include: Include) -> Hit:
    """One document, with the parts asked for."""
    return Hit(
        id=view.id_at(row),
        score=score,
        version=view.version_at(row),
        attributes=view.attributes_at(row) if include.attributes else _NO_ATTRIBUTES,
        text=view.text_at(row) if include.text else None,
        vector=view.vector_at(row) if include.vector else None,
    )
