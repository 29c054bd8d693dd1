"""One immutable block of documents on disk: everything a search answers with, memory-mapped.

A segment is a directory of at most four files, all named with size and checksum in its header:

    header     what the others must look like, and where each array lies
    vectors    float32 [rows, dim], prepared for the metric, row-major little-endian
    arrays     ids, versions, slots, texts and attribute columns, 64-byte aligned
    index      flat SQ8 codes (absent where they would not find enough)

It is written under another name, forced to disk and renamed, so it is whole or absent.
"""

import mmap
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from index_builder.segments import files, frame, similarity
from index_builder.segments.files import FileRecord
from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort
from index_builder.segments.quantized import QuantizedIndex, candidates_for
from index_builder.segments.row_set import RowSet
from shard_router.columns import Columns
from shard_router.errors import SegmentCorrupt
from shard_router.model import LogRow, Metric, Schema, Version

_MAGIC, _FORMAT = b"RFSG", 1
_HEADER, _VECTORS, _ARRAYS, _INDEX = "header", "vectors", "arrays", "index"
_COLUMN = "column:"
_ALIGN_BYTES = 64
#: Where a smaller share of rows is allowed, scoring just those is cheaper than passing over all codes.
_SCAN_SHARE = 1 / 50
#: Candidates scored exactly, as a multiple of k, where the caller names no other.
REFINE = 1.5
#: An effort of 0 to 1 scores this many times k candidates exactly.
_REFINE_LEAST, _REFINE_MOST = 1.0, 4.0


