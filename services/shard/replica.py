"""One replica of a shard: follows the log, answers searches, and can be thrown away at any time.

Everything below runs on the event loop, except searches (searches.py: the search threads) and files
(file_work.py: a thread of its own, or a child process). It follows the log from pushes (`offer`), hints
(`wake`) and a slow poll.
"""

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from index_builder.segments import device as devices
from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort
from services.deadline import Deadline
from services.shard.file_work import FileWork
from services.shard.filter_cache import FilterCache
from services.shard.layout import Layout, SegmentStatus
from services.shard.rendering import RenderedHits, Rendering
from services.shard.searches import Searches
from services.shard.shelf import Recovered, Shelf
from services.shard.views import Snapshot
from shard_router.errors import DimensionMismatch, RingfortError, Unavailable, UnknownLog
from shard_router.filters import Filter
from shard_router.model import Collection, Hit, Include, LogDelta, Version

log = logging.getLogger(__name__)

T = TypeVar("T")
#: One query's hits: values, or as they go on the wire.
Hits = TypeVar("Hits", list[Hit], RenderedHits)

#: Log rows applied before the event loop gets its turn.
_SLICE_ROWS = 512
#: Frozen memtables in memory, at most: when their files cannot be written, the replica falls behind.
_FROZEN_MOST = 8
_FILTER_CACHE_BYTES = 32 << 20
_RENDERED_ROWS_BYTES = 8 << 20
#: Slowest retry of a log that cannot be read.
_BACKOFF_MOST_S = 5.0
#: How long a cancelled task has until it is cancelled again.
_CANCEL_AGAIN_S = 0.05


class ShardAnswer(NamedTuple, Generic[Hits]):
    """The hits of each query, best first, as of `position` or later."""

    position: int
    hits: list[Hits]
    took_ms: float


