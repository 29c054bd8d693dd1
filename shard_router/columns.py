"""Attribute columns of an immutable block of rows: what filters and ranking features read.

A column is a few plain numpy arrays, so it can lie in a file and be memory-mapped. Keywords are codes
into a dictionary sorted by code point, which makes every keyword comparison one of integers. A column
without a single value is not stored; it, and one the schema gained later, reads as all null.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from shard_router.model import Attributes, AttributeType, AttributeValue, Schema


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Distinct texts in ascending order of code point; a text's rank is its code."""

    #: The texts' UTF-8, one after another; uint8.
    blob: np.ndarray
    #: Text i is blob[offsets[i]:offsets[i + 1]]; int64 [texts + 1].
    offsets: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> tuple["Dictionary", dict[str, int]]:
        """The dictionary of these texts (repeats allowed), and each text's code."""
        distinct = sorted(set(texts))
        encoded = [text.encode() for text in distinct]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(blob, offsets), {text: code for code, text in enumerate(distinct)}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def text(self, code: int) -> str:
        """The text of a code."""
        return str(self._bytes(code), "utf-8")

    def rank(self, text: str) -> tuple[int, bool]:
        """How many texts come before `text`, and whether it is here; if it is, the rank is its code."""
        wanted = text.encode()
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            # UTF-8 sorts as its code points do.
            if bytes(self._bytes(middle)) < wanted:
                low = middle + 1
            else:
                high = middle
        return low, low < len(self) and self._bytes(low) == wanted

    def codes(self, texts: Iterable[str]) -> list[int]:
        """The codes of those texts that are here."""
        return [code for code, here in map(self.rank, texts) if here]

    def _bytes(self, code: int) -> memoryview:
        return self.blob.data[self.offsets.item(code) : self.offsets.item(code + 1)]


@dataclass(frozen=True, slots=True)
class KeywordColumn:
    """One text a row: codes int32 [rows], -1 for null."""

    codes: np.ndarray
    dictionary: Dictionary

    def __len__(self) -> int:
        return len(self.codes)

    def present(self) -> np.ndarray:
        """Which rows have a value, bool [rows]; fresh."""
        return self.codes >= 0

    def at(self, row: int) -> str | None:
        """The value of one row, None for null."""
        code = self.codes.item(row)
        return None if code < 0 else self.dictionary.text(code)

    def arrays(self) -> dict[str, np.ndarray]:
        """The column's arrays by part."""
        return {"codes": self.codes, "blob": self.dictionary.blob, "offsets": self.dictionary.offsets}


@dataclass(frozen=True, slots=True)
class KeywordsColumn:
    """A list of texts a row: codes[starts[row]:starts[row + 1]], in the order given."""

    #: int64 [rows + 1].
    starts: np.ndarray
    #: int32 [texts].
    codes: np.ndarray
    #: An empty list is a value, null is none; bool [rows].
    presence: np.ndarray
    dictionary: Dictionary

    def __len__(self) -> int:
        return len(self.presence)

    def present(self) -> np.ndarray:
        """Which rows have a value, bool [rows]; fresh."""
        return self.presence.copy()

    def at(self, row: int) -> tuple[str, ...] | None:
        """The value of one row, None for null."""
        if not self.presence.item(row):
            return None
        codes = self.codes[self.starts.item(row) : self.starts.item(row + 1)].tolist()
        return tuple(map(self.dictionary.text, codes))

    def rows_of(self, positions: np.ndarray) -> np.ndarray:
        """The row that each position in `codes` belongs to, int64."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def arrays(self) -> dict[str, np.ndarray]:
        """The column's arrays by part."""
        return {
            "starts": self.starts,
            "codes": self.codes,
            "present": self.presence,
            "blob": self.dictionary.blob,
            "offsets": self.dictionary.offsets,
        }


@dataclass(frozen=True, slots=True)
class IntColumn:
    """One integer a row (or microseconds of a timestamp): values int64 [rows], 0 where not present."""

    values: np.ndarray
    presence: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def present(self) -> np.ndarray:
        """Which rows have a value, bool [rows]; fresh."""
        return self.presence.copy()

    def at(self, row: int) -> int | None:
        """The value of one row, None for null."""
        return int(self.values.item(row)) if self.presence.item(row) else None

    def numbers(self) -> np.ndarray:
        """float64 [rows], NaN for null."""
        return np.where(self.presence, self.values, np.nan)

    def arrays(self) -> dict[str, np.ndarray]:
        """The column's arrays by part."""
        return {"values": self.values, "present": self.presence}


@dataclass(frozen=True, slots=True)
class FloatColumn:
    """One number a row: values float64 [rows], NaN for null."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def present(self) -> np.ndarray:
        """Which rows have a value, bool [rows]; fresh."""
        present: np.ndarray = ~np.isnan(self.values)
        return present

    def at(self, row: int) -> float | None:
        """The value of one row, None for null."""
        value = float(self.values.item(row))
        return None if value != value else value

    def numbers(self) -> np.ndarray:
        """float64 [rows], NaN for null; the column itself, not a copy."""
        return self.values

    def arrays(self) -> dict[str, np.ndarray]:
        """The column's arrays by part."""
        return {"values": self.values}


@dataclass(frozen=True, slots=True)
class BoolColumn:
    """One truth value a row: values int8 [rows], -1 for null."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def present(self) -> np.ndarray:
        """Which rows have a value, bool [rows]; fresh."""
        return self.values >= 0

    def at(self, row: int) -> bool | None:
        """The value of one row, None for null."""
        value = self.values.item(row)
        return None if value < 0 else bool(value)

    def numbers(self) -> np.ndarray:
        """float64 [rows], NaN for null."""
        return np.where(self.values < 0, np.nan, self.values)

    def arrays(self) -> dict[str, np.ndarray]:
        """The column's arrays by part."""
        return {"values": self.values}


