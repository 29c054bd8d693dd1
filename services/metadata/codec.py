"""Documents as the database stores them: attributes as JSON, vectors as little-endian float32 (pure)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from shard_router.errors import SegmentCorrupt
from shard_router.model import Attributes, AttributeType, AttributeValue, Collection, LogRow, Schema, Version

#: float32 as stored, whatever the machine.
STORED = np.dtype("<f4")

_to_json = msgspec.json.Encoder().encode


def attributes_to_json(attributes: Attributes) -> str:
    """Attributes as one JSON object: keywords as arrays, timestamps as integers, integers of any size.

    Raises ValueError (a NaN or infinite float) or TypeError (a value of no attribute type).
    """
    for name, value in attributes.items():
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, which JSON has no word for")
    return _to_json(attributes).decode()


def attributes_from_json(stored: dict[str, Any], schema: Schema) -> dict[str, AttributeValue]:
    """Attributes with the types their schema declares; a JSON 3 of a float attribute is 3.0 again."""
    for name, value in stored.items():
        match schema.get(name):
            case AttributeType.FLOAT:
                stored[name] = float(value)
            case AttributeType.KEYWORDS:
                stored[name] = tuple(value)
    return stored


def row_from(stored: Sequence[Any], schema: Schema) -> LogRow:
    """A row of (slot, id, term, seq, deleted, text, attributes)."""
    slot, id, term, seq, deleted, text, attributes = stored
    return LogRow(id, slot, Version(term, seq), deleted, text, attributes_from_json(attributes, schema))


def matrix_from(
    rows: Sequence[LogRow | None], stored: Mapping[int, bytes | None], collection: Collection
) -> np.ndarray:
    """Vectors of rows, float32 [len(rows), dim]; zeros for a tombstone and for None.

    `stored[i]` is the vector of `rows[i]`. Raises SegmentCorrupt where a live row has no vector of the
    collection's dimension at its own position.
    """
    row_bytes = collection.dim * STORED.itemsize
    nothing = bytes(row_bytes)
    parts = []
    for place, row in enumerate(rows):
        if row is None or row.deleted:
            parts.append(nothing)
            continue
        vector = stored.get(place)
        if vector is None or len(vector) != row_bytes:
            table = f"vectors_{collection.uid}_{collection.generation}"
            raise SegmentCorrupt(table, f"document {row.id!r} has no vector at position {row.version.seq}")
        parts.append(vector)
    matrix = np.frombuffer(bytearray().join(parts), dtype=STORED).reshape(len(rows), collection.dim)
    return matrix.astype(np.float32, copy=False)
