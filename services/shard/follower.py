"""Follows a shard's log: from pushes (`offer`), hints (`wake`) and a slow poll. Belongs to the event loop."""

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from services import tasks
from services.deadline import Deadline
from services.shard.file_work import FileWork
from services.shard.holdings import Holdings
from services.shard.layout import Layout
from shard_router.errors import LogPurged, RingfortError, Unavailable, UnknownLog
from shard_router.model import LogDelta

log = logging.getLogger(__name__)

#: Log rows applied before the event loop gets its turn.
_SLICE_ROWS = 128
#: Rows of a page while slots move, and for how many times as long as that took nothing is read then: searches
#: go on meanwhile, on the same processors, and nobody waits for the move. What is written since it began is
#: run after with whole pages and without a rest, or fast writers would outrun it.
_MOVED_ROWS, _MOVING_REST = 128, 3.0
#: Frozen memtables in memory, at most: when their files cannot be written, the replica falls behind.
_FROZEN_MOST = 8
#: Slowest retry of a log that cannot be read.
_BACKOFF_MOST_S = 5.0


class Tail(Protocol):
    """Reads a page of the log after a position: of some slots only, and fewer rows, where those are given."""

    def __call__(
        self, after: int, slots: Sequence[int] | None = None, rows: int | None = None
    ) -> Awaitable[LogDelta]: ...


