"""Everything of a segment's rows but their vectors, as plain arrays: how it is made, joined and read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from shard_router.columns import Columns
from shard_router.hashing import hashes_of
from shard_router.joined_columns import joined
from shard_router.model import LogRow, Schema, Version

_COLUMN = "column:"


@dataclass(frozen=True, slots=True)
class Draft:
    """The arrays to write for some rows, each as blocks to be laid end to end.

    A block may be a view of another segment's file, so that joining large ones needs no memory.
    """

    rows: int
    blocks: Mapping[str, Sequence[np.ndarray]]

    @classmethod
    def of(cls, rows: Sequence[LogRow], schema: Schema, pause: Callable[[], None] = lambda: None) -> "Draft":
        """The arrays of documents.

        `pause` is called every few rows' columns: all this is Python, which holds up what else is.
        """
        ids = [row.id.encode() for row in rows]
        arrays: dict[str, np.ndarray] = {
            "ids": np.frombuffer(b"".join(ids), np.uint8),
            "id_ends": np.fromiter(accumulate(map(len, ids)), np.int64, len(ids)),
        }
        pause()
        arrays |= _by_hash(hashes_of(ids))
        pause()
        texts = [(row.text or "").encode() for row in rows]
        arrays["texts"] = np.frombuffer(b"".join(texts), np.uint8)
        arrays["text_ends"] = np.fromiter(accumulate(map(len, texts)), np.int64, len(texts))
        arrays["has_text"] = np.fromiter((row.text is not None for row in rows), np.bool_, len(rows))
        pause()
        versions = np.empty((len(rows), 2), np.int64)
        versions[:, 0] = np.fromiter((row.version.term for row in rows), np.int64, len(rows))
        versions[:, 1] = np.fromiter((row.version.seq for row in rows), np.int64, len(rows))
        arrays["versions"] = versions
        arrays["slots"] = np.fromiter((row.slot for row in rows), np.int32, len(rows))
        pause()
        columns = Columns.build([row.attributes for row in rows], schema, pause)
        arrays |= {_COLUMN + name: array for name, array in columns.to_arrays().items()}
        return cls(len(rows), {name: [array] for name, array in arrays.items()})

    @classmethod
    def joined(cls, sources: Sequence[tuple["Contents", np.ndarray]], schema: Schema) -> "Draft":
        """The arrays of these rows of each source, in the order given; row numbers int64, ascending."""
        columns = joined([(contents.columns, picks) for contents, picks in sources], schema)
        hashes = np.concatenate([contents.hashes()[picks] for contents, picks in sources])
        blocks: dict[str, Sequence[np.ndarray]] = {
            "versions": [contents.versions[picks] for contents, picks in sources],
            "slots": [contents.slots[picks] for contents, picks in sources],
            "has_text": [contents.has_text[picks] for contents, picks in sources],
            **{name: [array] for name, array in _by_hash(hashes).items()},
            **{_COLUMN + name: [array] for name, array in columns.to_arrays().items()},
        }
        for name, ends in (("ids", "id_ends"), ("texts", "text_ends")):
            pieces = [_cut(*contents.texts(name), picks) for contents, picks in sources]
            blocks[name] = [block for cut, _ in pieces for block in cut]
            blocks[ends] = [np.cumsum(np.concatenate([lengths for _, lengths in pieces]), dtype=np.int64)]
        return cls(len(hashes), blocks)


class Contents:
    """Ids, versions, slots, texts and attributes of rows; immutable, and safe to read from many threads."""

    def __init__(self, arrays: Mapping[str, np.ndarray], schema: Schema, rows: int) -> None:
        """The arrays that a draft laid down, or maps of them. KeyError, ValueError where one does not fit."""
        self.rows = rows
        #: int64 [rows, 2]: term, seq.
        self.versions = arrays["versions"]
        #: int32 [rows].
        self.slots = arrays["slots"]
        #: bool [rows].
        self.has_text = arrays["has_text"]
        self.columns = Columns.from_arrays(
            {name[len(_COLUMN) :]: array for name, array in arrays.items() if name.startswith(_COLUMN)},
            schema,
            rows,
        )
        self._ids, self._id_ends = arrays["ids"], arrays["id_ends"]
        self._texts, self._text_ends = arrays["texts"], arrays["text_ends"]
        if "id_hashes" not in arrays:  # written before ids were kept by hash
            arrays = _by_hash(hashes_of(id.encode() for id in self.ids()))
        self._hashes, self._hash_rows = arrays["id_hashes"], arrays["id_rows"]

    def find(self, ids: Sequence[str], hashes: np.ndarray) -> list[tuple[int, int]]:
        """Where these ids are: (which of them, row) for each that is here.

        hashes: their xxh3_64, uint64 [n].
        """
        found: list[tuple[int, int]] = []
        places = np.searchsorted(self._hashes, hashes)
        candidates = np.flatnonzero(self._hashes[np.minimum(places, self.rows - 1)] == hashes)
        for which in candidates.tolist():
            # Two ids may share a hash; they lie side by side.
            place, hash = int(places[which]), hashes[which]
            while place < self.rows and self._hashes[place] == hash:
                row = self._hash_rows.item(place)
                if self.id_at(row) == ids[which]:
                    found.append((which, row))
                    break
                place += 1
        return found

    def hashes(self) -> np.ndarray:
        """xxh3_64 of each row's id, uint64 [rows]; fresh."""
        by_row = np.empty(self.rows, dtype=np.uint64)
        by_row[self._hash_rows] = self._hashes
        return by_row

    def ids(self) -> list[str]:
        """Every row's id, in order of row."""
        ends = self._id_ends.tolist()
        blob = self._ids.tobytes()
        return [blob[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def texts(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`ids` or `texts`: the UTF-8 of all rows, end to end, and where each row's ends."""
        return (self._ids, self._id_ends) if name == "ids" else (self._texts, self._text_ends)

    def id_at(self, row: int) -> str:
        """A row's id."""
        return _piece(self._ids, self._id_ends, row)

    def version_at(self, row: int) -> Version:
        """A row's version."""
        return Version(*self.versions[row].tolist())

    def text_at(self, row: int) -> str | None:
        """A row's text, None where the document has none."""
        return _piece(self._texts, self._text_ends, row) if self.has_text[row] else None


def _by_hash(hashes: np.ndarray) -> dict[str, np.ndarray]:
    """What `find` searches: the hashes in order, and the row of each."""
    order = np.argsort(hashes, kind="stable")
    return {"id_hashes": hashes[order], "id_rows": order.astype(np.int32)}


def _cut(blob: np.ndarray, ends: np.ndarray, picks: np.ndarray) -> tuple[Iterable[np.ndarray], np.ndarray]:
    """The bytes of the picked rows, as views of runs of them, and how many each row has."""
    if not len(picks):
        return [], np.zeros(0, np.int64)
    starts = np.concatenate(([0], ends[:-1]))[picks]
    stops = ends[picks]
    breaks = np.flatnonzero(np.diff(picks) != 1)
    firsts = starts[np.concatenate(([0], breaks + 1))].tolist()
    lasts = stops[np.concatenate((breaks, [len(picks) - 1]))].tolist()
    return [blob[first:last] for first, last in zip(firsts, lasts, strict=True)], stops - starts


def _piece(blob: np.ndarray, ends: np.ndarray, row: int) -> str:
    """The text that ends at ends[row] and begins where the one before it ends."""
    start = ends.item(row - 1) if row else 0
    return str(blob.data[start : ends.item(row)], "utf-8")
