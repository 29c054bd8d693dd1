"""What a caller hands in: documents, patches, versions and write tokens, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt

#: float32; one row is [dim], many are [n, dim].
Vector = npt.NDArray[np.float32]
#: keyword, int, float, bool, timestamp (aware datetime), keywords (a list). None is null: left out.
AttributeValue = str | int | float | bool | datetime | list[str] | tuple[str, ...]
Attributes = Mapping[str, AttributeValue | None]


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A document's version: greater is newer."""

    term: int
    seq: int


#: `if_version` of a document that must not exist yet.
ABSENT = Version(0, 0)


@dataclass(frozen=True, slots=True)
class WriteToken:
    """The positions a write reached. Opaque: hand it back as `read_after` to see that write."""

    positions: Mapping[str, int] = field(default_factory=dict)

    def __or__(self, other: "WriteToken") -> "WriteToken":
        """The token of both writes."""
        later = {log: max(at, self.positions.get(log, 0)) for log, at in other.positions.items()}
        return WriteToken({**self.positions, **later})


@dataclass(frozen=True, slots=True)
class Document:
    """One document. Written without a vector, its text is embedded by the collection's model.

    `vector` is float32 [dim]. `version` is set in answers only; `if_version` refuses the write unless
    the stored document has that version (ABSENT: unless there is none).
    """

    id: str
    text: str | None = None
    vector: Vector | None = field(default=None, compare=False)
    attributes: Attributes = field(default_factory=dict)
    version: Version | None = None
    if_version: Version | None = None


@dataclass(frozen=True, slots=True)
class Patch:
    """New values for some attributes of a stored document; None clears one, the others stay."""

    id: str
    attributes: Attributes
    if_version: Version | None = None
