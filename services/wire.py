"""Between protobuf messages and the values of shard_router.model; nothing else knows both.

Reading checks form (types, sizes, finiteness) and names the field at fault; writing never fails.
Vectors are views of the message's bytes where their dtype is F32.
"""

import functools
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence, Sized
from datetime import UTC, datetime, timedelta

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort
from protos.ringfort import v1 as pb
from shard_router import filter_text, filters
from shard_router.errors import DimensionMismatch, InvalidField, InvalidFilter
from shard_router.model import (
    Attributes,
    AttributeType,
    AttributeValue,
    Hit,
    Include,
    LogRow,
    Metric,
    Schema,
    Version,
)

if sys.byteorder != "little":  # the wire is little-endian, and every array here is a view of it
    raise ImportError("ringfort runs on little-endian machines only")

ATTRIBUTE_TYPES = {
    pb.KEYWORD: AttributeType.KEYWORD,
    pb.INT: AttributeType.INT,
    pb.FLOAT: AttributeType.FLOAT,
    pb.BOOL: AttributeType.BOOL,
    pb.TIMESTAMP: AttributeType.TIMESTAMP,
    pb.KEYWORDS: AttributeType.KEYWORDS,
}
ATTRIBUTE_TYPES_ON_WIRE = {value: key for key, value in ATTRIBUTE_TYPES.items()}
METRICS = {pb.COSINE: Metric.COSINE, pb.INNER_PRODUCT: Metric.INNER_PRODUCT, pb.L2: Metric.L2}
METRICS_ON_WIRE = {value: key for key, value in METRICS.items()}
OPS = {
    pb.Compare.EQ: filters.Op.EQ,
    pb.Compare.NE: filters.Op.NE,
    pb.Compare.LT: filters.Op.LT,
    pb.Compare.LE: filters.Op.LE,
    pb.Compare.GT: filters.Op.GT,
    pb.Compare.GE: filters.Op.GE,
}
#: Squared and summed over the largest dimension, this still is a float32.
MAX_MAGNITUDE = 1e16
OUT_OF_BOUNDS = f"has a value that is not finite, or beyond {MAX_MAGNITUDE:g}"
#: Filter messages nest at most this deep; the text form has a bound of its own.
MAX_FILTER_DEPTH = 64
#: What an answer carries where the request does not say.
ALL = Include()
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The years 1 to 9999, which are all that a Timestamp may say.
FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999


def array_from(matrix: pb.Matrix, field: str, *, dim: int | None = None, check: bool = True) -> np.ndarray:
    """A Matrix as float32 [rows, dim]; InvalidField or DimensionMismatch where it is not one.

    With `check` (the default) a value that is not finite or out of bounds is InvalidField, too; without,
    the caller looks.
    """
    if dim is not None and matrix.dim != dim:
        raise DimensionMismatch(field, matrix.dim, dim)
    itemsize = {pb.F32: 4, pb.F16: 2, pb.I8: 1}.get(matrix.dtype)
    if itemsize is None:
        raise InvalidField(f"{field}.dtype", f"{matrix.dtype} is not a dtype")
    want = matrix.rows * matrix.dim * itemsize
    if len(matrix.data) != want:
        raise InvalidField(f"{field}.data", f"{len(matrix.data)} bytes where rows x dim need {want}")
    shape = (matrix.rows, matrix.dim)
    if matrix.dtype == pb.F32:
        values = np.frombuffer(matrix.data, np.float32).reshape(shape)
    elif matrix.dtype == pb.F16:
        values = np.frombuffer(matrix.data, np.float16).reshape(shape).astype(np.float32)
    else:
        if len(matrix.scales) != 4 * matrix.rows:
            raise InvalidField(f"{field}.scales", f"{len(matrix.scales)} bytes where I8 needs 4 a row")
        scales = np.frombuffer(matrix.scales, np.float32)[:, None]
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
            values = np.frombuffer(matrix.data, np.int8).reshape(shape) * scales
    if check and values.size:
        # Two passes without a temporary array; a NaN comes through both and fits no bound.
        low, high = np.minimum.reduce(values, axis=None), np.maximum.reduce(values, axis=None)
        if not (low >= -MAX_MAGNITUDE and high <= MAX_MAGNITUDE):
            row = int(np.argmin(rows_in_bounds(values)))
            raise InvalidField(field, f"row {row} {OUT_OF_BOUNDS}")
    return values