class Follower:
    """Applies the log to a layout, and knows how far that is certain."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        files: FileWork,
        log_id: str,
        tail: Tail,
        holdings: Holdings,
        *,
        poll_ms: int,
        tail_rows: int,
        missing: Sequence[tuple[int, int]],
    ) -> None:
        """missing: spans (after, upto] of the log whose documents the layout has lost."""
        self._name, self._layout, self._files = name, layout, files
        self._log_id, self._tail, self._tail_rows = log_id, tail, tail_rows
        self._holdings = holdings
        self._poll_s = poll_ms / 1e3
        #: Everything of the log up to here is applied, each document at that state or a later one.
        self.position = 0
        #: Why nothing more can be applied, once that is so.
        self.down: str | None = None
        #: Set with `down`.
        self.fell = asyncio.Event()
        self._missing: list[tuple[int, int]] = []
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._hint = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._written_at_s = self._read_at_s = time.monotonic()
        self._counts = dict.fromkeys(
            ("offers_applied", "offers_refused", "tail_reads", "recalled_rows", "backfilled_rows"), 0
        )
        for span in missing:
            self.recall(span)

    async def start(self) -> None:
        """Read the log until it is passed, and go on following it; raises what reading it raises."""
        await self._catch_up()
        await self._recall()
        if self.down is None:
            self._following = asyncio.create_task(self._follow(), name=f"follow {self._name}")

    @property
    def missing_positions(self) -> int:
        """Positions of the log still to be read again; while there are any, documents are missing."""
        return sum(upto - after for after, upto in self._missing)

    def offer(self, delta: LogDelta) -> bool:
        """Take a committed batch without reading the log; False where it does not fit on (then read it).

        It fits if it begins where this replica stands. Never waits.
        """
        known = self.down is None and delta.log_id == self._log_id
        if known and delta.upto <= self.position:
            return True
        fits = (
            known
            and delta.after == self.position == self._layout.cursor
            and self._files.backlog < _FROZEN_MOST
        )
        if not fits:
            self._counts["offers_refused"] += 1
            self.wake()
            return False
        delta = _slice_of(delta, self._holdings)
        self._apply(delta, 0, len(delta.rows), delta.upto)
        self._advance()
        self._counts["offers_applied"] += 1
        return True

    def wake(self) -> None:
        """There is something new in the log."""
        self._hint.set()

    def recall(self, span: tuple[int, int]) -> None:
        """The documents of these positions, (after, upto], were lost: read them again."""
        self._missing.append(span)
        self._layout.recalling(after for after, _ in self._missing)
        self.wake()

    async def backfill(self, slots: Sequence[int]) -> None:
        """Follow these slots too; returns when all their documents are here. What reading raises, this does.

        Pages may be cut short, and documents move between them, but only to where a later page finds them.
        """
        slots = self._holdings.follow(slots)
        if not slots:
            return
        begun, stood_at = self._holdings.changes, self._layout.cursor
        after, ends = 0, False
        self._layout.backfilling(1)
        page_rows = min(_MOVED_ROWS, self._tail_rows)
        try:
            # To the log's end, and not only up to where it is followed: a document that has moved on is found
            # there, and would be missed until it is.
            while not ends:
                began_s = time.monotonic()
                try:
                    delta = await self._read(after, slots, page_rows)
                except LogPurged:
                    # Of what is read from 0 on, no delete can be missed: see Layout.backfill.
                    after = 0
                    continue
                if delta is None:
                    raise Unavailable(f"the replica of {self._name} is down: {self.down}")
                if not self._holdings.kept(slots, begun):
                    # They were dropped, with what was read of them; who wants them again reads them again.
                    return
                for start in range(0, len(delta.rows), _SLICE_ROWS):
                    rows = delta.rows[start : start + _SLICE_ROWS]
                    vectors = delta.vectors[start : start + _SLICE_ROWS]
                    self._froze(self._layout.backfill(rows, vectors, after))
                    after = rows[-1].version.seq
                    await asyncio.sleep(0)
                    if not self._holdings.kept(slots, begun):
                        return
                self._counts["backfilled_rows"] += len(delta.rows)
                ends = delta.upto - delta.after < page_rows
                after = delta.upto
                if after < stood_at:
                    await asyncio.sleep(_MOVING_REST * (time.monotonic() - began_s))
                else:
                    page_rows = self._tail_rows
            self._holdings.complete(slots)
        finally:
            self._layout.backfilling(-1)

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether everything up to `position` is applied before the deadline."""
        if position <= self.position:
            return True
        left_s = deadline.left_s()
        if left_s <= 0 or self.down is not None:
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

    def fall(self, why: str) -> None:
        """Apply nothing more, ever."""
        self.down = self.down or why
        self.fell.set()
        for _, _, reached in self._waiters:
            if not reached.done():
                reached.set_result(None)
        self._waiters.clear()

    async def close(self) -> None:
        """Stop following."""
        await tasks.end(self._following)

    def stats(self) -> dict[str, float]:
        """Figures for the metrics."""
        return {
            **{f"{name}_total": count for name, count in self._counts.items()},
            "missing_positions": self.missing_positions,
            "tail_age_s": time.monotonic() - self._read_at_s,
        }

    async def _follow(self) -> None:
        """Read the log whenever there is a hint, and at every poll; outages are sat out."""
        failures = 0
        while self.down is None:
            if failures:
                await asyncio.sleep(min(self._poll_s * 2 ** (failures - 1), _BACKOFF_MOST_S))
            else:
                await self._hint_or_poll()
            self._hint.clear()
            try:
                self._look()
                await self._catch_up()
                await self._recall()
                failures = 0
            except UnknownLog as error:
                log.error("the replica of %s is down: %s", self._name, error)
                self.fall(str(error))
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
        while True:
            changes = self._holdings.changes
            delta = await self._read(self._layout.cursor, self._holdings.slots_followed())
            if delta is None:
                return
            if changes != self._holdings.changes:
                continue  # it may lack rows that are wanted now
            # Pushes may have come in while the page was read; they were applied for certain.
            known = self._layout.cursor
            first = next((i for i, row in enumerate(delta.rows) if row.version.seq > known), len(delta.rows))
            for start in range(first, len(delta.rows), _SLICE_ROWS):
                stop = min(start + _SLICE_ROWS, len(delta.rows))
                last = stop == len(delta.rows)
                self._apply(delta, start, stop, delta.upto if last else delta.rows[stop - 1].version.seq)
                if not last:
                    await asyncio.sleep(0)
                    if changes != self._holdings.changes:
                        break
            if changes != self._holdings.changes:
                continue
            self._layout.cursor = max(self._layout.cursor, delta.upto)
            # A page that was cut short may lack a document that has moved on to a later position.
            if delta.upto - delta.after < self._tail_rows:
                self._advance()
                return

    async def _recall(self) -> None:
        """Read pages of what is missing, and take in what of them is not here."""
        while self._missing:
            after, upto = self._missing[0]
            changes = self._holdings.changes
            try:
                delta = await self._read(after, self._holdings.slots_followed())
            except UnknownLog:
                if not after:
                    raise
                # Deletes from there on are forgotten. None is needed here, but only 0 is read without them.
                self._missing[0] = (0, upto)
                continue
            if delta is None:
                return
            if changes != self._holdings.changes:
                # Slots given up since may have been written to unseen; what was read of them is old.
                continue
            rows = [row for row in delta.rows if row.version.seq <= upto]
            first = after
            for start in range(0, len(rows), _SLICE_ROWS):
                slice_rows = rows[start : start + _SLICE_ROWS]
                vectors = delta.vectors[start : start + _SLICE_ROWS]
                self._froze(self._layout.recall(slice_rows, vectors, first))
                first = slice_rows[-1].version.seq
                await asyncio.sleep(0)
                if changes != self._holdings.changes:
                    break
            if changes != self._holdings.changes:
                continue
            self._counts["recalled_rows"] += len(rows)
            left = [(delta.upto, upto)] if after < delta.upto < upto else []
            if not left or self._hint.is_set():
                # A document that has moved on is found where it is now; it is missing until that is read.
                self._hint.clear()
                await self._catch_up()
            self._missing[:1] = left
            self._layout.recalling(after for after, _ in self._missing)
            if not self._missing:
                log.info("%s has all its documents again", self._name)

    async def _read(
        self, after: int, slots: Sequence[int] | None, rows: int | None = None
    ) -> LogDelta | None:
        """A page of the log, once there is room for it; None, and no more ever, where it was exchanged."""
        while self.down is None and self._files.backlog >= _FROZEN_MOST:
            self._look()
            await asyncio.sleep(self._poll_s)
        if self.down is not None:
            return None
        delta = await (self._tail(after) if slots is None else self._tail(after, slots, rows))
        self._read_at_s = time.monotonic()
        self._counts["tail_reads"] += 1
        if delta.log_id != self._log_id or delta.upto < delta.after:
            why = f"the log is {delta.log_id} at {delta.upto} now, it was {self._log_id}"
            log.error("the replica of %s is down: %s", self._name, why)
            self.fall(why)
            return None
        return delta

    def _apply(self, delta: LogDelta, start: int, stop: int, upto: int) -> None:
        self._written_at_s = time.monotonic()
        self._froze(self._layout.apply(delta.rows[start:stop], delta.vectors[start:stop], upto))

    def _froze(self, numbers: Sequence[int]) -> None:
        for number in numbers:
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


def _slice_of(delta: LogDelta, holdings: Holdings) -> LogDelta:
    """The part of a delta that is followed; its positions stay."""
    if holdings.follows_all:
        return delta
    keep = holdings.followed[np.fromiter((row.slot for row in delta.rows), np.int32, len(delta.rows))]
    if keep.all():
        return delta
    rows = [row for row, kept in zip(delta.rows, keep.tolist(), strict=True) if kept]
    return replace(delta, rows=rows, vectors=delta.vectors[keep])
