"""Searches of one replica: they wait together, share scans, and run in the search threads."""

import asyncio
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np

from index_builder.segments import similarity
from index_builder.segments.index_spec import Effort
from services.deadline import Deadline
from services.shard.filter_cache import FilterCache
from services.shard.rendering import RenderedHits, Rendering
from services.shard.search_queue import Piece, SearchQueue
from services.shard.views import Ranking, Snapshot, View
from shard_router import filters
from shard_router.errors import DeadlineExceeded, Unavailable
from shard_router.filters import Filter
from shard_router.model import Attributes, Hit, Include, Metric

log = logging.getLogger(__name__)

_QUEUE_ROWS = 8192
#: Smallest number of neighbours looked for; above it powers of two, so that like calls share a scan.
_LEAST_K = 10
_NO_ATTRIBUTES: Attributes = {}


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
    answer: "asyncio.Future[list[Any]]"
    #: By query.
    hits: list[Any] = field(default_factory=list)
    missing: int = 0


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
        self._jobs = 0
        #: Unanswered, in order of arrival.
        self._open: dict[_Search, None] = {}
        #: Goes off at the earliest deadline that was seen since it was set.
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at_s = 0.0
        #: The searches of one turn of the event loop are handed over together, at its end.
        self._hand_over_is_due = False
        self._closed = False
        self._settled = asyncio.Event()
        self.searches = self.queries = self.batches = 0

    @property
    def waiting_rows(self) -> int:
        """Queries that wait for a thread."""
        return self._queue.rows

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
        search = _Search(
            queries, k, wanted, filter, exact, effort, include, exclude, rendered, deadline, snapshot,
            self._loop.create_future(), [None] * count, count,
        )  # fmt: skip
        key = (None if filter is None else filters.digest(filter), exact, effort, wanted)
        with self._lock:
            self._queue.put(key, search, count)
        if not self._hand_over_is_due:
            self._hand_over_is_due = True
            self._loop.call_soon(self._hand_over)
        self.searches += 1
        self.queries += count
        self._open[search] = None
        if self._alarm is None or deadline.at_s < self._alarm_at_s:
            self._set_alarm(deadline.at_s, left_s)
        try:
            return await search.answer
        finally:
            del self._open[search]

    async def close(self) -> None:
        """Fail what waits, and return when no thread is searching."""
        self._closed = True
        with self._lock:
            waiting = list(self._queue.drain())
            if not self._jobs:
                self._settled.set()
        for search in waiting:
            self._fail(search, Unavailable("the replica is closing"))
        await self._settled.wait()
        if self._alarm is not None:
            self._alarm.cancel()

    def _hand_over(self) -> None:
        """Give what waits to as many threads as may search."""
        self._hand_over_is_due = False
        left: Iterable[_Search] = ()
        with self._lock:
            try:
                for _ in range(min(self._most_jobs - self._jobs, self._queue.rows)):
                    self._threads.submit(self._work)
                    self._jobs += 1
            except RuntimeError:  # the threads were shut down
                left = self._queue.drain()
        for search in left:
            self._fail(search, Unavailable("the replica is closing"))

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
        """Search one batch in this thread, then go to the back of the line of jobs if more waits."""
        with self._lock:
            pieces = self._queue.take(self._most_jobs)
        late = [piece for piece in pieces if piece.item.deadline.left_s() <= 0]
        pieces = [piece for piece in pieces if not piece.item.answer.done() and piece not in late]
        hits: list[Any] = []
        failure: Exception | None = None
        if pieces:
            try:
                hits = self._search(pieces)
            except Exception as error:
                log.exception("a batch of %d searches failed", len(pieces))
                failure = error
        if pieces or late:
            self._loop.call_soon_threadsafe(self._deliver, pieces, hits, failure, late)
        left: list[_Search] = []
        with self._lock:
            if self._queue.rows:
                try:
                    self._threads.submit(self._work)
                    return
                except RuntimeError:  # the threads were shut down: nobody else will come
                    left = list(self._queue.drain())
            self._jobs -= 1
            settled = self._closed and not self._jobs
        for search in left:
            self._loop.call_soon_threadsafe(self._fail, search, Unavailable("the replica is closing"))
        if settled:
            self._loop.call_soon_threadsafe(self._settled.set)

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

    def _deliver(
        self,
        pieces: Sequence[Piece[_Search]],
        hits: Sequence[Any],
        failure: Exception | None,
        late: Sequence[Piece[_Search]],
    ) -> None:
        """Hand a batch's hits to its callers; on the event loop."""
        self.batches += bool(pieces)
        for piece in late:
            self._fail(piece.item, DeadlineExceeded("shard search"))
        first = 0
        for piece in pieces:
            search, rows = piece.item, piece.stop - piece.start
            if failure is not None:
                self._fail(search, failure)
                continue
            search.hits[piece.start : piece.stop] = hits[first : first + rows]
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
        #: Places in the ranking's views; not looked at where there is only one.
        self._parts: list[list[int]] = ranking.parts.tolist() if len(ranking.views) > 1 else []

    def rendered(self, query: int, k: int, include: Include, exclude: frozenset[str]) -> RenderedHits:
        """The best k as they go on the wire."""
        ranking = self._ranking
        count = min(k + len(exclude), ranking.counts[query])
        rows, scores = self._rows[query][:count], ranking.scores[query]
        if not self._parts:
            hits = self._rendering.rows(ranking.views[0], rows, include) if count else []
        else:
            hits = [
                self._rendering.rows(ranking.views[part], (row,), include)[0]
                for part, row in zip(self._parts[query], rows, strict=False)
            ]
        if exclude:
            kept = [at for at, hit in enumerate(hits) if hit.id not in exclude][:k]
            return RenderedHits([hits[at] for at in kept], scores[kept].tobytes())
        return RenderedHits(hits, scores[:count].tobytes())

    def values(self, query: int, k: int, include: Include, exclude: frozenset[str]) -> list[Hit]:
        """The best k as values."""
        ranking = self._ranking
        rows = self._rows[query][: min(k + len(exclude), ranking.counts[query])]
        parts = self._parts[query] if self._parts else [0] * len(rows)
        hits: list[Hit] = []
        for part, row, score in zip(parts, rows, ranking.scores[query].tolist(), strict=False):
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