class _ArrayPlace(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


class _Header(msgspec.Struct, frozen=True):
    rows: int
    dim: int
    metric: Metric
    covers: tuple[int, int]
    files: dict[str, FileRecord]
    arrays: dict[str, _ArrayPlace]


class Segment:
    """Documents of one span of the log; immutable, and safe to read from many threads."""

    def __init__(
        self,
        directory: Path,
        header: _Header,
        arrays: Mapping[str, np.ndarray],
        vectors: np.ndarray,
        index: QuantizedIndex | None,
        schema: Schema,
    ) -> None:
        self.directory, self.rows, self.dim = directory, header.rows, header.dim
        self.metric, self.covers = header.metric, header.covers
        #: float32 [rows, dim], as prepared for the metric.
        self.vectors = vectors
        #: int64 [rows, 2]: term, seq.
        self.versions = arrays["versions"]
        #: int32 [rows].
        self.slots = arrays["slots"]
        self.columns = Columns.from_arrays(
            {name[len(_COLUMN) :]: array for name, array in arrays.items() if name.startswith(_COLUMN)},
            schema,
            header.rows,
        )
        self._ids, self._id_ends = arrays["ids"], arrays["id_ends"]
        self._texts, self._text_ends = arrays["texts"], arrays["text_ends"]
        self._has_text = arrays["has_text"]
        self._index = index
        self.size_bytes = sum(file.size_bytes for file in header.files.values())

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.name

    @classmethod
    def write(
        cls,
        directory: Path,
        rows: Sequence[LogRow],
        vectors: np.ndarray,
        metric: Metric,
        schema: Schema,
        *,
        covers: tuple[int, int],
    ) -> "Segment":
        """Write live documents as a segment at `directory`, which must not exist, and open it.

        vectors: float32 [rows, dim], prepared. covers: the positions (after, upto] they come from.
        OSError where the disk is full or fails; nothing is left behind then. ValueError for no rows.
        """
        if not rows:
            raise ValueError("a segment has at least one row")
        draft = directory.with_name(f".{directory.name}.part")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            _write(draft, rows, vectors, metric, schema, covers)
            files.sync(draft)
            draft.rename(directory)
            files.sync(directory.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return cls.open(directory, schema, verify=False)

    @classmethod
    def open(cls, directory: Path, schema: Schema, verify: bool) -> "Segment":
        """Map a segment. With `verify`, every byte is read and compared with its checksum first.

        Attributes the schema gained since it was written read as null. SegmentCorrupt where a file is
        missing, of another size, or (verified) of other bytes than were written.
        """
        try:
            header = msgspec.msgpack.decode(
                frame.unseal(_MAGIC, _FORMAT, (directory / _HEADER).read_bytes(), str(directory)),
                type=_Header,
            )
            for name, expected in header.files.items():
                if (directory / name).stat().st_size != expected.size_bytes:
                    raise SegmentCorrupt(str(directory), f"{name} is not of {expected.size_bytes} bytes")
                if verify and files.record(directory / name) != expected:
                    raise SegmentCorrupt(str(directory), f"the checksum of {name} does not match")
            arrays = {
                name: np.frombuffer(
                    buffer, place.dtype, int(np.prod(place.shape)), place.offset_bytes
                ).reshape(place.shape)
                for buffer in [_map(directory / _ARRAYS)]
                for name, place in header.arrays.items()
            }
            vectors = np.frombuffer(_map(directory / _VECTORS), "<f4").reshape(header.rows, header.dim)
            index = None
            if _INDEX in header.files:
                index = QuantizedIndex.open(directory / _INDEX, header.metric)
                if index.shape != (header.rows, header.dim):
                    raise SegmentCorrupt(str(directory), f"the index is of {index.shape}")
            return cls(directory, header, arrays, vectors, index, schema)
        except (OSError, ValueError, KeyError, RuntimeError, msgspec.MsgspecError) as error:
            raise SegmentCorrupt(str(directory), str(error)) from error

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: RowSet | None,
        exact: bool,
        effort: Effort = DEFAULT_EFFORT,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k allowed rows of each query; k of them whenever so many are allowed.

        queries: float32 [q, dim], prepared; allowed: those live and passing the filter, None for all.
        Returns scores float32 [q, k], best first, -inf where there are no more, and rows int64 [q, k], -1
        there. Scores are exact on every path; without `exact` a true neighbour may be missed among those
        the codes rank too low.
        """
        usable = self.rows if allowed is None else allowed.count
        refine = (
            REFINE if effort.share is None else _REFINE_LEAST + effort.share * (_REFINE_MOST - _REFINE_LEAST)
        )
        wanted = candidates_for(k, refine)
        if exact or self._index is None or usable <= max(wanted, int(self.rows * _SCAN_SHARE)):
            return similarity.scan(queries, self.vectors, allowed, k, self.metric)
        found = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        pools = self._index.candidates(queries, wanted, allowed)
        if (pools < 0).any():  # scores beyond float32, which FAISS leaves out
            return similarity.scan(queries, self.vectors, allowed, k, self.metric)
        for i, candidates in enumerate(pools):
            values = similarity.scores(queries[i], self.vectors[candidates], self.metric)
            top = similarity.best(values, k)
            found[i], rows[i] = values[top], candidates[top]
        return found, rows

    def ids(self) -> list[str]:
        """Every row's id, in order of row."""
        ends = self._id_ends.tolist()
        blob = self._ids.tobytes()
        return [blob[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def id_at(self, row: int) -> str:
        """A row's id."""
        return _piece(self._ids, self._id_ends, row)

    def version_at(self, row: int) -> Version:
        """A row's version."""
        return Version(*self.versions[row].tolist())

    def text_at(self, row: int) -> str | None:
        """A row's text, None where the document has none."""
        return _piece(self._texts, self._text_ends, row) if self._has_text[row] else None

    def log_row(self, row: int) -> LogRow:
        """The row as the log told it."""
        return LogRow(
            id=self.id_at(row),
            slot=int(self.slots[row]),
            version=self.version_at(row),
            deleted=False,
            text=self.text_at(row),
            attributes=self.columns.attributes_at(row),
        )


def _piece(blob: np.ndarray, ends: np.ndarray, row: int) -> str:
    """The text that ends at ends[row] and begins where the one before it ends."""
    start = ends.item(row - 1) if row else 0
    return str(blob.data[start : ends.item(row)], "utf-8")


def _map(path: Path) -> Any:
    """The file's bytes, mapped; an empty file cannot be mapped and is empty bytes."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _write(
    draft: Path,
    rows: Sequence[LogRow],
    vectors: np.ndarray,
    metric: Metric,
    schema: Schema,
    covers: tuple[int, int],
) -> None:
    records: dict[str, FileRecord] = {}
    vectors = np.ascontiguousarray(vectors, dtype="<f4")
    records[_VECTORS] = files.write(draft / _VECTORS, [vectors.data])
    index = QuantizedIndex.build(vectors, metric)
    if index is not None:
        index.save(draft / _INDEX)
        files.sync(draft / _INDEX)
        records[_INDEX] = files.record(draft / _INDEX)
    arrays = _arrays(rows, schema)
    places: dict[str, _ArrayPlace] = {}
    buffers: list[bytes | memoryview] = []
    offset = 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        padding = -offset % _ALIGN_BYTES
        buffers += [bytes(padding), array.tobytes()]
        places[name] = _ArrayPlace(array.dtype.str, array.shape, offset + padding)
        offset += padding + array.nbytes
    records[_ARRAYS] = files.write(draft / _ARRAYS, buffers)
    header = _Header(
        rows=len(rows),
        dim=vectors.shape[1],
        metric=metric,
        covers=covers,
        files=records,
        arrays=places,
    )
    files.write(draft / _HEADER, [frame.seal(_MAGIC, _FORMAT, msgspec.msgpack.encode(header))])


def _arrays(rows: Sequence[LogRow], schema: Schema) -> dict[str, np.ndarray]:
    """Everything of the rows but their vectors."""
    ids = [row.id.encode() for row in rows]
    texts = [(row.text or "").encode() for row in rows]
    columns = Columns.build([row.attributes for row in rows], schema)
    return {
        "ids": np.frombuffer(b"".join(ids), np.uint8),
        "id_ends": np.fromiter(accumulate(map(len, ids)), np.int64, len(ids)),
        "texts": np.frombuffer(b"".join(texts), np.uint8),
        "text_ends": np.fromiter(accumulate(map(len, texts)), np.int64, len(texts)),
        "has_text": np.fromiter((row.text is not None for row in rows), np.bool_, len(rows)),
        "versions": np.array([(row.version.term, row.version.seq) for row in rows], np.int64),
        "slots": np.fromiter((row.slot for row in rows), np.int32, len(rows)),
        **{_COLUMN + name: array for name, array in columns.to_arrays().items()},
    }
