"""Reads of a collection's documents and of its log."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import psycopg

from services.metadata.codec import matrix_from, row_from
from services.metadata.database import Connection, Database
from services.metadata.log import read_position
from services.metadata.ownership import Ownership
from services.metadata.statements import bare_statement, statement
from shard_router.errors import (
    GenerationChanged,
    LogPurged,
    NotFound,
    SegmentCorrupt,
    StorageUnavailable,
    UnknownLog,
)
from shard_router.hashing import slots_of
from shard_router.model import Collection, LogDelta, LogRow

#: Rows decoded before the event loop gets another turn.
DECODE_ROWS = 256

Cursor = psycopg.AsyncCursor[psycopg.rows.TupleRow]


class Documents:
    """Reads, each of one statement and so of one snapshot.

    Every method raises NotFound (the collection is gone), StorageUnavailable, DeadlineExceeded, Overloaded.
    """

    def __init__(self, database: Database, ownership: Ownership) -> None:
        self._database = database
        self._ownership = ownership

    async def get(
        self, collection: Collection, ids: Sequence[str], *, with_vectors: bool
    ) -> tuple[list[LogRow | None], np.ndarray | None]:
        """The documents at their ids' places, None for what is not there; vectors float32 [ids, dim]."""
        wanted = {
            "slots": slots_of(ids, collection.slots).tolist(),
            "ids": list(ids),
            "with_vectors": with_vectors,
        }
        rows: list[LogRow | None] = [None] * len(ids)
        vectors: dict[int, bytes | None] = {}
        if not ids:
            return rows, matrix_from(rows, vectors, collection) if with_vectors else None
        async with self._database.connection() as connection:
            cursor = await _run(connection, "get", collection, wanted)
            while found := await cursor.fetchmany(DECODE_ROWS):
                for place, *stored, vector in found:
                    rows[place - 1] = row_from(stored, collection.schema)
                    vectors[place - 1] = vector
                await asyncio.sleep(0)
            async with self._of_live(connection, collection):
                return rows, matrix_from(rows, vectors, collection) if with_vectors else None

    async def scan(
        self, collection: Collection, after: tuple[int, str] | None, limit: int, *, with_vectors: bool
    ) -> tuple[list[LogRow], np.ndarray | None]:
        """At most `limit` live documents in order of (slot, id), strictly after `after`; None starts."""
        slot, id = after if after is not None else (-1, "")
        wanted = {"slot": slot, "id": id, "limit": limit, "with_vectors": with_vectors}
        async with self._database.connection() as connection:
            cursor = await _run(connection, "scan", collection, wanted)
            page = _Page(collection, cursor.rowcount if with_vectors else 0)
            async with self._of_live(connection, collection):
                while found := await cursor.fetchmany(DECODE_ROWS):
                    page.add(found)
                    await asyncio.sleep(0)
        return page.rows, page.vectors if with_vectors else None

    async def position(self, collection: Collection) -> int:
        """The position of the log's last committed write; 0 for an empty log."""
        async with self._database.connection() as connection:
            return await read_position(connection, collection)

    async def reached(self, collection: Collection) -> int:
        """The position up to which its generation has the vectors of all documents."""
        wanted = {"uid": collection.uid, "generation": collection.generation}
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("reached"), wanted)
            row = await cursor.fetchone()
        if row is None:
            raise NotFound("collection", collection.name)
        return int(row[0])

    async def tail(
        self,
        collection: Collection,
        after: int,
        limit: int,
        empty_at: int = 0,
        slots: Sequence[int] | None = None,
    ) -> tuple[LogDelta, int]:
        """What the log holds beyond `after`, in order of position, at most `limit` rows; and its position.

        Of these slots only, where any are given.

        The log ends where the collection's generation has the vectors of all documents. `upto` is that
        position if everything fitted, else that of the last row. Nothing at or below `upto` can appear later.
        Raises UnknownLog where the log never was at `after`, and LogPurged where it has forgotten deletes
        beyond `after` that concern the reader: not those at or below `empty_at`, where the log stood when the
        reader began with nothing, for it has seen no document that they removed.
        """
        log_id = self._ownership.claim.log_id
        wanted = {
            "uid": collection.uid,
            "generation": collection.generation,
            "log_id": log_id,
            "after": after,
            "limit": limit,
            "slots": None if slots is None else list(slots),
        }
        counter, floor = None, 0
        async with self._database.connection() as connection:
            cursor = await _run(connection, "tail", collection, wanted)
            page = _Page(collection, cursor.rowcount)
            while found := await cursor.fetchmany(DECODE_ROWS):
                counter, floor = found[0][:2]
                page.add([stored for _, _, *stored in found if stored[0] is not None])
                await asyncio.sleep(0)
            if counter is None:
                await read_position(connection, collection)  # NotFound where the collection is gone
                raise StorageUnavailable(f"the log is another than {log_id}")
        if after > counter:
            raise UnknownLog(log_id, after, counter)
        if 0 < after < floor and floor > empty_at:
            raise LogPurged(log_id, after, floor)
        upto = page.rows[-1].version.seq if len(page.rows) == limit else counter
        return LogDelta(log_id, after, upto, page.rows, page.vectors), counter

    @asynccontextmanager
    async def _of_live(self, connection: Connection, collection: Collection) -> AsyncIterator[None]:
        """A vector that is missing is no damage where writes bring those of another generation by now."""
        try:
            yield
        except SegmentCorrupt:
            wanted = {"uid": collection.uid, "claim": self._ownership.claim.id}
            cursor = await connection.execute(bare_statement("written_by"), wanted)
            row = await cursor.fetchone()
            if row is not None and row[1] != collection.generation:
                raise GenerationChanged(collection.name, collection.generation) from None
            raise


class _Page:
    """An answer, decoded piece by piece: in one piece a full one would hold the event loop for 10 ms."""

    def __init__(self, collection: Collection, most: int) -> None:
        """most: rows with vectors; with 0 those are not looked at."""
        self.rows: list[LogRow] = []
        self._collection, self._most = collection, most
        # Pages of memory that are not written yet cost nothing.
        self._matrix = np.zeros((most, collection.dim), np.float32)

    def add(self, found: Sequence[Sequence[Any]]) -> None:
        """Further rows of (slot, id, term, seq, deleted, text, attributes, vector)."""
        rows = [row_from(stored, self._collection.schema) for *stored, _ in found]
        if self._most:
            vectors = {place: vector for place, (*_, vector) in enumerate(found)}
            start, stop = len(self.rows), len(self.rows) + len(rows)
            self._matrix[start:stop] = matrix_from(rows, vectors, self._collection)
        self.rows += rows

    @property
    def vectors(self) -> np.ndarray:
        """float32 [rows, dim]."""
        return self._matrix[: len(self.rows)]


async def _run(
    connection: Connection, name: str, collection: Collection, wanted: Mapping[str, object]
) -> Cursor:
    cursor = connection.cursor(binary=True)
    try:
        return await cursor.execute(
            statement(name, collection.uid, collection.generation), wanted, prepare=True
        )
    except psycopg.errors.UndefinedTable as error:
        raise NotFound("collection", collection.name) from error