Column = KeywordColumn | KeywordsColumn | IntColumn | FloatColumn | BoolColumn


class Columns:
    """The attributes of `rows` documents by column; immutable, and safe to read from many threads."""

    __slots__ = ("_columns", "_schema", "rows")

    def __init__(self, columns: Mapping[str, Column], schema: Schema, rows: int) -> None:
        self._columns, self._schema, self.rows = dict(columns), dict(schema), rows

    @classmethod
    def build(
        cls, attributes: Sequence[Attributes], schema: Schema, pause: Callable[[], None] = lambda: None
    ) -> "Columns":
        """The columns of these documents; a NaN is null, an attribute the schema lacks is left out.

        `pause` is called between two columns.
        """
        columns: dict[str, Column] = {}
        for name, kind in schema.items():
            pause()
            values = [document.get(name) for document in attributes]
            if any(value is not None for value in values):
                columns[name] = _build(kind, values)
        return cls(columns, schema, len(attributes))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], schema: Schema, rows: int) -> "Columns":
        """The columns that `to_arrays` took apart, as views of the arrays (memory maps stay maps).

        ValueError where a column is not of `rows` rows, KeyError where one of its parts is missing.
        """
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            name, _, part = key.rpartition(".")
            # The base class: a slice of a np.memmap costs microseconds, one of an array does not.
            parts.setdefault(name, {})[part] = np.asarray(array)
        columns = {name: _join(kind, parts[name]) for name, kind in schema.items() if name in parts}
        for name, column in columns.items():
            if len(column) != rows:
                raise ValueError(f"column {name!r} has {len(column)} rows, not {rows}")
        return cls(columns, schema, rows)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every column's arrays under `<attribute>.<part>`: one-dimensional, of plain dtypes."""
        return {
            f"{name}.{part}": array
            for name, column in self._columns.items()
            for part, array in column.arrays().items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes in all arrays."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def column(self, name: str) -> Column | None:
        """The column of an attribute, None where every row is null; KeyError for an undeclared one."""
        column = self._columns.get(name)
        if column is None and name not in self._schema:
            raise KeyError(name)
        return column

    def numbers(self, name: str) -> np.ndarray:
        """An int, float, bool or timestamp attribute as float64 [rows], NaN for null; may be a view.

        KeyError for an undeclared attribute, TypeError for one that holds text.
        """
        column = self.column(name)
        if isinstance(column, IntColumn | FloatColumn | BoolColumn):
            return column.numbers()
        if self._schema[name] in (AttributeType.KEYWORD, AttributeType.KEYWORDS):
            raise TypeError(f"{name!r} is a {self._schema[name]}, not a number")
        return np.full(self.rows, np.nan)

    def attributes_at(self, row: int) -> dict[str, AttributeValue]:
        """The attributes of one row; null ones are absent."""
        found = ((name, column.at(row)) for name, column in self._columns.items())
        return {name: value for name, value in found if value is not None}


def _build(kind: AttributeType, values: Sequence[AttributeValue | None]) -> Column:
    """The column of values of one type, at least one of them not None."""
    rows = len(values)
    match kind:
        case AttributeType.KEYWORD:
            dictionary, codes = Dictionary.of(value for value in values if isinstance(value, str))
            coded = (codes[value] if isinstance(value, str) else -1 for value in values)
            return KeywordColumn(np.fromiter(coded, np.int32, rows), dictionary)
        case AttributeType.KEYWORDS:
            lists = [value if isinstance(value, tuple) else () for value in values]
            dictionary, codes = Dictionary.of(chain.from_iterable(lists))
            starts = np.zeros(rows + 1, dtype=np.int64)
            np.cumsum([len(texts) for texts in lists], out=starts[1:])
            flat = (codes[text] for text in chain.from_iterable(lists))
            return KeywordsColumn(starts, np.fromiter(flat, np.int32), _presence(values), dictionary)
        case AttributeType.INT | AttributeType.TIMESTAMP:
            integers = (0 if value is None else value for value in values)
            return IntColumn(np.fromiter(integers, np.int64, rows), _presence(values))
        case AttributeType.FLOAT:
            numbers = (np.nan if value is None else value for value in values)
            return FloatColumn(np.fromiter(numbers, np.float64, rows))
        case AttributeType.BOOL:
            return BoolColumn(
                np.fromiter((-1 if value is None else value for value in values), np.int8, rows)
            )


def _presence(values: Sequence[AttributeValue | None]) -> np.ndarray:
    return np.fromiter((value is not None for value in values), np.bool_, len(values))


def _join(kind: AttributeType, parts: Mapping[str, np.ndarray]) -> Column:
    """The column whose `arrays` these are."""
    match kind:
        case AttributeType.KEYWORD:
            return KeywordColumn(parts["codes"], Dictionary(parts["blob"], parts["offsets"]))
        case AttributeType.KEYWORDS:
            dictionary = Dictionary(parts["blob"], parts["offsets"])
            return KeywordsColumn(parts["starts"], parts["codes"], parts["present"], dictionary)
        case AttributeType.INT | AttributeType.TIMESTAMP:
            return IntColumn(parts["values"], parts["present"])
        case AttributeType.FLOAT:
            return FloatColumn(parts["values"])
        case AttributeType.BOOL:
            return BoolColumn(parts["values"])
