"""One immutable block of documents on disk: everything a search answers with, memory-mapped.

A segment is a directory of at most four files, all named with size and checksum in its header:

    header     what the others must look like, and where each array lies
    vectors    float32 [rows, dim], prepared for the metric, row-major little-endian
    arrays     ids, versions, slots, texts and attribute columns, 64-byte aligned
    index      FAISS: flat codes, a graph, or lists (absent where none would find enough)

It is written under another name, forced to disk and renamed, so it is whole or absent.
"""

import mmap
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from index_builder.segments import device as devices
from index_builder.segments import files, frame, similarity
from index_builder.segments.candidates import CandidateIndex
from index_builder.segments.contents import Contents, Draft
from index_builder.segments.curve import Curve
from index_builder.segments.files import FileRecord
from index_builder.segments.graph import GraphIndex
from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort, IndexKind
from index_builder.segments.inverted import InvertedIndex
from index_builder.segments.quantized import QuantizedIndex
from index_builder.segments.row_set import RowSet
from index_builder.segments.vector_file import VectorFile
from shard_router.errors import SegmentCorrupt
from shard_router.model import LogRow, Metric, Schema

_MAGIC, _FORMAT = b"RFSG", 1
_HEADER, _VECTORS, _ARRAYS, _INDEX = "header", "vectors", "arrays", "index"
_ALIGN_BYTES = 64
#: What a search reaches that names no effort; and where fewer than most rows are allowed.
_DEFAULT_RECALL, _FILTERED_RECALL, _MOST = 0.98, 0.985, 0.8
#: Of codes that were written before there were curves: what they had to find to be written.
_UNMEASURED = Curve(((1.0, 0.995), (1.5, 0.995), (2.5, 0.995), (4.0, 0.995)))


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
    kind: IndexKind = IndexKind.FLAT
    #: Curve.rungs of the index; empty without one, and in files of before there were curves.
    curve: tuple[tuple[float, float], ...] = ()
    #: The rows that a graph was measured with.
    held: tuple[int, ...] = ()


