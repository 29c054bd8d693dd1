"""Python values to ringfort.v1 messages and back. Vectors travel packed, never as lists of floats."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from protos.ringfort import v1 as pb
from ringfort.documents import Attributes, AttributeValue, Document, Vector, Version, WriteToken
from ringfort.errors import InvalidArgument

V_co = TypeVar("V_co", covariant=True)

_DOCUMENT_KEYS = frozenset({"id", "text", "vector", "attributes", "if_version"})
_INCLUDE_PARTS = frozenset({"attributes", "text", "vector"})
_DTYPES = {pb.F32: "<f4", pb.F16: "<f2", pb.I8: "i1"}


class NamedValues(Hashable, Protocol[V_co]):
    """A protobuf enum."""

    def keys(self) -> Sequence[str]: ...
    def Value(self, name: str) -> V_co: ...


def enum_value(enum: NamedValues[V_co], name: str, field: str) -> V_co:
    """The enum's value of that name, in any case; InvalidArgument says which names there are."""
    value: V_co | None = _values_of(enum).get(name.upper())
    if value is None:
        raise InvalidArgument(f"{field}: {name!r} is none of {', '.join(enum.keys())}", field=field)
    return value


@cache
def _values_of(enum: Any) -> Mapping[str, Any]:
    return {name: enum.Value(name) for name in enum.keys()}  # noqa: SIM118  # an enum wrapper is no container


def to_value(value: AttributeValue, field: str) -> pb.Value:
    """One attribute's value, its type told by the Python type; a naive datetime is taken as UTC."""
    try:
        match value:
            case str():
                return pb.Value(keyword=value)
            case bool() | np.bool_():
                return pb.Value(bool=bool(value))
            case int() | np.integer():
                return pb.Value(int=int(value))
            case float() | np.floating():
                return pb.Value(float=float(value))
            case datetime():
                stamp = Timestamp()
                stamp.FromDatetime(value)
                return pb.Value(timestamp=stamp)
            case list() | tuple() | set() | frozenset():
                return pb.Value(keywords=pb.KeywordList(values=value))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{field}: {error}", field=field) from error
    raise InvalidArgument(f"{field}: a {type(value).__name__} is no attribute value", field=field)


def from_value(value: pb.Value) -> AttributeValue:
    """The Python value of an attribute: timestamps as aware datetimes, keywords as a tuple."""
    match value.WhichOneof("kind"):
        case "keyword":
            return value.keyword
        case "int":
            return value.int
        case "float":
            return value.float
        case "bool":
            return value.bool
        case "timestamp":
            return value.timestamp.ToDatetime(tzinfo=UTC)
        case _:
            return tuple(value.keywords.values)


def to_values(attributes: Attributes, field: str = "attributes") -> dict[str, pb.Value]:
    """Attributes as messages; null ones are left out."""
    return {
        name: to_value(value, f"{field}.{name}") for name, value in attributes.items() if value is not None
    }


def from_values(attributes: Mapping[str, pb.Value]) -> dict[str, AttributeValue]:
    """Attributes as Python values."""
    return {name: from_value(value) for name, value in attributes.items()}


def to_vector(vector: object, field: str) -> Vector:
    """One vector as float32 [dim]; InvalidArgument for anything but a one-dimensional numpy array."""
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind not in "fiu":
        raise InvalidArgument(f"{field}: a numpy array [dim] of numbers is needed", field=field)
    return np.ascontiguousarray(vector, dtype="<f4")


def put_vector(into: pb.Matrix, vector: object, field: str) -> None:
    """One vector [dim] into a message's matrix, as `to_vector` says."""
    packed = to_vector(vector, field)
    into.data = packed.tobytes()
    into.rows, into.dim = 1, len(packed)


def to_matrix(vectors: object, field: str) -> pb.Matrix:
    """Vectors [n, dim] as a packed F32 matrix; InvalidArgument for anything but such a numpy array."""
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise InvalidArgument(f"{field}: a numpy array [n, dim] of numbers is needed", field=field)
    rows, dim = vectors.shape
    packed = np.ascontiguousarray(vectors, dtype="<f4")
    return pb.Matrix(data=packed.tobytes(), dtype=pb.F32, rows=rows, dim=dim)


def from_matrix(matrix: pb.Matrix) -> Vector:
    """The vectors of a matrix, float32 [rows, dim]; F32 is a read-only view of the message's bytes."""
    packed = np.frombuffer(matrix.data, dtype=_DTYPES[matrix.dtype]).reshape(matrix.rows, matrix.dim)
    vectors = packed.astype(np.float32, copy=False)
    if matrix.dtype == pb.I8:
        vectors = vectors * np.frombuffer(matrix.scales, dtype="<f4")[:, None]
    return vectors


def to_version(version: Version | None) -> pb.Version | None:
    """A version as its message."""
    return None if version is None else pb.Version(term=version.term, seq=version.seq)


def to_token(token: WriteToken | None) -> pb.WriteToken | None:
    """A write token as its message."""
    return None if token is None else pb.WriteToken(positions=token.positions)


def to_document(document: Document | Mapping[str, object]) -> tuple[pb.Document, Vector | None]:
    """A document as a message without its vector, and the vector, so that a batch's can be packed."""
    if not isinstance(document, Document):
        document = _document_of(document)
    field = f"document {document.id!r}"
    try:
        message = pb.Document(
            id=document.id,
            text=document.text,
            attributes=to_values(document.attributes),
            if_version=to_version(document.if_version),
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{field}: {error}", field="document") from error
    vector = None if document.vector is None else to_vector(document.vector, f"{field}: vector")
    return message, vector


def _document_of(fields: Mapping[str, object]) -> Document:
    unknown = fields.keys() - _DOCUMENT_KEYS
    if unknown:
        raise InvalidArgument(
            f"document {fields.get('id')!r}: unknown key {min(unknown)!r}; a document has id, text, vector, "
            "attributes and if_version, and everything else goes under attributes",
            field=min(unknown),
        )
    if "id" not in fields:
        raise InvalidArgument("a document needs an id", field="id")
    return Document(**fields)  # type: ignore[arg-type]  # to_document checks the values


def from_document(message: pb.Document) -> Document:
    """A document of an answer."""
    return Document(
        id=message.id,
        text=message.text if message.HasField("text") else None,
        vector=from_matrix(message.vector)[0] if message.HasField("vector") else None,
        attributes=from_values(message.attributes),
        version=Version(message.version.term, message.version.seq) if message.HasField("version") else None,
    )


def to_filter(expression: str | pb.Filter | None) -> pb.Filter | None:
    """A filter message; text is parsed by the service, which knows the collection's attributes."""
    return pb.Filter(text=expression) if isinstance(expression, str) else expression


def to_include(parts: Iterable[str] | None) -> pb.Include | None:
    """Which parts of a document to answer with; None leaves it to the service (attributes and text)."""
    if parts is None:
        return None
    return _include(frozenset((parts,) if isinstance(parts, str) else parts))


@cache
def _include(names: frozenset[str]) -> pb.Include:
    if unknown := names - _INCLUDE_PARTS:
        raise InvalidArgument(
            f"include: {min(unknown)!r} is none of {', '.join(sorted(_INCLUDE_PARTS))}", field="include"
        )
    return pb.Include(**dict.fromkeys(names, True))
