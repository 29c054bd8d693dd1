"""Found rows as an answer carries them: everything of a protobuf Hit but its score, which is all that differs
between two answers with the same document.

Rendered rows are kept while they are asked for, bounded by bytes; a row never changes, so they stay good.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from protos.ringfort import v1 as pb
from services import wire
from services.shard.views import View
from shard_router.model import Hit, Include, Schema, Version

#: Memory of a kept row beyond its bytes: tuple, version, text of the id, its place in the table.
_ROW_BYTES = 400
_ROW_BITS, _INCLUDE_BITS = 32, 3


def _tag(field: FieldDescriptor, wire_type: int) -> bytes:
    """What stands before a field of the wire type; https://protobuf.dev/programming-guides/encoding."""
    return _varint(field.number << 3 | wire_type)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_FIXED32, _LENGTH = 5, 2
_HITS = _tag(pb.SearchResponse.DESCRIPTOR.fields_by_name["hits"], _LENGTH)
_SCORE = _tag(pb.Hit.DESCRIPTOR.fields_by_name["score"], _FIXED32)
_SCORE_BYTES = len(_SCORE) + 4


class RenderedRow(NamedTuple):
    """A row as answers carry it: `head` and the score, float32 little-endian, are one of `hits`."""

    id: str
    version: Version
    head: bytes


class RenderedHits(NamedTuple):
    """The hits of one query, best first: rows, and their scores as float32 little-endian."""

    rows: Sequence[RenderedRow]
    scores: bytes

    def body(self) -> bytes:
        """The field `hits` of a SearchResponse."""
        raw, at = self.scores, 0
        pieces: list[bytes] = []
        for row in self.rows:
            pieces += row.head, raw[at : at + 4]
            at += 4
        return b"".join(pieces)

    def values(self, include: Include, schema: Schema) -> list[Hit]:
        """The hits as values, with the parts that they were rendered with."""
        if not (include.attributes or include.text or include.vector):
            scores = np.frombuffer(self.scores, np.float32).tolist()
            return [Hit(row.id, score, row.version) for row, score in zip(self.rows, scores, strict=True)]
        reader = wire.AttributeReader(schema, sys.maxsize)
        return [
            Hit(
                id=row.id,
                score=hit.score,
                version=row.version,
                attributes=reader.read(hit.attributes, 0),
                text=hit.text if hit.HasField("text") else None,
                vector=wire.array_from(hit.vector, "vector", check=False)[0] if include.vector else None,
            )
            for row, hit in zip(self.rows, pb.SearchResponse.FromString(self.body()).hits, strict=True)
        ]


class Rendering:
    """Rendered rows of one replica, the recently used ones kept; safe to use from many threads.

    Two tables take turns: when the young one is full the old one is dropped, and what is asked for
    meanwhile moves over. That is nearly LRU, without its work at every use.
    """

    def __init__(self, schema: Schema, budget_bytes: int) -> None:
        self._schema = schema
        self._half_bytes = budget_bytes // 2
        self._young: dict[int, RenderedRow] = {}
        self._old: dict[int, RenderedRow] = {}
        self.young_bytes = 0

    def rows(
        self, views: Sequence[View], parts: Iterable[int], rows: Sequence[int], include: Include
    ) -> list[RenderedRow]:
        """Rows with the parts of a document asked for, in order; `parts` are places in `views`."""
        if include.vector:
            return [self._render(views[part], row, include) for part, row in zip(parts, rows, strict=False)]
        kind = include.attributes << 1 | include.text
        bases = [view.number << (_ROW_BITS + _INCLUDE_BITS) | kind for view in views]
        young = self._young
        rendered: list[RenderedRow] = []
        for part, row in zip(parts, rows, strict=False):
            key = bases[part] | row << _INCLUDE_BITS
            known = young.get(key)
            if known is None:
                known = self._old.get(key) or self._render(views[part], row, include)
                self._keep(key, known)
            rendered.append(known)
        return rendered

    def _keep(self, key: int, row: RenderedRow) -> None:
        # Without a lock: what two threads may lose or count twice here is a hint and a few bytes.
        if self.young_bytes > self._half_bytes:
            self._old, self._young, self.young_bytes = self._young, {}, 0
        self._young[key] = row
        self.young_bytes += len(row.head) + _ROW_BYTES

    def _render(self, view: View, row: int, include: Include) -> RenderedRow:
        id, version = view.id_at(row), view.version_at(row)
        hit = pb.Hit(id=id)
        if include.attributes:
            wire.put_attributes(hit.attributes, view.attributes_at(row), self._schema)
        if include.text and (text := view.text_at(row)) is not None:
            hit.text = text
        if include.vector:
            hit.vector.CopyFrom(wire.matrix_from(view.vector_at(row)[None, :]))
        told = hit.version
        told.term, told.seq = version.term, version.seq
        body = hit.SerializeToString()
        head = b"".join((_HITS, _varint(len(body) + _SCORE_BYTES), body, _SCORE))
        return RenderedRow(id, version, head)
