"""The words every room shares, as plain values.

Units: positions (`seq`) are counts in one log; timestamps are integer microseconds since 1970 UTC;
vectors are float32. Names are those of the API contract. What there is one of per document is a msgspec
Struct: made in a seventh of the time of a frozen dataclass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from shard_router.errors import RingfortError

#: keyword, int, float, bool, timestamp (int microseconds), keywords (tuple of str). Absent is null.
AttributeValue = str | int | float | bool | tuple[str, ...]
Attributes = Mapping[str, AttributeValue]


class AttributeType(StrEnum):
    """What an attribute holds."""

    KEYWORD = "keyword"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    TIMESTAMP = "timestamp"
    KEYWORDS = "keywords"


Schema = Mapping[str, AttributeType]


class Metric(StrEnum):
    """How vectors are compared; a larger score is always better (L2 is negated)."""

    COSINE = "cosine"
    INNER_PRODUCT = "inner_product"
    L2 = "l2"


class Version(msgspec.Struct, frozen=True, order=True):
    """A document's version: greater is newer."""

    term: int
    seq: int


#: `if_version` of a document that must not exist yet.
ABSENT = Version(0, 0)

#: The database that knows of everything; documents may lie in others, too.
HOME = "home"


@dataclass(frozen=True, slots=True)
class Collection:
    """A named set of documents with one schema, and its live generation."""

    uid: int
    tenant: str
    name: str
    dim: int
    metric: Metric
    #: Declared attributes; any other is refused on write.
    schema: Schema
    #: Grows with every change of the schema; part of every answer's cache key.
    schema_version: int
    #: NAME@VERSION of the embedding model; None where documents bring their own vectors.
    model: str | None
    slots: int
    shards: int
    replicas: int
    #: auto, flat, hnsw or ivf.
    index: str
    max_staleness_ms: int
    generation: int
    #: Embedding space of the live generation; `vectors:<dim>` for documents that bring their own.
    space: str
    created_at_us: int
    aliases: tuple[str, ...] = ()
    #: The databases its documents lie in, for good; each of them is a log of its own.
    databases: tuple[str, ...] = (HOME,)


# Documents are no part of cycles (gc=False): the garbage collector need not walk over a memtable of them.
class LogRow(msgspec.Struct, frozen=True, gc=False):
    """One document as the log last left it; a tombstone where `deleted`."""

    id: str
    slot: int
    version: Version
    deleted: bool
    text: str | None
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class LogDelta:
    """What a log holds in (after, upto]: rows in order of position, each id at most once, newest version.

    Positions need not be dense: a document written twice shows once, at its later position.
    `vectors[i]` belongs to `rows[i]` and is zero for a tombstone.
    """

    log_id: str
    after: int
    upto: int
    rows: Sequence[LogRow]
    vectors: np.ndarray


class Upsert(msgspec.Struct, frozen=True, gc=False):
    """Replace a whole document. `vector` is float32 [dim]."""

    id: str
    text: str | None
    attributes: Attributes
    vector: np.ndarray
    if_version: Version | None = None


class Patch(msgspec.Struct, frozen=True):
    """Set some attributes, clear others; text and vector stay."""

    id: str
    attributes: Attributes
    clear: tuple[str, ...] = ()
    if_version: Version | None = None


class Remove(msgspec.Struct, frozen=True):
    """Leave a tombstone; removing what is not there changes nothing."""

    id: str
    if_version: Version | None = None


Write = Upsert | Patch | Remove


class WriteOutcome(msgspec.Struct, frozen=True):
    """What became of one write: a version, or the error that refused it alone.

    `version` is None where nothing changed (a Remove of an unknown id) or where `error` is set.
    """

    version: Version | None = None
    error: "RingfortError | None" = None


@dataclass(frozen=True, slots=True)
class Commit:
    """One committed batch: outcomes in the order of the writes, and the log it made.

    `upto` is the log's position after the batch; `delta` is what a replica at `delta.after` applies
    to stand at `upto`, or None where the rows are not at hand and the tail has to be read. `epoch` is
    the shard map's as of the commit, 0 where it was not told.
    """

    log_id: str
    upto: int
    outcomes: Sequence[WriteOutcome]
    delta: LogDelta | None
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Include:
    """Which parts of a document an answer carries."""

    attributes: bool = True
    text: bool = True
    vector: bool = False


@dataclass(frozen=True, slots=True)
class Hit:
    """One found document, as of the very version that was scored."""

    id: str
    score: float
    version: Version
    attributes: Attributes = field(default_factory=dict)
    text: str | None = None
    #: float32 [dim], where asked for.
    vector: np.ndarray | None = None