def rows_in_bounds(values: np.ndarray) -> np.ndarray:
    """Which rows, bool [n], hold only finite values that can be compared without overflow."""
    # Without a temporary of the matrix's size; a NaN comes through both and fits no bound.
    inside: np.ndarray = (values.min(axis=1) >= -MAX_MAGNITUDE) & (values.max(axis=1) <= MAX_MAGNITUDE)
    return inside


def matrix_from(vectors: np.ndarray, dtype: int = pb.F32) -> pb.Matrix:
    """float32 [rows, dim] as a Matrix of `dtype`; I8 has one scale a row, its largest magnitude over 127."""
    rows, dim = vectors.shape
    if dtype == pb.F16:
        return pb.Matrix(data=vectors.astype(np.float16).tobytes(), dtype=pb.F16, rows=rows, dim=dim)
    if dtype == pb.I8:
        scales = np.abs(vectors).max(axis=1, initial=0.0).astype(np.float32) / np.float32(127)
        codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
        return pb.Matrix(data=codes.tobytes(), dtype=pb.I8, rows=rows, dim=dim, scales=scales.tobytes())
    data = np.ascontiguousarray(vectors, np.float32).tobytes()
    return pb.Matrix(data=data, dtype=pb.F32, rows=rows, dim=dim)


def microseconds(timestamp: Timestamp) -> int:
    """A Timestamp as integer microseconds since 1970 UTC."""
    return timestamp.seconds * 1_000_000 + timestamp.nanos // 1_000


