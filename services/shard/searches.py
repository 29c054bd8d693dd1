"""Searches of one replica: they wait together, share scans, and run in the search threads."""

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import faiss
import numpy as np

from index_builder.segments import similarity
from index_builder.segments.index_spec import Effort
from services.deadline import Deadline
from services.shard.filter_cache import FilterCache
from services.shard.search_queue import Piece, SearchQueue
from services.shard.views import Snapshot
from shard_router import filters
from shard_router.errors import DeadlineExceeded, Unavailable
from shard_router.filters import Filter
from shard_router.model import Hit, Include, Metric

log = logging.getLogger(__name__)

_QUEUE_ROWS = 8192
#: Smallest number of neighbours looked for; above it powers of two, so that like calls share a scan.
_LEAST_K = 10


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
    deadline: Deadline
    snapshot: Snapshot
    answer: "asyncio.Future[list[list[Hit]]]"
    hits: list[list[Hit]] = field(default_factory=list)
    missing: int = 0


class Searches:
    """Runs searches on snapshots. Belongs to the event loop it was made on."""

    def __init__(self, metric: Metric, threads: ThreadPoolExecutor, cache: FilterCache) -> None:
        self._metric, self._threads, self._cache = metric, threads, cache
        self._loop = asyncio.get_running_loop()
        #: More at once than there are processors would only wait there instead of sharing scans here.
        self._most_jobs = len(os.sched_getaffinity(0))
        #: Guards the queue and the count of jobs, which the search threads touch too.
        self._lock = threading.Lock()
        self._queue: SearchQueue[_Search] = SearchQueue(_QUEUE_ROWS)
        self._jobs = 0
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
        deadline: Deadline,
    ) -> list[list[Hit]]:
        """The best k documents of each query, float32 [n, dim], as of the snapshot or later.

        Overloaded where too many queries wait, DeadlineExceeded, Unavailable while closing.
        """
        left_s = deadline.require("shard search")
        if self._closed:
            raise Unavailable("the replica is closing")
        wanted = k + len(exclude)
        wanted = _LEAST_K if wanted <= _LEAST_K else 1 << (wanted - 1).bit_length()
        search = _Search(
            queries, k, wanted, filter, exact, effort, include, exclude, deadline, snapshot,
            self._loop.create_future(), [[]] * len(queries), len(queries),
        )  # fmt: skip
        if not search.missing:
            return []
        key = (None if filter is None else filters.digest(filter), exact, effort, wanted)
        with self._lock:
            self._queue.put(key, search, len(queries))
            if self._jobs < self._most_jobs:
                self._threads.submit(self._work)
                self._jobs += 1
        self.searches += 1
        self.queries += len(queries)
        try:
            async with asyncio.timeout(left_s):
                return await search.answer
        except TimeoutError:
            raise DeadlineExceeded("shard search") from None

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

    def _work(self) -> None:
        """Search one batch in this thread, then go to the back of the line of jobs."""
        with self._lock:
            pieces = self._queue.take(self._most_jobs)
            if not pieces:
                self._jobs -= 1
                if self._closed and not self._jobs:
                    self._loop.call_soon_threadsafe(self._settled.set)
                return
        late = [piece for piece in pieces if piece.item.deadline.left_s() <= 0]
        pieces = [piece for piece in pieces if piece not in late and not piece.item.answer.done()]
        hits: list[list[Hit]] = []
        failure: Exception | None = None
        if pieces:
            try:
                hits = self._search(pieces)
            except Exception as error:
                log.exception("a batch of %d searches failed", len(pieces))
                failure = error
        self._loop.call_soon_threadsafe(self._deliver, pieces, hits, failure, late)
        try:
            self._threads.submit(self._work)
        except RuntimeError:  # the threads were shut down: nobody else will come
            with self._lock:
                self._jobs -= 1
                left = list(self._queue.drain())
                if self._closed and not self._jobs:
                    self._loop.call_soon_threadsafe(self._settled.set)
            for search in left:
                self._loop.call_soon_threadsafe(self._fail, search, Unavailable("the replica is closing"))

    def _search(self, pieces: Sequence[Piece[_Search]]) -> list[list[Hit]]:
        """The hits of every row of the pieces, in order."""
        # OpenMP's own threads are far slower under contention than ours; the setting is per thread.
        faiss.omp_set_num_threads(1)
        first = pieces[0].item
        snapshot = max((piece.item.snapshot for piece in pieces), key=lambda one: one.position)
        rows = np.concatenate([piece.item.queries[piece.start : piece.stop] for piece in pieces])
        with np.errstate(over="ignore", invalid="ignore"):  # vectors near the end of float32's range
            found = snapshot.search(
                similarity.prepare(rows, self._metric),
                first.wanted,
                filter=first.filter,
                exact=first.exact,
                effort=first.effort,
                cache=self._cache,
            )
        hits: list[list[Hit]] = []
        for piece in pieces:
            search = piece.item
            for row in found[len(hits) : len(hits) + piece.stop - piece.start]:
                if search.exclude:
                    row = [one for one in row if one.id not in search.exclude]
                hits.append([one.hit(search.include) for one in row[: search.k]])
        return hits

    def _deliver(
        self,
        pieces: Sequence[Piece[_Search]],
        hits: Sequence[list[Hit]],
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
