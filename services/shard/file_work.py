"""Carries out what state.py decides: seals memtables, merges segments, publishes manifests.

Seals run in a thread of their own, for what they write is in memory only; large merges run in a child
process, which reads files and may be given up at any time.
"""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from index_builder.segments.compaction import Policy
from index_builder.segments.contents import Draft
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.merge import merge, merge_in_child
from index_builder.segments.segment import Segment
from services.shard.layout import Layout
from services.shard.memtable import Memtable
from services.shard.shelf import Shelf
from services.shard.state import (
    QUIET_ROWS,
    Done,
    Event,
    Failed,
    FileState,
    Freeze,
    Froze,
    Looked,
    Rewrite,
    Seal,
    Work,
)
from shard_router.errors import SegmentCorrupt
from shard_router.model import Collection

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Merges of so many rows are worth a process of their own.
CHILD_ROWS = 16_384
#: The interpreter is left to others for so long between two pieces of a seal.
_PAUSE_S = 0.002
#: What a full disk says.
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Overtaken(Exception):
    """A source was found damaged and set aside meanwhile."""


class FileWork:
    """Keeps a layout's files. Belongs to the event loop."""

    def __init__(
        self,
        collection: Collection,
        layout: Layout,
        shelf: Shelf,
        policy: Policy,
        child_rows: int,
        on_corrupt: Callable[[str, str], None],
    ) -> None:
        """child_rows: merges of so many run in a process of their own.

        `on_corrupt` is told the name of a segment that a merge found damaged, and how.
        """
        self._collection, self._layout, self._shelf = collection, layout, shelf
        self._policy, self._child_rows, self._on_corrupt = policy, child_rows, on_corrupt
        self._state = FileState(policy)
        self._thread = ThreadPoolExecutor(1, "segments")
        self._tasks: dict[asyncio.Task[None], Work] = {}
        #: The work that is a child process.
        self._child: asyncio.Task[None] | None = None
        #: A manifest is made, published and believed by one at a time.
        self._swapping = asyncio.Lock()
        self._closing = False
        #: Why nothing can be written; None while the disk has room.
        self.disk_full: str | None = None
        self._seals = self._rewrites = self._failures = 0

    @property
    def backlog(self) -> int:
        """Frozen memtables that lie in no segment yet."""
        return len(self._state.frozen)

    @property
    def left_segments(self) -> int:
        """Segments that could not be rewritten, and are searched as they are until the next start."""
        return len(self._state.left & self._layout.segments.keys())

    @property
    def pending_rows(self) -> int:
        """Rows that wait to be sealed, merged or indexed."""
        waiting = sum(self._layout.part(number).rows for number in self._state.frozen)
        if self._layout.open_rows >= QUIET_ROWS:
            waiting += self._layout.open_rows
        return waiting + self._state.debt(self._layout.facts())

    def froze(self, number: int) -> None:
        """A memtable filled up: have it sealed."""
        self._handle(Froze(number))

    def look(self, quiet_s: float) -> None:
        """Begin what is due; quiet_s: how long nothing has been written. To be called now and then."""
        self._handle(Looked(self._layout.facts(), self._layout.open_rows, quiet_s))

    async def close(self) -> None:
        """Begin nothing more; a seal under way is finished, a child process ended."""
        self._closing = True
        while self._tasks:
            if self._child is not None:
                self._child.cancel()
            await asyncio.wait(list(self._tasks))
        self._thread.shutdown()

    def stats(self) -> dict[str, float]:
        """Figures for the metrics."""
        return {
            "frozen_memtables": self.backlog,
            "merging": float(self._child is not None),
            "disk_full": float(self.disk_full is not None),
            "left_segments": self.left_segments,
            "seals_total": self._seals,
            "rewrites_total": self._rewrites,
            "file_failures_total": self._failures,
        }

    def _handle(self, event: Event) -> None:
        """Tell the state machine, and begin what it says."""
        for instruction in self._state.handle(event, time.monotonic()):
            if isinstance(instruction, Freeze):
                self._handle(Froze(self._layout.freeze(), filled=False))
            elif not self._closing:
                task = asyncio.create_task(self._carry_out(instruction), name=f"{instruction}")
                self._tasks[task] = instruction
                task.add_done_callback(self._tasks.pop)

    async def _carry_out(self, work: Work) -> None:
        try:
            match work:
                case Seal(number):
                    await self._seal(number)
                case Rewrite(numbers, kind):
                    await self._rewrite(numbers, kind)
            self.disk_full = None
            event: Event = Done(work, self._layout.facts())
        except _Overtaken:
            event = Done(work, self._layout.facts())
        except Exception as error:
            event = Failed(work, for_room=self._failed(work, error))
        self._handle(event)

    def _failed(self, work: Work, error: Exception) -> bool:
        """Tell why; whether it was for want of room."""
        if isinstance(error, SegmentCorrupt):
            if not self._closing:
                self._on_corrupt(os.path.basename(error.path), error.why)
            return False
        self._failures += 1
        known = isinstance(error, OSError)
        directory = self._shelf.directory
        log.error("%s in %s failed, tried again later: %s", work, directory, error, exc_info=not known)
        if isinstance(error, OSError) and error.errno in _FULL:
            self.disk_full = f"no room in {directory}: {error.strerror}"
            return True
        return False

    async def _seal(self, number: int) -> None:
        memtable = self._layout.part(number).body
        assert isinstance(memtable, Memtable)
        rows = self._layout.live_rows(number)
        path = self._shelf.new_segment()
        collection = self._collection

        def write() -> Segment | None:
            if not len(rows):
                return None
            picked = [memtable.rows[row] for row in rows.tolist()]
            return Segment.write_draft(
                path,
                Draft.of(picked, collection.schema, lambda: time.sleep(_PAUSE_S)),
                [memtable.vectors[rows]],
                collection.metric,
                collection.schema,
                covers=(memtable.after, memtable.upto),
                device=self._policy.device,
            )

        await self._swap({number: rows}, await self._in_thread(write), IndexKind.FLAT)
        self._seals += 1

    async def _rewrite(self, numbers: Sequence[int], kind: IndexKind) -> None:
        if not self._layout.has(numbers):
            raise _Overtaken
        parts = {number: self._layout.segments[number] for number in numbers}
        picks = {number: self._layout.live_rows(number) for number in numbers}
        path = self._shelf.new_segment()
        sources = [(segment, picks[number]) for number, segment in parts.items()]
        schema, device = self._collection.schema, self._policy.device
        if sum(len(rows) for rows in picks.values()) >= self._child_rows:
            self._child = asyncio.current_task()
            try:
                segment = await merge_in_child(path, sources, schema, kind, device)
            finally:
                self._child = None
        else:
            segment = await self._in_thread(lambda: merge(path, sources, schema, kind, device))
        if segment is not None and segment.kind is not kind:
            log.warning(
                "an index of kind %s finds too little of %s; it is %s", kind, segment.name, segment.kind
            )
        await self._swap(picks, segment, kind)
        await self._in_thread(lambda: self._shelf.drop([segment.name for segment in parts.values()]))
        self._rewrites += 1

    async def set_aside(self, name: str, lost: Callable[[tuple[int, int]], None]) -> None:
        """Search a damaged segment no more, and keep its files for people to look at.

        `lost` is told at that moment which positions (after, upto] its documents came from.
        """
        async with self._swapping:
            covers = self._layout.lose(name)
            if covers is None:
                return
            lost(covers)
            try:
                await self._in_thread(lambda: self._shelf.quarantine(name))
            except OSError as error:
                log.error("segment %s cannot be moved out of the way: %s", name, error)

    async def _swap(self, picks: Mapping[int, np.ndarray], segment: Segment | None, kind: IndexKind) -> None:
        """Publish the segment of these rows, and only then search it in place of its sources."""
        try:
            async with self._swapping:
                if not self._layout.has(picks):
                    raise _Overtaken
                entries, position, slots = self._layout.sealed(picks, segment, kind)
                await self._in_thread(lambda: self._shelf.publish(position, entries, slots))
                self._layout.replace(picks, segment, kind)
        except (OSError, _Overtaken):
            if segment is not None:
                await self._in_thread(lambda: self._shelf.drop([segment.name]))
            raise
        if segment is not None:
            segment.release_vectors()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
