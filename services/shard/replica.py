"""One replica of a shard: follows the log, answers searches, and can be thrown away at any time.

Everything runs on the event loop, except searches (searches.py: the search threads) and files
(file_work.py and verification.py: threads of their own, or a child process).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from index_builder.segments import device as devices
from index_builder.segments.compaction import Policy
from index_builder.segments.index_spec import DEFAULT_EFFORT, GRAPH_ROWS, Effort
from services.deadline import Deadline
from services.shard.file_work import CHILD_ROWS, FileWork
from services.shard.filter_cache import FilterCache
from services.shard.follower import Follower, Tail
from services.shard.holdings import Holdings
from services.shard.layout import Layout, SegmentStatus
from services.shard.rendering import RenderedHits, Rendering
from services.shard.searches import Searches
from services.shard.shelf import Recovered, Shelf
from services.shard.verification import Verification
from services.shard.views import Snapshot
from shard_router.errors import DimensionMismatch, Unavailable
from shard_router.filters import Filter
from shard_router.model import Collection, Hit, Include, LogDelta, Version

__all__ = ["Hits", "Replica", "ShardAnswer", "Tail"]

log = logging.getLogger(__name__)

T = TypeVar("T")
#: One query's hits: values, or as they go on the wire.
Hits = TypeVar("Hits", list[Hit], RenderedHits)

_FILTER_CACHE_BYTES = 32 << 20
_RENDERED_ROWS_BYTES = 8 << 20


class ShardAnswer(NamedTuple, Generic[Hits]):
    """The hits of each query, best first, as of `position` or later.

    Not `complete` while documents are missing, for their segment was damaged.
    """

    position: int
    hits: list[Hits]
    took_ms: float
    complete: bool


class Replica:
    """A view of one shard of a collection, as far as its log was read."""

    #: Where it runs, as people are told.
    endpoint = "in-process"

    def __init__(
        self,
        collection: Collection,
        shelf: Shelf,
        layout: Layout,
        holdings: Holdings,
        log_id: str,
        tail: Tail,
        search_threads: ThreadPoolExecutor,
        recovered: Recovered,
        *,
        poll_ms: int,
        tail_rows: int,
        policy: Policy,
        child_rows: int,
    ) -> None:
        """Use `open`; this only puts the parts together."""
        self._collection, self._shelf, self._layout = collection, shelf, layout
        self._holdings = holdings
        self._threads = search_threads
        self._filters = FilterCache(_FILTER_CACHE_BYTES)
        rendering = Rendering(collection.schema, _RENDERED_ROWS_BYTES)
        self._searches = Searches(collection.metric, search_threads, self._filters, rendering)
        self._files = FileWork(collection, layout, shelf, policy, child_rows, self._lose)
        self._follower = Follower(
            self._name, layout, self._files, log_id, tail, holdings,
            poll_ms=poll_ms, tail_rows=tail_rows, missing=recovered.missing,
        )  # fmt: skip
        self._verification = Verification([segment for segment, _, _ in recovered.segments], self._lose)
        #: Damaged segments that are being set aside.
        self._losing: set[asyncio.Task[None]] = set()
        #: Set once this replica is down for good, as when its log was exchanged: it has to be opened anew.
        self.fell = self._follower.fell

    @classmethod
    async def open(
        cls,
        collection: Collection,
        *,
        directory: Path,
        log_id: str,
        tail: Tail,
        slots: Iterable[int] | None = None,
        epoch: int = 1,
        search_threads: ThreadPoolExecutor,
        memtable_rows: int = 8192,
        poll_ms: int = 500,
        device: str = "cpu",
        tail_rows: int = 4096,
        graph_rows: int = GRAPH_ROWS,
        child_rows: int = CHILD_ROWS,
    ) -> "Replica":
        """Recover from the directory, read the log until it is passed, and go on following it.

        `tail(after, slots)` reads the log after a position, at most `tail_rows` rows of it; an answer that
        spans fewer positions than that is known to reach the log's end. The replica has these slots (all,
        where none are named) and answers for them at `epoch`; what its files lack of them is read, too.
        Files of another log or space are dropped, a damaged segment is set aside, and what is missing is
        read from the log. What `tail` raises while the log is first read, `open` raises.
        """
        policy = Policy(collection.index, collection.dim, devices.resolve(device), graph_rows)
        shelf = Shelf(directory, collection, log_id, policy.device)
        recovered = await asyncio.to_thread(shelf.recover)
        wanted = list(range(collection.slots) if slots is None else slots)
        known = recovered.slots
        if known is None:  # nothing there, or written before anything could move
            known = wanted if epoch == 1 or not recovered.position else ()
        holdings = Holdings(collection.slots, set(wanted) & set(known), epoch)
        layout = _restored(collection, recovered, memtable_rows, holdings)
        replica = cls(
            collection, shelf, layout, holdings, log_id, tail, search_threads, recovered,
            poll_ms=poll_ms, tail_rows=tail_rows, policy=policy, child_rows=child_rows,
        )  # fmt: skip
        try:
            await replica._follower.start()
            replica._require_up()
            await replica.backfill(wanted)
            await replica.serve(epoch, wanted)
            replica._verification.start()
        except BaseException:
            await replica.close()
            raise
        return replica

    @property
    def position(self) -> int:
        """Everything of the log up to here is applied, each document at that state or a later one."""
        return self._follower.position

    async def backfill(self, slots: Sequence[int]) -> None:
        """Follow these slots too, unseen by searches; returns when all of their documents are here.

        Raises what reading the log raises, and Unavailable; it may be asked again, and goes on from there.
        """
        await self._follower.backfill(slots)

    def followed(self) -> frozenset[int]:
        """The slots whose writes are applied here."""
        return frozenset(np.flatnonzero(self._holdings.followed).tolist())

    async def serve(self, epoch: int, slots: Sequence[int]) -> None:
        """Answer for exactly these slots from that epoch of the shard map on; done at once.

        ValueError where not all of them are here.
        """
        self._layout.serve(epoch, slots)

    async def release(self, slots: Sequence[int]) -> None:
        """Follow these slots no more, and drop their documents; done at once."""
        self._layout.release(slots)

    def offer(self, delta: LogDelta) -> bool:
        """Take a committed batch without reading the log; False where it does not fit on (then read it).

        It fits if it begins where this replica stands. Never waits.
        """
        return self._follower.offer(delta)

    def wake(self) -> None:
        """There is something new in the log."""
        self._follower.wake()

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether everything up to `position` is applied before the deadline."""
        return await self._follower.wait_for(position, deadline)

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
        epoch: int | None = None,
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[list[Hit]]]:
        """The best k live documents for each query that pass the filter, never one of `exclude`.

        queries: float32 [n, dim], any length; a larger score is better, L2 is minus the squared
        distance, and a zero vector scores 0 under cosine. filter: checked against the schema. epoch: of the
        shard map by which this replica is asked; StaleEpoch where its slots were others then.
        DimensionMismatch, Overloaded, DeadlineExceeded, Unavailable.
        """
        return self._search(
            queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
            epoch=epoch, rendered=False, deadline=deadline,
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
        epoch: int | None = None,
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[RenderedHits]]:
        """The same as `search`, with the hits as they go on the wire."""
        return self._search(
            queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
            epoch=epoch, rendered=True, deadline=deadline,
        )  # fmt: skip

    async def count(self, filter: Filter | None, *, epoch: int | None = None) -> int:
        """How many live documents pass the filter; Unavailable while documents are missing, StaleEpoch."""
        self._require_whole(epoch)
        if filter is None:
            return self._layout.documents
        return await self._in_thread(lambda snapshot: snapshot.count(filter, self._filters))

    async def matching(
        self, filter: Filter | None, limit: int, *, epoch: int | None = None
    ) -> list[tuple[str, Version]]:
        """Ids and versions of at most `limit` live documents that pass the filter; errors as of `count`."""
        self._require_whole(epoch)
        return await self._in_thread(lambda snapshot: snapshot.matching(filter, limit, self._filters))

    async def vectors(self, ids: Sequence[str], *, epoch: int | None = None) -> dict[str, np.ndarray]:
        """The vectors of those documents that are here, float32 [dim], as stored for search; read-only.

        Unavailable where one is not while documents are missing; StaleEpoch.
        """
        self._require_up()
        self._holdings.require(epoch)
        places = self._layout.locate(ids)
        if len(places) < len(set(ids)):
            self._require_whole(epoch)
        return await self._in_thread(
            lambda _: {id: view.vector_at(row).copy() for id, (view, row) in places.items()}
        )

    async def close(self) -> None:
        """Stop following and searching; a seal that has begun is finished first, a large merge given up.

        Nothing needs to be saved: what lies in no segment is in the log.
        """
        self._follower.fall("the replica is closing")
        await self._follower.close()
        await self._verification.close()
        await self._searches.close()
        if self._losing:
            await asyncio.wait(self._losing)
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
        if self._follower.down is not None:
            return "down", self._follower.down
        if not self._whole:
            missing = self._follower.missing_positions
            return "repairing", f"a segment was damaged; {missing} positions of the log are read again"
        if self._files.disk_full is not None:
            return "disk_full", self._files.disk_full
        if left := self._files.left_segments:
            return (
                "unmerged",
                f"{left} segments could not be rewritten and are searched as they are; see the log",
            )
        return "serving", ""

    def segments(self) -> list[SegmentStatus]:
        """What this replica's segments are, oldest first."""
        return self._layout.segment_status()

    def stats(self) -> dict[str, float]:
        """Figures for the metrics."""
        segments = self._layout.segments.values()
        return {
            **self.describe(),
            **self._follower.stats(),
            **self._files.stats(),
            "unverified_bytes": self._verification.unverified_bytes,
            "segment_bytes": sum(segment.size_bytes for segment in segments),
            "quarantined": self._shelf.quarantined,
            "down": float(self._follower.down is not None),
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
        assert self._follower.position <= self._layout.cursor
        self._layout.validate_state()

    def _lose(self, name: str, why: str) -> None:
        """A segment is damaged: search it no more, and have what it held read again."""
        if all(segment.name != name for segment in self._layout.segments.values()):
            return  # rewritten meanwhile
        log.error("segment %s of %s is damaged, its documents come from the log: %s", name, self._name, why)
        task = asyncio.create_task(
            self._files.set_aside(name, self._follower.recall), name=f"set aside {name}"
        )
        self._losing.add(task)
        task.add_done_callback(self._lost)

    def _lost(self, task: asyncio.Task[None]) -> None:
        self._losing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._follower.fall(f"a damaged segment cannot be set aside: {error}")

    def _require_up(self) -> None:
        if self._follower.down is not None:
            raise Unavailable(f"the replica of {self._name} is down: {self._follower.down}")

    @property
    def _whole(self) -> bool:
        """Whether no document is missing for its segment was damaged, or about to be."""
        return not self._losing and not self._follower.missing_positions

    def _require_whole(self, epoch: int | None) -> None:
        self._require_up()
        self._holdings.require(epoch)
        if not self._whole:
            raise Unavailable(f"the replica of {self._name} is reading documents again that it lost")

    async def _search(
        self, queries: np.ndarray, k: int, *, epoch: int | None, deadline: Deadline, **options: Any
    ) -> ShardAnswer[Any]:
        began = time.perf_counter()
        self._require_up()
        self._holdings.require(epoch)
        if queries.shape[1] != self._collection.dim:
            raise DimensionMismatch("query", queries.shape[1], self._collection.dim)
        snapshot, complete = self._snapshot(), self._whole
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        hits = await self._searches.search(snapshot, queries, k, deadline=deadline, **options)
        return ShardAnswer(snapshot.position, hits, (time.perf_counter() - began) * 1e3, complete)

    def _snapshot(self) -> Snapshot:
        return self._layout.snapshot(self.position)

    async def _in_thread(self, read: Callable[[Snapshot], T]) -> T:
        """Run a read of the present snapshot in a search thread."""
        snapshot = self._snapshot()
        return await asyncio.get_running_loop().run_in_executor(self._threads, read, snapshot)

    @property
    def _name(self) -> str:
        return f"{self._collection.name} ({self._shelf.directory.name})"


def _restored(collection: Collection, recovered: Recovered, memtable_rows: int, holdings: Holdings) -> Layout:
    """The layout that the recovered files make, as far as they are of slots that are followed."""
    layout = Layout(
        collection.dim, collection.metric, collection.schema, memtable_rows, recovered.position, holdings
    )
    for segment, dead, kind in recovered.segments:
        layout.restore(segment, dead, kind)
    if not holdings.follows_all:
        layout.drop_strangers()
    return layout
