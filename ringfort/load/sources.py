"""Rows of TSV, CSV, JSON Lines and Parquet files, read as they are asked for."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ringfort.errors import FailedPrecondition, InvalidArgument

#: What the end of a file's name says about it.
FORMATS = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}

_COUNT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row, counted from 1: its cells by column, or the problem that kept it from being read."""

    number: int
    cells: Mapping[str, Any]
    problem: str = ""


class Source(Protocol):
    """A file of rows."""

    path: Path
    #: Names of the columns; empty where every row may have its own (JSON Lines).
    columns: tuple[str, ...]

    def rows(self) -> Iterator[Row]:
        """Every row, in the file's order."""
        ...

    def count(self) -> int | None:
        """How many rows there are, where that can be told without reading them."""
        ...


def open_source(path: Path, format: str | None = None) -> Source:
    """The source for a file, by its format or the end of its name. Raises InvalidArgument, OSError."""
    format = format or FORMATS.get(path.suffix.lower())
    match format:
        case "tsv":
            return TsvSource(path)
        case "csv":
            return CsvSource(path)
        case "jsonl":
            return JsonLinesSource(path)
        case "parquet":
            return ParquetSource(path)
        case _:
            formats = ", ".join(dict.fromkeys(FORMATS.values()))
            raise InvalidArgument(f"{path}: the format is none of {formats}; say which with --format")


def _decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, their ends kept; a byte order mark is dropped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidArgument(f"{path}: line {number} is not UTF-8") from error


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(_COUNT_BYTES):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


class TsvSource:
    """Tab-separated values with a header line; a tab or a line break never stands inside a cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = next(_decoded_lines(path), "")
        if not header.strip():
            raise InvalidArgument(f"{path}: the first line has to name the columns")
        self.columns = tuple(header.rstrip("\r\n").split("\t"))

    def rows(self) -> Iterator[Row]:
        """Every line after the header."""
        lines = _decoded_lines(self.path)
        next(lines, None)
        for number, line in enumerate(lines, 1):
            cells = line.rstrip("\r\n").split("\t")
            problem = (
                ""
                if len(cells) == len(self.columns)
                else f"{len(cells)} cells where the header has {len(self.columns)}"
            )
            yield Row(number, dict(zip(self.columns, cells, strict=False)), problem)

    def count(self) -> int:
        """The lines after the header."""
        return max(0, _count_lines(self.path) - 1)


class CsvSource:
    """Comma-separated values with a header row, quoted as RFC 4180 has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header: list[str] = next(csv.reader(_decoded_lines(path)), [])
        if not header:
            raise InvalidArgument(f"{path}: the first row has to name the columns")
        self.columns = tuple(header)

    def rows(self) -> Iterator[Row]:
        """Every row after the header."""
        reader = csv.reader(_decoded_lines(self.path))
        next(reader, None)
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            problem = (
                ""
                if len(cells) == len(self.columns)
                else f"{len(cells)} cells where the header has {len(self.columns)}"
            )
            yield Row(number, dict(zip(self.columns, cells, strict=False)), problem)

    def count(self) -> None:
        """Unknown: a quoted cell may hold line breaks."""
        return


class JsonLinesSource:
    """One JSON object a line; blank lines are passed over."""

    columns: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        path.open("rb").close()

    def rows(self) -> Iterator[Row]:
        """Every object."""
        for number, line in enumerate((line for line in _decoded_lines(self.path) if line.strip()), 1):
            try:
                cells = json.loads(line)
            except ValueError as error:
                yield Row(number, {}, f"not JSON: {error}")
                continue
            if isinstance(cells, dict):
                yield Row(number, cells)
            else:
                yield Row(number, {}, "not a JSON object")

    def count(self) -> int:
        """The lines that are not blank."""
        with self.path.open("rb") as file:
            return sum(1 for line in file if not line.isspace())


class ParquetSource:
    """An Apache Parquet file; needs the extra `parquet`."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise FailedPrecondition(
                "Parquet files need pyarrow: pip install 'ringfort[parquet]'", reason="EXTRA_MISSING"
            ) from error
        self.path = path
        self._file = parquet.ParquetFile(path)
        self.columns = tuple(self._file.schema_arrow.names)

    def rows(self) -> Iterator[Row]:
        """Every row, a record batch at a time."""
        number = 0
        for batch in self._file.iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield Row(number, cells)

    def count(self) -> int:
        """As the file's footer has it."""
        rows: int = self._file.metadata.num_rows
        return rows
