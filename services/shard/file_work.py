"""Carries out what state.py decides: seals memtables, merges segments, publishes manifests.

Seals run in a thread of their own, for what they write is in memory only; large merges run in a child
process, which reads files and may be given up at any time.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from index_builder.segments import compaction
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
)
from shard_router.model import Collection

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Merges of so many rows are worth a process of their own.
_CHILD_ROWS = 16_384


class FileWork:
    """Keeps a layout's files; one piece of work at a time. Belongs to the event loop."""

    def __init__(self, collection: Collection, layout: Layout, shelf: Shelf) -> None:
        self._collection, self._layout, self._shelf = collection, layout, shelf
        self._state = FileState()
        self._thread = ThreadPoolExecutor(1, "segments")
        self._work: asyncio.Task[None] | None = None
        #: Whether the work is a child process.
        self._merging = False
        self._closing = False
        self._seals = self._rewrites = self._failures = 0

    @property
    def backlog(self) -> int:
        """Frozen memtables that lie in no segment yet."""
        return len(self._state.frozen)

    @property
    def pending_rows(self) -> int:
        """Rows that wait to be sealed or rewritten."""
        waiting = sum(self._layout.part(number).rows for number in self._state.frozen)
        if self._layout.open_rows >= QUIET_ROWS:
            waiting += self._layout.open_rows
        return waiting + compaction.debt(self._layout.facts())

    def froze(self, number: int) -> None:
        """A memtable filled up: have it sealed."""
        self._handle(Froze(number))

    def look(self, quiet_s: float) -> None:
        """Begin what is due; quiet_s: how long nothing has been written. To be called now and then."""
        self._handle(Looked(self._layout.facts(), self._layout.open_rows, quiet_s))

    async def close(self) -> None:
        """Begin nothing more; a seal under way is finished, a child process ended."""
        self._closing = True
        while self._work is not None:
            if self._merging:
                self._work.cancel()
            await asyncio.wait([self._work])
        self._thread.shutdown()

    def stats(self) -> dict[str, float]:
        """Figures for the metrics."""
        return {
            "frozen_memtables": self.backlog,
            "merging": float(self._merging),
            "seals_total": self._seals,
            "rewrites_total": self._rewrites,
            "file_failures_total": self._failures,
        }

    def _handle(self, event: Event) -> None:
        """Tell the state machine, and begin what it says."""
        instruction = self._state.handle(event, time.monotonic())
        if isinstance(instruction, Freeze):
            self._handle(Froze(self._layout.freeze()))
        elif instruction is not None and not self._closing:
            self._work = asyncio.create_task(self._carry_out(instruction), name=f"{instruction}")

    async def _carry_out(self, instruction: Seal | Rewrite) -> None:
        try:
            match instruction:
                case Seal(number):
                    await self._seal(number)
                case Rewrite(numbers):
                    await self._rewrite(numbers)
            event: Event = Done(self._layout.facts())
        except Exception as error:
            self._failures += 1
            log.error(
                "%s in %s failed and will be tried again: %s",
                instruction,
                self._shelf.directory,
                error,
                exc_info=not isinstance(error, OSError),
            )
            event = Failed()
        finally:
            self._work = None
        self._handle(event)

    async def _seal(self, number: int) -> None:
        memtable = self._layout.part(number).body
        assert isinstance(memtable, Memtable)
        rows = self._layout.live_rows(number)
        path = self._shelf.new_segment()
        collection = self._collection

        def write() -> Segment | None:
            if not len(rows):
                return None
            return Segment.write(
                path,
                [memtable.rows[row] for row in rows.tolist()],
                memtable.vectors[rows],
                collection.metric,
                collection.schema,
                covers=(memtable.after, memtable.rows[-1].version.seq),
            )

        await self._swap({number: rows}, await self._in_thread(write))
        self._seals += 1

    async def _rewrite(self, numbers: Sequence[int]) -> None:
        parts = {number: self._layout.segments[number] for number in numbers}
        picks = {number: self._layout.live_rows(number) for number in numbers}
        path = self._shelf.new_segment()
        sources = [(segment, picks[number]) for number, segment in parts.items()]
        schema = self._collection.schema
        if sum(len(rows) for rows in picks.values()) >= _CHILD_ROWS:
            self._merging = True
            try:
                segment = await merge_in_child(path, sources, schema)
            finally:
                self._merging = False
        else:
            segment = await self._in_thread(lambda: merge(path, sources, schema))
        await self._swap(picks, segment)
        await self._in_thread(lambda: self._shelf.drop([segment.name for segment in parts.values()]))
        self._rewrites += 1

    async def _swap(self, picks: Mapping[int, np.ndarray], segment: Segment | None) -> None:
        """Publish the segment of these rows, and only then search it in place of its sources."""
        entries, position = self._layout.sealed(picks, segment)
        try:
            await self._in_thread(lambda: self._shelf.publish(position, entries))
        except OSError:
            if segment is not None:
                await self._in_thread(lambda: self._shelf.drop([segment.name]))
            raise
        self._layout.replace(picks, segment)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