class Segment:
    """Documents of one span of the log; immutable, and safe to read from many threads."""

    def __init__(
        self,
        directory: Path,
        header: _Header,
        contents: Contents,
        vectors: VectorFile,
        index: CandidateIndex | None,
    ) -> None:
        self.directory, self.rows, self.dim = directory, header.rows, header.dim
        self.metric, self.covers = header.metric, header.covers
        #: float32 [rows, dim], as prepared for the metric.
        self.vectors = vectors.mapped
        self._vector_file = vectors
        self.contents = contents
        self.columns = contents.columns
        self.find = contents.find
        self.id_at, self.version_at, self.text_at = contents.id_at, contents.version_at, contents.text_at
        self._index = index
        self._curve = Curve(header.curve) if header.curve else _UNMEASURED
        self._files = header.files
        self.size_bytes = sum(file.size_bytes for file in header.files.values())

    @property
    def kind(self) -> IndexKind:
        """What it is searched with."""
        return IndexKind.FLAT if self._index is None else self._index.kind

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
        kind: IndexKind = IndexKind.FLAT,
        device: str = "cpu",
    ) -> "Segment":
        """Write live documents as a segment at `directory`, which must not exist, and open it.

        vectors: float32 [rows, dim], prepared. covers: the positions (after, upto] they come from. kind:
        what to search it with; flat codes where that would not find enough, and no index where they do
        not either. device: where it will be searched. Uses the OpenMP threads the caller has set.
        OSError where the disk is full or fails; nothing is left behind then. ValueError for no rows.
        """
        draft = Draft.of(rows, schema)
        return cls.write_draft(
            directory, draft, [vectors], metric, schema, covers=covers, kind=kind, device=device
        )

    @classmethod
    def write_draft(
        cls,
        directory: Path,
        draft: Draft,
        vectors: Iterable[np.ndarray],
        metric: Metric,
        schema: Schema,
        *,
        covers: tuple[int, int],
        kind: IndexKind = IndexKind.FLAT,
        device: str = "cpu",
    ) -> "Segment":
        """`write`, of arrays that are made already and of vectors that come in blocks, float32 [n, dim]."""
        if not draft.rows:
            raise ValueError("a segment has at least one row")
        beside = directory.with_name(f".{directory.name}.part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            _write(beside, draft, vectors, metric, covers, kind, device)
            files.sync(beside)
            beside.rename(directory)
            files.sync(directory.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return cls.open(directory, schema, verify=False, device=device)

    @classmethod
    def open(
        cls,
        directory: Path,
        schema: Schema,
        verify: bool,
        vectors_too: bool = True,
        device: str = devices.CPU,
    ) -> "Segment":
        """Map a segment, to be searched on a device: `cpu`, or a `cuda:N` that there is.

        With `verify`, every byte is read and compared with its checksum first; without `vectors_too`
        those of the vectors, the most of it, are left to `verify`: damage there can misjudge a document,
        elsewhere it could misname one or lead the index astray. Attributes the schema gained since it was
        written read as null. SegmentCorrupt where a file is missing, of another size, or (verified) of
        other bytes than were written.
        """
        try:
            header = msgspec.msgpack.decode(
                frame.unseal(_MAGIC, _FORMAT, (directory / _HEADER).read_bytes(), str(directory)),
                type=_Header,
            )
            for name, expected in header.files.items():
                if (directory / name).stat().st_size != expected.size_bytes:
                    raise SegmentCorrupt(str(directory), f"{name} is not of {expected.size_bytes} bytes")
                if verify and (vectors_too or name != _VECTORS):
                    _verify(directory, name, expected)
            arrays = {
                name: np.frombuffer(
                    buffer, place.dtype, int(np.prod(place.shape)), place.offset_bytes
                ).reshape(place.shape)
                for buffer in [_map(directory / _ARRAYS)]
                for name, place in header.arrays.items()
            }
            index = None
            if _INDEX in header.files:
                index = _open_index(directory / _INDEX, header)
                if index.shape != (header.rows, header.dim):
                    raise SegmentCorrupt(str(directory), f"the index is of {index.shape}")
            contents = Contents(arrays, schema, header.rows)
            vectors = VectorFile(directory / _VECTORS, header.rows, header.dim)
            made = cls(directory, header, contents, vectors, index)
            if index is not None:
                made._index = devices.on(device, index, made.vectors, header.metric)
            return made
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
        there. Scores are exact on every path; without `exact` a true neighbour may be missed, as often as
        `effort` allows.
        """
        index = None if exact else self._index
        if index is None:
            return similarity.scan(queries, self.vectors, allowed, k, self.metric)
        usable, least_recall = self.rows, _DEFAULT_RECALL
        if allowed is not None:
            usable = allowed.count
            if allowed.share < _MOST:
                least_recall = _FILTERED_RECALL
        knob = self._curve.knob(effort, least_recall)
        if knob is None or usable <= max(index.pool(k, knob), int(self.rows * index.scan_share)):
            return similarity.scan(queries, self.vectors, allowed, k, self.metric)
        pools = index.candidates(queries, index.pool(k, knob), allowed, knob)
        scores, rows = similarity.rescore(queries, self._vector_file.take, pools, k, self.metric)
        # A walk may end among what is not allowed, or in a corner of the graph; and FAISS leaves out
        # what lies beyond float32.
        short = np.flatnonzero((pools < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = similarity.scan(
                queries[short], self.vectors, allowed, k, self.metric
            )
        return scores, rows

    def verify(self, pace: Callable[[int], None] | None = None) -> None:
        """Read every byte and compare it with its checksum; SegmentCorrupt where one differs.

        `pace` is told how many bytes were read, again and again; it may wait, or raise to give up.
        """
        for name, expected in self._files.items():
            try:
                _verify(self.directory, name, expected, pace)
            except OSError as error:
                raise SegmentCorrupt(str(self.directory), str(error)) from error

    def release_vectors(self) -> None:
        """Let go of the vectors' pages in memory; they are mapped again from the file when next read."""
        self._vector_file.release()

    def ids(self) -> list[str]:
        """Every row's id, in order of row."""
        return self.contents.ids()


def _verify(
    directory: Path, name: str, expected: FileRecord, pace: Callable[[int], None] | None = None
) -> None:
    if files.record(directory / name, pace) != expected:
        raise SegmentCorrupt(str(directory), f"the checksum of {name} does not match")


def _map(path: Path) -> Any:
    """The file's bytes, mapped; an empty file cannot be mapped and is empty bytes."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _write(
    directory: Path,
    draft: Draft,
    vectors: Iterable[np.ndarray],
    metric: Metric,
    covers: tuple[int, int],
    kind: IndexKind,
    device: str,
) -> None:
    records: dict[str, FileRecord] = {}
    blocks = (np.ascontiguousarray(block, dtype="<f4").data for block in vectors)
    records[_VECTORS] = files.write(directory / _VECTORS, blocks)
    # From the file: the blocks need not all be in memory at once.
    written = np.frombuffer(_map(directory / _VECTORS), "<f4").reshape(draft.rows, -1)
    built = _build_index(written, metric, kind, device)
    if built is not None:
        try:
            built[0].save(directory / _INDEX)
        except RuntimeError as error:  # FAISS has one class for everything
            raise files.failure(directory, str(error)) from error
        files.sync(directory / _INDEX)
        records[_INDEX] = files.record(directory / _INDEX)
    places: dict[str, _ArrayPlace] = {}
    buffers: list[bytes | memoryview] = []
    offset = 0
    for name, arrays in draft.blocks.items():
        padding = -offset % _ALIGN_BYTES
        buffers += [bytes(padding), *(array.data for array in arrays)]
        shape = (sum(map(len, arrays)), *arrays[0].shape[1:]) if arrays else (0,)
        dtype = arrays[0].dtype if arrays else np.dtype(np.uint8)
        places[name] = _ArrayPlace(dtype.str, shape, offset + padding)
        offset += padding + sum(array.nbytes for array in arrays)
    records[_ARRAYS] = files.write(directory / _ARRAYS, buffers)
    header = _Header(
        rows=draft.rows,
        dim=written.shape[1],
        metric=metric,
        covers=covers,
        files=records,
        arrays=places,
        kind=IndexKind.FLAT if built is None else built[0].kind,
        curve=() if built is None else built[1].rungs,
        held=tuple(built[0].held.tolist()) if built and isinstance(built[0], GraphIndex) else (),
    )
    files.write(directory / _HEADER, [frame.seal(_MAGIC, _FORMAT, msgspec.msgpack.encode(header))])


def _build_index(
    vectors: np.ndarray, metric: Metric, kind: IndexKind, device: str
) -> tuple[CandidateIndex, Curve] | None:
    """The index of that kind and what it finds; flat codes, or none, where it finds too little."""
    built: tuple[CandidateIndex, Curve] | None = None
    if kind is IndexKind.HNSW:
        built = GraphIndex.build(vectors, metric)
    elif kind is IndexKind.IVF:
        built = InvertedIndex.build(vectors, metric, for_gpu=device != devices.CPU)
    return built or QuantizedIndex.build(vectors, metric)


def _open_index(path: Path, header: _Header) -> CandidateIndex:
    match header.kind:
        case IndexKind.HNSW:
            return GraphIndex.open(path, np.array(header.held, np.int64))
        case IndexKind.IVF:
            return InvertedIndex.open(path)
        case IndexKind.FLAT:
            return QuantizedIndex.open(path, header.metric)
