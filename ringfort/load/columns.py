"""Which column becomes what, and cells as the values they stand for."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from ringfort.documents import AttributeValue, Document, Vector
from ringfort.load.sources import Row

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a file that make a document; `attributes` maps a column to its attribute's type."""

    id: str
    text: str | None
    attributes: Mapping[str, str]
    vector: str | None = None

    def names(self) -> list[str]:
        """Every column that is read."""
        return [name for name in (self.id, self.text, self.vector, *self.attributes) if name is not None]

    def document(self, cells: Mapping[str, Any]) -> Document:
        """The document in a row. An empty cell is null. Raises ValueError with the problem of a cell."""
        id = cells.get(self.id)
        if id is None or id == "":
            raise ValueError(f"no {self.id}, which is the id")
        text = None if self.text is None else cells.get(self.text)
        return Document(
            id=str(id),
            text=None if text is None or text == "" else str(text),
            vector=None if self.vector is None else to_vector(cells.get(self.vector), self.vector),
            attributes={
                name: value
                for name, type_ in self.attributes.items()
                if (value := to_attribute(cells.get(name), type_, name)) is not None
            },
        )


def to_attribute(cell: Any, type_: str, name: str) -> AttributeValue | None:
    """A cell as a value of an attribute's type; None for an empty one. Raises ValueError."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    try:
        return _CONVERSIONS[type_](cell)
    except (ValueError, TypeError, KeyError) as error:
        shown = repr(cell) if len(repr(cell)) <= 40 else f"{cell!r:.37}…"
        raise ValueError(f"{name}: {shown} is no {type_}") from error


def _int(cell: Any) -> int:
    if isinstance(cell, bool) or (isinstance(cell, float) and not cell.is_integer()):
        raise TypeError
    number = int(cell)
    if number not in _INT64:
        raise ValueError
    return number


def _float(cell: Any) -> float:
    if isinstance(cell, bool):
        raise TypeError
    return float(cell)


def _bool(cell: Any) -> bool:
    return cell if isinstance(cell, bool) else _BOOLS[cell.lower() if isinstance(cell, str) else cell]


def _timestamp(cell: Any) -> datetime:
    """ISO 8601; without an offset it is UTC."""
    return cell if isinstance(cell, datetime) else datetime.fromisoformat(cell)


def _keywords(cell: Any) -> list[str]:
    """A list, or text with commas."""
    parts = cell.split(",") if isinstance(cell, str) else cell
    if not isinstance(parts, list):
        raise TypeError
    return [str(part).strip() for part in parts if part not in (None, "")]


_CONVERSIONS: dict[str, Callable[[Any], AttributeValue]] = {
    "keyword": str,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "timestamp": _timestamp,
    "keywords": _keywords,
}


def to_vector(cell: Any, name: str) -> Vector | None:
    """A cell as a vector: a list of numbers, or one written as JSON. Raises ValueError."""
    if cell is None or cell == "":
        return None
    try:
        vector = np.asarray(json.loads(cell) if isinstance(cell, str) else cell, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: not a list of numbers") from error
    if vector.ndim != 1:
        raise ValueError(f"{name}: not a list of numbers")
    return vector


def first_dim(rows: Iterable[Row], columns: Columns) -> int | None:
    """The dimension of the first vector there is; None where documents bring none."""
    if columns.vector is None:
        return None
    vectors = (to_vector(row.cells.get(columns.vector), columns.vector) for row in rows)
    return next((vector.size for vector in vectors if vector is not None), None)