class Replica:
    """A view of one shard of a collection, as far as its log was read."""

    def __init__(
        self,
        collection: Collection,
        shelf: Shelf,
        layout: Layout,
        log_id: str,
        tail: Callable[[int], Awaitable[LogDelta]],
        search_threads: ThreadPoolExecutor,
        poll_ms: int,
        tail_rows: int,
    ) -> None:
        """Use `open`; this only puts the parts together."""
        self._collection, self._shelf, self._layout = collection, shelf, layout
        self._log_id, self._tail, self._tail_rows = log_id, tail, tail_rows
        self._threads, self._poll_s = search_threads, poll_ms / 1e3
        self._filters = FilterCache(_FILTER_CACHE_BYTES)
        rendering = Rendering(collection.schema, _RENDERED_ROWS_BYTES)
        self._searches = Searches(collection.metric, search_threads, self._filters, rendering)
        self._files = FileWork(collection, layout, shelf)
        #: Everything of the log up to here is applied, each document at that state or a later one.
        self.position = 0
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._hint = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._written_at_s = time.monotonic()
        #: Why this replica cannot answer, once it cannot.
        self._down: str | None = None
        #: Set once this replica is down for good, as when its log was exchanged: it has to be opened anew.
        self.fell = asyncio.Event()
        self._counts = dict.fromkeys(("offers_applied", "offers_refused", "tail_reads"), 0)

    @classmethod
    async def open(
        cls,
        collection: Collection,
        *,
        directory: Path,
        log_id: str,
        tail: Callable[[int], Awaitable[LogDelta]],
        search_threads: ThreadPoolExecutor,
        memtable_rows: int = 8192,
        poll_ms: int = 500,
        device: str = "cpu",
        tail_rows: int = 4096,
    ) -> "Replica":
        """Recover from the directory, read the log until it is passed, and go on following it.

        `tail(after)` reads the log after a position, at most `tail_rows` rows of it (all slots counted);
        an answer that spans fewer positions than that is known to reach the log's end. Files of another
        log or space are dropped, a damaged segment is set aside, and what is missing is read from the
        log. What `tail` raises while the log is first read, `open` raises.
        """
        devices.resolve(device)
        shelf = Shelf(directory, collection, log_id)

        def recover() -> Layout:
            recovered = shelf.recover()
            return _restored(collection, recovered, memtable_rows)

        layout = await asyncio.to_thread(recover)
        replica = cls(collection, shelf, layout, log_id, tail, search_threads, poll_ms, tail_rows)
        try:
            await replica._catch_up()
            replica._require_up()
        except BaseException:
            await replica.close()
            raise
        replica._following = asyncio.create_task(replica._follow(), name=f"follow {directory.name}")
        return replica

    def offer(self, delta: LogDelta) -> bool:
        """Take a committed batch without reading the log; False where it does not fit on (then read it).

        It fits if it begins where this replica stands. Never waits.
        """
        if self._down is None and delta.log_id == self._log_id and delta.upto <= self.position:
            return True
        fits = (
            self._down is None
            and delta.log_id == self._log_id
            and delta.after == self.position == self._layout.cursor
            and self._files.backlog < _FROZEN_MOST
        )
        if not fits:
            self._counts["offers_refused"] += 1
            self.wake()
            return False
        self._apply(delta, 0, len(delta.rows), delta.upto)
        self._advance()
        self._counts["offers_applied"] += 1
        return True

    def wake(self) -> None:
        """There is something new in the log."""
        self._hint.set()

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether everything up to `position` is applied before the deadline."""
        if position <= self.position:
            return True
        left_s = deadline.left_s()
        if left_s <= 0 or self._down is not None:
            return False
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (position, next(self._order), reached)
        heapq.heappush(self._waiters, waiter)
        try:
            async with asyncio.timeout(left_s):
                await reached
        except TimeoutError:
            return False
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                heapq.heapify(self._waiters)
        return position <= self.position

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool = False,
        effort: Effort = DEFAULT_EFFORT,
        include: Include = Include(),  # noqa: B008 - immutable
        exclude: frozenset[str] = frozenset(),
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[list[Hit]]]:
        """The best k live documents for each query that pass the filter, never one of `exclude`.

        queries: float32 [n, dim], any length; a larger score is better, L2 is minus the squared
        distance, and a zero vector scores 0 under cosine. filter: checked against the schema.
        DimensionMismatch, Overloaded, DeadlineExceeded, Unavailable.
        """
        return self._search(
            queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
            rendered=False, deadline=deadline,
        )  # fmt: skip

    def search_rendered(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool = False,
        effort: Effort = DEFAULT_EFFORT,
        include: Include = Include(),  # noqa: B008 - immutable
        exclude: frozenset[str] = frozenset(),
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[RenderedHits]]:
        """The same as `search`, with the hits as they go on the wire."""
        return self._search(
            queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
            rendered=True, deadline=deadline,
        )  # fmt: skip

    async def count(self, filter: Filter | None) -> int:
        """How many live documents pass the filter."""
        self._require_up()
        if filter is None:
            return self._layout.documents
        return await self._in_thread(lambda snapshot: snapshot.count(filter, self._filters))

    async def matching(self, filter: Filter | None, limit: int) -> list[tuple[str, Version]]:
        """Ids and versions of at most `limit` live documents that pass the filter."""
        self._require_up()
        return await self._in_thread(lambda snapshot: snapshot.matching(filter, limit, self._filters))

    async def vectors(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """The vectors of those documents that are here, float32 [dim], as stored for search; read-only."""
        self._require_up()
        places = self._layout.locate(ids)
        return await self._in_thread(
            lambda _: {id: view.vector_at(row).copy() for id, (view, row) in places.items()}
        )

    async def close(self) -> None:
        """Stop following and searching; a seal that has begun is finished first, a large merge given up.

        Nothing needs to be saved: what lies in no segment is in the log.
        """
        self._down = self._down or "the replica is closing"
        if self._following is not None:
            while not self._following.done():
                # Again and again: asyncio.wait_for of Python 3.11, under the connection pool, may lose one.
                self._following.cancel()
                await asyncio.wait([self._following], timeout=_CANCEL_AGAIN_S)
        self._release_waiters()
        await self._searches.close()
        await self._files.close()

    def describe(self) -> dict[str, float]:
        """What ClusterService.Describe tells of a replica, in figures."""
        return {
            "documents": self._layout.documents,
            "segments": len(self._layout.segments),
            "memtable_rows": self._layout.memtable_rows,
            "pending_rows": self._files.pending_rows,
            "position": self.position,
        }

    def condition(self) -> tuple[str, str]:
        """`serving`, or what else is the matter, and why."""
        return ("serving", "") if self._down is None else ("down", self._down)

    def segments(self) -> list[SegmentStatus]:
        """What this replica's segments are, oldest first."""
        return self._layout.segment_status()

    def stats(self) -> dict[str, float]:
        """Figures for the metrics."""
        segments = self._layout.segments.values()
        return {
            **self.describe(),
            **{f"{name}_total": count for name, count in self._counts.items()},
            **self._files.stats(),
            "segment_bytes": sum(segment.size_bytes for segment in segments),
            "quarantined": self._shelf.quarantined,
            "down": float(self._down is not None),
            "searches_total": self._searches.searches,
            "queries_total": self._searches.queries,
            "batches_total": self._searches.batches,
            "waiting_queries": self._searches.waiting_rows,
            "filter_cache_bytes": self._filters.size_bytes,
            "filter_cache_hits_total": self._filters.hits,
            "filter_cache_misses_total": self._filters.misses,
        }

    def validate_state(self) -> None:
        """AssertionError where what the replica believes contradicts itself."""
        assert self.position <= self._layout.cursor
        self._layout.validate_state()

    # -- following the log

    async def _follow(self) -> None:
        """Read the log whenever there is a hint, and at every poll; outages are sat out."""
        failures = 0
        while self._down is None:
            if failures:
                await asyncio.sleep(min(self._poll_s * 2 ** (failures - 1), _BACKOFF_MOST_S))
            else:
                await self._hint_or_poll()
            self._hint.clear()
            try:
                self._look()
                await self._catch_up()
                failures = 0
            except UnknownLog as error:
                self._fall(str(error))
            except Exception as error:
                known = isinstance(error, RingfortError | OSError)
                if not failures or not known:
                    log.warning("the log of %s cannot be read: %s", self._name, error, exc_info=not known)
                failures = min(failures + 1, 16)

    async def _hint_or_poll(self) -> None:
        try:
            async with asyncio.timeout(self._poll_s):
                await self._hint.wait()
        except TimeoutError:
            pass

    async def _catch_up(self) -> None:
        """Read and apply pages until the log's end is reached."""
        while self._down is None:
            while self._files.backlog >= _FROZEN_MOST:
                self._look()
                await asyncio.sleep(self._poll_s)
            delta = await self._tail(self._layout.cursor)
            self._counts["tail_reads"] += 1
            if delta.log_id != self._log_id or delta.upto < delta.after:
                self._fall(f"the log is {delta.log_id} at {delta.upto} now, it was {self._log_id}")
                return
            # Pushes may have come in while the page was read; they were applied for certain.
            known = self._layout.cursor
            first = next((i for i, row in enumerate(delta.rows) if row.version.seq > known), len(delta.rows))
            for start in range(first, len(delta.rows), _SLICE_ROWS):
                stop = min(start + _SLICE_ROWS, len(delta.rows))
                last = stop == len(delta.rows)
                self._apply(delta, start, stop, delta.upto if last else delta.rows[stop - 1].version.seq)
                if not last:
                    await asyncio.sleep(0)
            self._layout.cursor = max(self._layout.cursor, delta.upto)
            # A page that was cut short may lack a document that has moved on to a later position.
            if delta.upto - delta.after < self._tail_rows:
                self._advance()
                return

    def _apply(self, delta: LogDelta, start: int, stop: int, upto: int) -> None:
        self._written_at_s = time.monotonic()
        frozen = self._layout.apply(delta.rows[start:stop], delta.vectors[start:stop], upto)
        for number in frozen:
            self._files.froze(number)

    def _look(self) -> None:
        self._files.look(time.monotonic() - self._written_at_s)

    def _advance(self) -> None:
        """The log is applied up to the cursor, for certain."""
        self.position = self._layout.cursor
        while self._waiters and self._waiters[0][0] <= self.position:
            _, _, reached = heapq.heappop(self._waiters)
            if not reached.done():
                reached.set_result(None)

    def _fall(self, why: str) -> None:
        """Stop answering for good: this replica has to be opened anew."""
        log.error("replica of %s is down: %s", self._name, why)
        self._down = why
        self.fell.set()
        self._release_waiters()

    def _release_waiters(self) -> None:
        for _, _, reached in self._waiters:
            if not reached.done():
                reached.set_result(None)
        self._waiters.clear()

    # -- answering

    def _require_up(self) -> None:
        if self._down is not None:
            raise Unavailable(f"the replica of {self._name} is down: {self._down}")

    async def _search(
        self, queries: np.ndarray, k: int, *, deadline: Deadline, **options: Any
    ) -> ShardAnswer[Any]:
        began = time.perf_counter()
        self._require_up()
        if queries.shape[1] != self._collection.dim:
            raise DimensionMismatch("query", queries.shape[1], self._collection.dim)
        snapshot = self._snapshot()
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        hits = await self._searches.search(snapshot, queries, k, deadline=deadline, **options)
        return ShardAnswer(snapshot.position, hits, (time.perf_counter() - began) * 1e3)

    def _snapshot(self) -> Snapshot:
        return self._layout.snapshot(self.position)

    async def _in_thread(self, read: Callable[[Snapshot], T]) -> T:
        """Run a read of the present snapshot in a search thread."""
        snapshot = self._snapshot()
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, snapshot)

    @property
    def _name(self) -> str:
        return f"{self._collection.name} ({self._shelf.directory.name})"


def _restored(collection: Collection, recovered: Recovered, memtable_rows: int) -> Layout:
    """The layout that the recovered files make."""
    layout = Layout(collection.dim, collection.metric, collection.schema, memtable_rows, recovered.position)
    for segment, dead in recovered.segments:
        layout.restore(segment, dead)
    return layout