def timestamp(us: int) -> Timestamp:
    """The Timestamp of integer microseconds since 1970 UTC."""
    return Timestamp(seconds=us // 1_000_000, nanos=us % 1_000_000 * 1_000)


def value_from(value: pb.Value, field: str) -> AttributeValue | None:
    """A Value in model terms; None where nothing is set.

    Floats are finite, text holds no NUL, timestamps lie in the years 1 to 9999.
    """
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "timestamp":
        us = microseconds(value.timestamp)
        if not FIRST_US <= us <= LAST_US or not 0 <= value.timestamp.nanos < 1_000_000_000:
            raise InvalidField(field, "is not a timestamp of the years 1 to 9999")
        return us
    if kind == "keywords":
        keywords = tuple(value.keywords.values)
        if any("\0" in word for word in keywords):
            raise InvalidField(field, "holds a NUL character")
        return keywords
    plain: AttributeValue = getattr(value, kind)
    if kind == "float" and not np.isfinite(float(plain)):  # type: ignore[arg-type]  # kind says so
        raise InvalidField(field, "is not finite")
    if kind == "keyword" and "\0" in str(plain):
        raise InvalidField(field, "holds a NUL character")
    return plain


class AttributeReader:
    """Reads documents' attributes by their schema; an int is taken for a float, nothing else is converted.

    Made once for a batch: what has the declared kind, which is nearly all, is looked up and taken.
    """

    def __init__(self, schema: Schema, max_bytes: int) -> None:
        self._declared = {name: kind.value for name, kind in schema.items()}
        self._max_bytes = max_bytes

    def read(self, values: Mapping[str, pb.Value], most_bytes: int) -> dict[str, AttributeValue]:
        """The values by name, null ones absent; InvalidField names one as `attributes.<name>`.

        most_bytes: what all of them have at most, for example the size of the message they came in.
        """
        read: dict[str, AttributeValue] = {}
        declared = self._declared
        for name in values:  # `items` of a message's map is three times slower
            value = values[name]
            kind = value.WhichOneof("kind")
            if kind is None and name in declared:
                continue
            if kind is None or kind != declared.get(name):
                read[name] = self._converted(name, value, kind)
            elif kind == "int":
                read[name] = value.int
            elif kind == "keyword":
                keyword = read[name] = value.keyword
                if "\0" in keyword:
                    raise InvalidField(f"attributes.{name}", "holds a NUL character")
            else:
                plain = value_from(value, f"attributes.{name}")
                assert plain is not None, "it has a kind"
                read[name] = plain
        if most_bytes > self._max_bytes:
            size = sum(len(name) + values[name].ByteSize() for name in read)
            if size > self._max_bytes:
                raise InvalidField("attributes", f"{size} bytes, the limit is {self._max_bytes}")
        return read

    def _converted(self, name: str, value: pb.Value, kind: str | None) -> AttributeValue:
        declared = self._declared.get(name)
        if declared is None:
            raise InvalidField(f"attributes.{name}", "the collection declares no such attribute")
        if kind == "int" and declared == AttributeType.FLOAT.value:
            return float(value.int)
        raise InvalidField(f"attributes.{name}", f"is {kind} where the collection declares {declared}")


def value_on_wire(value: AttributeValue, declared: AttributeType) -> pb.Value:
    """A model value as a Value of its declared type."""
    if declared is AttributeType.KEYWORD:
        return pb.Value(keyword=str(value))
    if declared is AttributeType.KEYWORDS:
        return pb.Value(keywords=pb.KeywordList(values=value))  # type: ignore[arg-type]  # a tuple, by the schema
    if declared is AttributeType.BOOL:
        return pb.Value(bool=bool(value))
    if declared is AttributeType.FLOAT:
        return pb.Value(float=float(value))  # type: ignore[arg-type]  # a number, by the schema
    if declared is AttributeType.TIMESTAMP:
        return pb.Value(timestamp=timestamp(int(value)))  # type: ignore[arg-type]  # microseconds, by the schema
    return pb.Value(int=int(value))  # type: ignore[arg-type]  # a number, by the schema


def attributes_on_wire(attributes: Attributes, schema: Schema) -> dict[str, pb.Value]:
    """Attributes as the map of a message; what the schema no longer declares is left out."""
    return {name: value_on_wire(value, schema[name]) for name, value in attributes.items() if name in schema}


def put_attributes(into: MutableMapping[str, pb.Value], attributes: Attributes, schema: Schema) -> None:
    """Attributes into the map of a message, as `attributes_on_wire` says."""
    for name, value in attributes.items():
        match schema.get(name):
            case None:
                continue
            case AttributeType.KEYWORD:
                into[name].keyword = str(value)
            case AttributeType.INT:
                into[name].int = int(value)  # type: ignore[arg-type]  # a number, by the schema
            case declared:
                into[name].CopyFrom(value_on_wire(value, declared))


def schema_on_wire(schema: Schema) -> "dict[str, pb.AttributeType.ValueType]":
    """A schema as the map of a message."""
    return {name: ATTRIBUTE_TYPES_ON_WIRE[kind] for name, kind in schema.items()}


def version_from(version: pb.Version) -> Version:
    """A Version in model terms."""
    return Version(version.term, version.seq)


def version_on_wire(version: Version) -> pb.Version:
    """A Version as a message."""
    return pb.Version(term=version.term, seq=version.seq)


@functools.cache
def _include(attributes: bool, text: bool, vector: bool) -> Include:
    return Include(attributes, text, vector)


def include_from(request: pb.Include, given: bool) -> Include:
    """Which parts to answer with: attributes and text where the request does not say."""
    return _include(request.attributes, request.text, request.vector) if given else ALL


def effort_from(
    request: pb.SearchRequest | pb.BatchSearchRequest | pb.RecommendRequest.Retrieve, prefix: str = ""
) -> Effort:
    """How hard to look. InvalidField for what is no share, and for both `effort` and `recall`."""
    share = request.effort if request.HasField("effort") else None
    recall = request.recall if request.HasField("recall") else None
    if share is None and recall is None:
        return DEFAULT_EFFORT
    for name, value in (("effort", share), ("recall", recall)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise InvalidField(f"{prefix}{name}", f"{value} is not between 0 and 1")
    if share is not None and recall is not None:
        raise InvalidField(f"{prefix}recall", "is given beside effort: give one of them")
    return Effort(share, recall)


def filter_from(message: pb.Filter, field: str = "filter", depth: int = 0) -> filters.Filter | None:
    """A Filter message, structured or text, as an unchecked filter; None where nothing is set."""
    if depth > MAX_FILTER_DEPTH:
        raise InvalidFilter(field, f"nests deeper than {MAX_FILTER_DEPTH}")
    node = message.WhichOneof("node")
    if node is None:
        return None
    if node == "text":
        return filter_text.parse(message.text, field)
    inner = getattr(message, node)
    if node in ("all", "any"):
        kind = filters.All if node == "all" else filters.AnyOf
        parts = [
            _filter_required(part, f"{field}.{node}.filters[{i}]", depth + 1)
            for i, part in enumerate(inner.filters)
        ]
        if not parts:
            raise InvalidFilter(f"{field}.{node}.filters", "is empty")
        return kind(tuple(parts))
    if node == "not":
        return filters.Not(_filter_required(inner, f"{field}.not", depth + 1))
    if not inner.attribute:
        raise InvalidFilter(f"{field}.{node}.attribute", "is empty")
    if node == "exists":
        return filters.Exists(inner.attribute)
    if node == "compare":
        if inner.op not in OPS:
            raise InvalidFilter(f"{field}.compare.op", f"{inner.op} is not an operator")
        value = _value_required(inner.value, f"{field}.compare.value")
        return filters.Compare(inner.attribute, OPS[inner.op], value)
    if node == "in":
        values = (_value_required(v, f"{field}.in.values[{i}]") for i, v in enumerate(inner.values))
        return filters.In(inner.attribute, tuple(values))
    bounds = {
        name: _value_required(getattr(inner, name), f"{field}.range.{name}")
        for name in ("gte", "gt", "lte", "lt")
        if inner.HasField(name)
    }
    if not bounds:
        raise InvalidFilter(f"{field}.range", "has no bound")
    return filters.Range(inner.attribute, **bounds)


def _filter_required(message: pb.Filter, field: str, depth: int) -> filters.Filter:
    found = filter_from(message, field, depth)
    if found is None:
        raise InvalidFilter(field, "is empty")
    return found


def _value_required(value: pb.Value, field: str) -> str | int | float | bool:
    found = value_from(value, field)
    if found is None:
        raise InvalidFilter(field, "is empty")
    if isinstance(found, tuple):
        raise InvalidFilter(field, "is a list where one value is meant")
    if value.WhichOneof("kind") == "timestamp":
        # As text, so that checking tells a timestamp from an int by the schema.
        return (EPOCH + timedelta(microseconds=microseconds(value.timestamp))).isoformat()
    return found


def hit_on_wire(hit: Hit, schema: Schema, features: Mapping[str, float] | None = None) -> pb.Hit:
    """A hit as a message."""
    return pb.Hit(
        id=hit.id,
        score=hit.score,
        attributes=attributes_on_wire(hit.attributes, schema),
        text=hit.text,
        vector=None if hit.vector is None else matrix_from(hit.vector[None, :]),
        version=version_on_wire(hit.version),
        features=features,
    )


def document_on_wire(row: LogRow, vector: np.ndarray | None, schema: Schema, include: Include) -> pb.Document:
    """A stored document as a message, with the parts asked for."""
    return pb.Document(
        id=row.id,
        text=row.text if include.text else None,
        vector=None if vector is None else matrix_from(vector[None, :]),
        attributes=attributes_on_wire(row.attributes, schema) if include.attributes else None,
        version=version_on_wire(row.version),
    )


def token_on_wire(positions: Mapping[str, int]) -> pb.WriteToken:
    """Positions by log as a write token."""
    return pb.WriteToken(positions=positions)


def check_wait(wait: "pb.Wait.ValueType") -> None:
    """A wait that is known here: another is stricter than we could promise."""
    if wait not in (pb.DURABLE, pb.VISIBLE):
        raise InvalidField("wait", f"{wait} is not a wait")


def check_rows(rows: Sized, field: str, limit: int) -> None:
    """At least one row, and no more than the limit."""
    if not len(rows):
        raise InvalidField(field, "is empty")
    if len(rows) > limit:
        raise InvalidField(field, f"{len(rows)} rows, the limit is {limit}")


def keys(names: Iterable[str], field: str, max_bytes: int) -> Sequence[str]:
    """Document ids, each 1 to `max_bytes` bytes of UTF-8 without NUL; InvalidField names the one at fault."""
    checked = list(names)
    for i, name in enumerate(checked):
        key(name, f"{field}[{i}]", max_bytes)
    return checked


def key(name: str, field: str, max_bytes: int) -> str:
    """One document id, checked."""
    if not name:
        raise InvalidField(field, "is empty")
    if len(name) > max_bytes or len(name.encode()) > max_bytes:
        raise InvalidField(field, f"{len(name.encode())} bytes, the limit is {max_bytes}")
    if "\0" in name:
        raise InvalidField(field, "holds a NUL character")
    return name
