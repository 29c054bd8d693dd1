"""Where every live document of a shard is: the one place that changes as the log is applied.

Parts are the segments, the frozen memtables and the open memtable, each with a number and a byte a row
that says whether it is live. There is no table of all documents: each part finds its own ids, a memtable
in a dictionary, a segment by hash in its file, and one of the rows found at most is live.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from index_builder.segments.compaction import SegmentFacts
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.manifest import SegmentEntry
from index_builder.segments.segment import Segment
from services.shard.holdings import Holdings
from services.shard.memtable import Memtable
from services.shard.views import MemtableView, SegmentView, Snapshot, View
from shard_router.hashing import hashes_of, slot_of
from shard_router.model import LogRow, Metric, Schema


@dataclass(slots=True)
class Part:
    """One block of rows; `live[row]` is 1 until its document is superseded or deleted."""

    number: int
    body: Memtable | Segment
    live: bytearray
    #: What a segment was written to be.
    kind: IndexKind = IndexKind.FLAT
    dead: int = 0
    #: Until a memtable is sealed, no manifest may claim more of the log than up to here, ...
    claimed: int = 0
    #: ... nor to have these slots whole: they were read again from the beginning into this memtable.
    backfilled: set[int] = field(default_factory=set, repr=False)
    #: The last view handed out, while nothing has changed since.
    view: View | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """How many rows it has, dead ones included."""
        return len(self.live)

    def kill(self, row: int) -> None:
        """The document of a live row was superseded or deleted."""
        self.live[row] = 0
        self.dead += 1
        self.view = None


@dataclass(frozen=True, slots=True)
class SegmentStatus:
    """What people are told of a segment; `live` rows are neither superseded nor deleted."""

    name: str
    kind: IndexKind
    rows: int
    live: int
    size_bytes: int


class Layout:
    """The shard's documents in memory. Belongs to one thread; its snapshots go to any."""

    def __init__(
        self,
        dim: int,
        metric: Metric,
        schema: Schema,
        memtable_rows: int,
        position: int,
        holdings: Holdings,
    ) -> None:
        self._dim, self._metric, self._schema, self._memtable_rows = dim, metric, schema, memtable_rows
        self._holdings = holdings
        #: Oldest first; the open memtable is the last.
        self._parts: dict[int, Part] = {}
        self._next = 0
        #: Everything of the log up to here was applied, if not yet for certain (see Replica).
        self.cursor = position
        #: While documents are recalled: from where, and which were deleted meanwhile.
        self._recalled_from: list[int] = []
        self._deleted: set[str] = set()
        #: Slots that are being read again from the beginning, each as often as it is.
        self._backfilling = 0
        self._snapshot: Snapshot | None = None
        self._start_memtable()

    @property
    def documents(self) -> int:
        """How many documents are live in the slots that are answered for."""
        if self._holdings.masks:
            views = map(self._view, self._parts.values())
            return sum(view.rows if view.live is None else view.live.count for view in views)
        return sum(part.rows - part.dead for part in self._parts.values())

    @property
    def memtable_rows(self) -> int:
        """Rows in memtables, open and frozen, dead ones included."""
        return sum(part.rows for part in self._parts.values() if isinstance(part.body, Memtable))

    @property
    def open_rows(self) -> int:
        """Rows in the open memtable."""
        return len(self._open)

    @property
    def segments(self) -> dict[int, Segment]:
        """The segments by number, oldest first."""
        return {n: part.body for n, part in self._parts.items() if isinstance(part.body, Segment)}

    def apply(self, rows: Sequence[LogRow], vectors: np.ndarray, upto: int) -> list[int]:
        """Apply log rows, each id at most once and in order of position, up to `upto`.

        vectors: float32 [n, dim], as the log has them. Returns the numbers of the memtables that filled
        up and are frozen now.
        """
        for part, row in self._find([row.id for row in rows]).values():
            part.kill(row)
        if self._recalled_from or self._backfilling:
            self._deleted.update(row.id for row in rows if row.deleted)
        kept = [row for row in rows if not row.deleted]
        if len(kept) < len(rows):
            vectors = vectors[np.fromiter((not row.deleted for row in rows), np.bool_, len(rows))]
        frozen = self._insert(kept, vectors, self.cursor)
        self.cursor = max(self.cursor, upto)
        return frozen

    def recall(self, rows: Sequence[LogRow], vectors: np.ndarray, after: int) -> list[int]:
        """Take in documents again that a lost segment held, read from the log after that position.

        What is here already, or was deleted since it went missing, is left out. Returns what `apply` does.
        """
        missing = self._not_here(rows)
        return self._insert([rows[at] for at in missing], vectors[missing], after)

    def backfill(self, rows: Sequence[LogRow], vectors: np.ndarray, after: int) -> list[int]:
        """Take in documents of slots that are followed since lately and not whole yet, as `recall` does."""
        followed = self._holdings.followed
        missing = [at for at in self._not_here(rows) if followed[rows[at].slot]]
        before = self._next
        frozen = self._insert([rows[at] for at in missing], vectors[missing], after, self.cursor)
        slots = {rows[at].slot for at in missing}
        for number in (*frozen, *range(before, self._next), self._open_number) if slots else ():
            self._parts[number].backfilled |= slots
        return frozen

    def backfilling(self, change: int) -> None:
        """One backfill more (1) or less (-1) is under way."""
        self._backfilling += change
        self._forget_deletes()

    def serve(self, epoch: int, slots: Sequence[int]) -> None:
        """Searches see these slots from now on, and no others."""
        self._holdings.serve(epoch, slots)
        self._look_again()

    def release(self, slots: Sequence[int]) -> None:
        """Drop the documents of these slots, and follow them no more."""
        self._holdings.release(slots)
        self.drop_strangers()
        followed = self._holdings.followed
        self._deleted = {id for id in self._deleted if followed[slot_of(id, len(followed))]}

    def drop_strangers(self) -> None:
        """Drop the documents of slots that are not followed."""
        for part in self._parts.values():
            live = np.frombuffer(bytes(part.live), np.bool_)
            kept = live & self._holdings.followed[_slots(part)]
            part.live[:] = kept.tobytes()
            part.dead = part.rows - int(np.count_nonzero(kept))
        self._look_again()

    def recalling(self, positions: Iterable[int]) -> None:
        """Documents from after these positions are missing for now; with no positions, none are.

        Meanwhile no manifest claims more than what comes before.
        """
        self._recalled_from = list(positions)
        self._forget_deletes()

    def freeze(self) -> int:
        """Open a new memtable; returns the number of the one that is frozen now."""
        frozen = self._open_number
        self._start_memtable()
        return frozen

    def restore(self, segment: Segment, dead: np.ndarray, kind: IndexKind) -> int:
        """Take over a segment that the manifest names; dead: bool [rows]. Returns its number."""
        part = self._add(segment, bytearray(np.logical_not(dead).tobytes()))
        part.kind = kind
        part.dead = int(np.count_nonzero(dead))
        # The open memtable stays the last part.
        self._parts[self._open_number] = self._parts.pop(self._open_number)
        return part.number

    def live_rows(self, number: int) -> np.ndarray:
        """The rows of a part that are live now, int64, ascending."""
        return np.flatnonzero(np.frombuffer(bytes(self._parts[number].live), np.bool_))

    def part(self, number: int) -> Part:
        """The part of that number."""
        return self._parts[number]

    def has(self, numbers: Iterable[int]) -> bool:
        """Whether all these parts are here."""
        return all(number in self._parts for number in numbers)

    def lose(self, name: str) -> tuple[int, int] | None:
        """Do without a segment; returns what it covered, None where no part is a segment of that name."""
        for part in self._parts.values():
            if isinstance(part.body, Segment) and part.body.name == name:
                del self._parts[part.number]
                self._snapshot = None
                return part.body.covers
        return None

    def replace(
        self, picks: Mapping[int, np.ndarray], segment: Segment | None, kind: IndexKind
    ) -> int | None:
        """Put a segment in the place of the parts whose rows it was written from; returns its number.

        picks: by part, in the segment's order of rows, the rows that were live when writing began; None
        and all empty where nothing was left to write. Rows that died since are dead in the segment.
        """
        live = self._live_of(picks)
        order = list(self._parts)
        taker: Part | None = None
        if segment is not None:
            taker = self._add(segment, live)
            taker.kind = kind
            taker.dead = live.count(0)
            order.insert(order.index(next(iter(picks))), taker.number)
        self._parts = {number: self._parts[number] for number in order if number not in picks}
        self._snapshot = None
        return None if taker is None else taker.number

    def sealed(
        self, picks: Mapping[int, np.ndarray], segment: Segment | None, kind: IndexKind
    ) -> tuple[list[SegmentEntry], int, list[int]]:
        """What a manifest says once `replace` with the same is done: its segments, a position, and slots.

        Everything of the log up to the position lies in those segments, as far as it is of those slots.
        """
        entries = [
            SegmentEntry.of(part.body.name, _dead(part.live), part.kind, part.body.covers)
            for number, part in self._parts.items()
            if isinstance(part.body, Segment) and number not in picks
        ]
        if segment is not None:
            entries.append(SegmentEntry.of(segment.name, _dead(self._live_of(picks)), kind, segment.covers))
        unsealed = [
            part
            for number, part in self._parts.items()
            if isinstance(part.body, Memtable) and number not in picks and part.rows
        ]
        position = min([*(part.claimed for part in unsealed), *self._recalled_from, self.cursor])
        whole = set(np.flatnonzero(self._holdings.whole).tolist())
        return entries, position, sorted(whole.difference(*(part.backfilled for part in unsealed)))

    def snapshot(self, position: int) -> Snapshot:
        """The live documents now, as of `position` at least."""
        if self._snapshot is None or self._snapshot.position != position:
            views = [self._view(part) for part in self._parts.values()]
            self._snapshot = Snapshot(position, views, self._holdings.since)
        return self._snapshot

    def locate(self, ids: Sequence[str]) -> dict[str, tuple[View, int]]:
        """Where the live ones of these documents are, of the slots that are answered for."""
        served = self._holdings.served
        return {
            id: (self._view(part), row)
            for id, (part, row) in self._find(ids).items()
            if served[slot_of(id, len(served))]
        }

    def facts(self) -> list[SegmentFacts]:
        """What compaction chooses by, oldest first."""
        return [
            SegmentFacts(part.number, part.rows, part.rows - part.dead, part.kind)
            for part in self._parts.values()
            if isinstance(part.body, Segment)
        ]

    def segment_status(self) -> list[SegmentStatus]:
        """What to tell of the segments, oldest first."""
        return [
            SegmentStatus(
                part.body.name, part.body.kind, part.rows, part.rows - part.dead, part.body.size_bytes
            )
            for part in self._parts.values()
            if isinstance(part.body, Segment)
        ]

    def validate_state(self) -> None:
        """AssertionError where a document is live twice or cannot be found, or a part miscounts."""
        followed = self._holdings.followed
        ids: set[str] = set()
        for part in self._parts.values():
            assert part.dead == part.live.count(0), f"part {part.number} miscounts its dead rows"
            for row in np.flatnonzero(np.frombuffer(bytes(part.live), np.bool_)).tolist():
                id = self._view(part).id_at(row)
                assert followed[slot_of(id, len(followed))], f"{id} is of a slot that is not followed"
                assert id not in ids, f"{id} is live twice"
                assert self._find([id]) == {id: (part, row)}, f"{id} is not found where it is live"
                ids.add(id)
        assert next(reversed(self._parts)) == self._open_number, "the open memtable is not last"

    def _not_here(self, rows: Sequence[LogRow]) -> list[int]:
        """Which of these are neither here, in whatever version, nor deleted since they went missing."""
        here = self._find([row.id for row in rows])
        return [
            at for at, row in enumerate(rows)
            if not row.deleted and row.id not in here and row.id not in self._deleted
        ]  # fmt: skip

    def _forget_deletes(self) -> None:
        if not self._recalled_from and not self._backfilling:
            self._deleted.clear()

    def _look_again(self) -> None:
        """Other rows are to be seen than before, or fewer."""
        for part in self._parts.values():
            part.view = None
        self._snapshot = None

    def _live_of(self, picks: Mapping[int, np.ndarray]) -> bytearray:
        """Which of the picked rows are live now, a byte each."""
        return bytearray().join(
            np.frombuffer(bytes(self._parts[number].live), np.uint8)[rows].tobytes()
            for number, rows in picks.items()
        )

    def _insert(
        self, rows: Sequence[LogRow], vectors: np.ndarray, after: int, claimed: int | None = None
    ) -> list[int]:
        """Append documents that are not here, from after that position of the log.

        Everything up to `claimed`, which is that position unless told otherwise, was applied before.
        """
        frozen: list[int] = []
        start = 0
        while start < len(rows):
            if not self._open.room:
                frozen.append(self.freeze())
            stop = min(start + self._open.room, len(rows))
            part = self._parts[self._open_number]
            self._open.append(rows[start:stop], vectors[start:stop], after)
            until = after if claimed is None else claimed
            part.claimed = min(part.claimed, until) if part.live else until
            part.live.extend(b"\1" * (stop - start))
            part.view = None
            start, after = stop, rows[stop - 1].version.seq
        self._snapshot = None
        return frozen

    def _find(self, ids: Sequence[str]) -> dict[str, tuple[Part, int]]:
        """The part and live row of each of these documents that is here; each id once."""
        found: dict[str, tuple[Part, int]] = {}
        hashes = hashes_of(id.encode() for id in ids)
        for part in self._parts.values():
            for which, row in part.body.find(ids, hashes):
                if part.live[row]:
                    found[ids[which]] = part, row
        return found

    def _add(self, body: Memtable | Segment, live: bytearray) -> Part:
        part = Part(self._next, body, live)
        self._parts[part.number] = part
        self._next += 1
        self._snapshot = None
        return part

    def _start_memtable(self) -> None:
        self._open = Memtable(self._dim, self._metric, self._schema, self._memtable_rows)
        self._open_number = self._add(self._open, bytearray()).number

    def _view(self, part: Part) -> View:
        if part.view is None:
            live = np.frombuffer(bytes(part.live), np.bool_) if part.dead else None
            if self._holdings.masks:
                seen = self._holdings.served[_slots(part)]
                if not seen.all():
                    live = seen if live is None else live & seen
            if isinstance(part.body, Segment):
                part.view = SegmentView(part.number, part.body, live)
            else:
                part.view = MemtableView(part.number, part.body, part.rows, live)
        return part.view


def _slots(part: Part) -> np.ndarray:
    """The slot of each row, int32 [rows]."""
    slots = part.body.slots if isinstance(part.body, Memtable) else part.body.contents.slots
    return slots[: part.rows]


def _dead(live: bytearray) -> np.ndarray:
    """Which rows are dead, bool [rows]."""
    return np.logical_not(np.frombuffer(bytes(live), np.bool_))
