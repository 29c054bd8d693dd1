"""Where every live document of a shard is: the one place that changes as the log is applied.

Parts are the segments, the frozen memtables and the open memtable, each with a number and a byte a row
that says whether it is live. `places` maps an id to its part and row. A part that is rewritten leaves a
forward (old row -> new row) behind, so that a rewrite of any size changes no place: places are brought
up to date when they are next looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from index_builder.segments.compaction import SegmentFacts
from index_builder.segments.manifest import SegmentEntry
from index_builder.segments.segment import Segment
from services.shard.memtable import Memtable
from services.shard.views import MemtableView, SegmentView, Snapshot, View
from shard_router.model import LogRow, Metric, Schema

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1


@dataclass(slots=True)
class Part:
    """One block of rows; `live[row]` is 1 until its document is superseded or deleted."""

    number: int
    body: Memtable | Segment
    live: bytearray
    dead: int = 0
    #: The last view handed out, while nothing has changed since.
    view: View | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """How many rows it has, dead ones included."""
        return len(self.live)


@dataclass(frozen=True, slots=True)
class SegmentStatus:
    """What people are told of a segment; `live` rows are neither superseded nor deleted."""

    name: str
    kind: str
    rows: int
    live: int
    size_bytes: int


class Layout:
    """The shard's documents in memory. Belongs to one thread; its snapshots go to any."""

    def __init__(self, dim: int, metric: Metric, schema: Schema, memtable_rows: int, position: int) -> None:
        self._dim, self._metric, self._schema, self._memtable_rows = dim, metric, schema, memtable_rows
        #: Oldest first; the open memtable is the last.
        self._parts: dict[int, Part] = {}
        #: id -> part number << 32 | row, of live documents.
        self._places: dict[str, int] = {}
        #: Of a part that is gone: the part that took its live rows, and their new numbers (int32, -1 dead).
        self._forwards: dict[int, tuple[int, np.ndarray]] = {}
        self._next = 0
        #: Everything of the log up to here was applied, if not yet for certain (see Replica).
        self.cursor = position
        self._snapshot: Snapshot | None = None
        self._start_memtable()

    @property
    def documents(self) -> int:
        """How many documents are live."""
        return len(self._places)

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
        frozen: list[int] = []
        kept = [row for row in rows if not row.deleted]
        if len(kept) < len(rows):
            vectors = vectors[np.fromiter((not row.deleted for row in rows), np.bool_, len(rows))]
            for row in rows:
                if row.deleted and (place := self._places.pop(row.id, None)) is not None:
                    self._kill(place)
        start, after = 0, self.cursor
        while start < len(kept):
            if not self._open.room:
                frozen.append(self.freeze())
            stop = start + self._open.room
            self._insert(kept[start:stop], vectors[start:stop], after)
            start, after = stop, kept[min(stop, len(kept)) - 1].version.seq
        self.cursor = max(self.cursor, upto)
        self._snapshot = None
        return frozen

    def freeze(self) -> int:
        """Open a new memtable; returns the number of the one that is frozen now."""
        frozen = self._open_number
        self._start_memtable()
        return frozen

    def restore(self, segment: Segment, dead: np.ndarray) -> int:
        """Take over a segment that the manifest names; dead: bool [rows]. Returns its number."""
        part = self._add(segment, bytearray(np.logical_not(dead).tobytes()))
        part.dead = int(np.count_nonzero(dead))
        base = part.number << _ROW_BITS
        for row, id in enumerate(segment.ids()):
            if part.live[row]:
                if (place := self._places.get(id)) is not None:
                    self._kill(place)
                self._places[id] = base | row
        # The open memtable stays the last part.
        self._parts[self._open_number] = self._parts.pop(self._open_number)
        return part.number

    def live_rows(self, number: int) -> np.ndarray:
        """The rows of a part that are live now, int64, ascending."""
        return np.flatnonzero(np.frombuffer(bytes(self._parts[number].live), np.bool_))

    def part(self, number: int) -> Part:
        """The part of that number."""
        return self._parts[number]

    def replace(self, picks: Mapping[int, np.ndarray], segment: Segment | None) -> int | None:
        """Put a segment in the place of the parts whose rows it was written from; returns its number.

        picks: by part, in the segment's order of rows, the rows that were live when writing began; None
        and all empty where nothing was left to write. Rows that died since are dead in the segment.
        """
        live = self._live_of(picks)
        order = list(self._parts)
        taker: Part | None = None
        if segment is not None:
            taker = self._add(segment, live)
            taker.dead = live.count(0)
            first = 0
            for number, rows in picks.items():
                forward = np.full(self._parts[number].rows, -1, dtype=np.int32)
                forward[rows] = np.arange(first, first + len(rows), dtype=np.int32)
                self._forwards[number] = (taker.number, forward)
                first += len(rows)
            order.insert(order.index(next(iter(picks))), taker.number)
        self._parts = {number: self._parts[number] for number in order if number not in picks}
        self._snapshot = None
        return None if taker is None else taker.number

    def sealed(
        self, picks: Mapping[int, np.ndarray], segment: Segment | None
    ) -> tuple[list[SegmentEntry], int]:
        """What a manifest says once `replace(picks, segment)` is done: its segments, and the position.

        Everything of the log up to the position lies in those segments.
        """
        entries = [
            SegmentEntry.of(part.body.name, _dead(part.live))
            for number, part in self._parts.items()
            if isinstance(part.body, Segment) and number not in picks
        ]
        if segment is not None:
            entries.append(SegmentEntry.of(segment.name, _dead(self._live_of(picks))))
        unsealed = (
            part.body
            for number, part in self._parts.items()
            if isinstance(part.body, Memtable) and number not in picks
        )
        first = next(unsealed)
        return entries, first.after if first.rows else self.cursor

    def snapshot(self, position: int) -> Snapshot:
        """The live documents now, as of `position` at least."""
        if self._snapshot is None or self._snapshot.position != position:
            self._snapshot = Snapshot(position, [self._view(part) for part in self._parts.values()])
        return self._snapshot

    def locate(self, ids: Sequence[str]) -> dict[str, tuple[View, int]]:
        """Where the live ones of these documents are."""
        found: dict[str, tuple[View, int]] = {}
        for id in ids:
            if (place := self._places.get(id)) is not None:
                number, row = self._resolve(place)
                found[id] = self._view(self._parts[number]), row
        return found

    def facts(self) -> list[SegmentFacts]:
        """What compaction chooses by, oldest first."""
        return [
            SegmentFacts(part.number, part.rows, part.rows - part.dead)
            for part in self._parts.values()
            if isinstance(part.body, Segment)
        ]

    def segment_status(self) -> list[SegmentStatus]:
        """What to tell of the segments, oldest first."""
        return [
            SegmentStatus(part.body.name, "flat", part.rows, part.rows - part.dead, part.body.size_bytes)
            for part in self._parts.values()
            if isinstance(part.body, Segment)
        ]

    def validate_state(self) -> None:
        """AssertionError unless every live row has its place, and every place its live row."""
        seen: set[tuple[int, int]] = set()
        for id, place in self._places.items():
            number, row = self._resolve(place)
            part = self._parts[number]
            assert part.live[row], f"{id} is placed at a dead row"
            assert self._view(part).id_at(row) == id, f"{id} is not where it is placed"
            seen.add((number, row))
        for part in self._parts.values():
            assert part.dead == part.live.count(0), f"part {part.number} miscounts its dead rows"
        alive = sum(part.rows - part.dead for part in self._parts.values())
        assert alive == len(seen) == len(self._places), "a live row has no place"
        assert next(reversed(self._parts)) == self._open_number, "the open memtable is not last"

    def _live_of(self, picks: Mapping[int, np.ndarray]) -> bytearray:
        """Which of the picked rows are live now, a byte each."""
        return bytearray().join(
            np.frombuffer(bytes(self._parts[number].live), np.uint8)[rows].tobytes()
            for number, rows in picks.items()
        )

    def _insert(self, rows: Sequence[LogRow], vectors: np.ndarray, after: int) -> None:
        part, memtable = self._parts[self._open_number], self._open
        if not memtable.rows:
            memtable.after = after
        place = part.number << _ROW_BITS | memtable.append(rows, vectors)
        part.live.extend(b"\1" * len(rows))
        part.view = None
        places = self._places
        for row in rows:
            if (old := places.get(row.id)) is not None:
                self._kill(old)
            places[row.id] = place
            place += 1

    def _kill(self, place: int) -> None:
        number, row = self._resolve(place)
        part = self._parts[number]
        part.live[row] = 0
        part.dead += 1
        part.view = None

    def _resolve(self, place: int) -> tuple[int, int]:
        number, row = place >> _ROW_BITS, place & _ROW_MASK
        while (forward := self._forwards.get(number)) is not None:
            number, row = forward[0], forward[1].item(row)
        return number, row

    def _add(self, body: Memtable | Segment, live: bytearray) -> Part:
        part = Part(self._next, body, live)
        self._parts[part.number] = part
        self._next += 1
        self._snapshot = None
        return part

    def _start_memtable(self) -> None:
        self._open = Memtable(self._dim, self._metric, self._schema, self._memtable_rows, self.cursor)
        self._open_number = self._add(self._open, bytearray()).number

    def _view(self, part: Part) -> View:
        if part.view is None:
            live = np.frombuffer(bytes(part.live), np.bool_) if part.dead else None
            if isinstance(part.body, Segment):
                part.view = SegmentView(part.number, part.body, live)
            else:
                part.view = MemtableView(part.number, part.body, part.rows, live)
        return part.view


def _dead(live: bytearray) -> np.ndarray:
    """Which rows are dead, bool [rows]."""
    return np.logical_not(np.frombuffer(bytes(live), np.bool_))
