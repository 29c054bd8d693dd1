"""Generations of a collection: their registry in the home, their vectors in every database.

One is live, and every write brings its vectors. At most one other is beside it: its vectors are put here page
by page, and who reads the log for it gets as far as they have come.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import psycopg

from services.metadata.codec import STORED
from services.metadata.database import Database
from services.metadata.ownership import REGAIN_WAIT_S, Ownership
from services.metadata.partition import Partition
from services.metadata.registry import add_vectors, drop_vectors, made_with
from services.metadata.statements import bare_statement, statement
from shard_router.errors import NotFound, PreconditionFailed, RingfortError, StorageUnavailable
from shard_router.model import Collection

log = logging.getLogger(__name__)


class GenerationState(StrEnum):
    """What a generation is good for."""

    #: Its vectors are being made.
    BUILDING = "building"
    #: It can become the live one, and never was, or was given up by a rollback.
    READY = "ready"
    LIVE = "live"
    #: What was live before.
    PREVIOUS = "previous"
    #: Nothing is left of it but its number.
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation: the collection as it is in it, and what it is good for."""

    collection: Collection
    state: GenerationState


@dataclass(frozen=True, slots=True)
class Unembedded:
    """Documents in (after, upto] of one database's log of which a generation has no vectors yet.

    `texts[i]` belongs to the document `ids[i]` in `slots[i]` at position `seqs[i]`, and so does row i of
    `vectors` (float32 [n, dim of the live generation]), where they were asked for. `gone` are ids that were
    deleted.
    """

    after: int
    upto: int
    #: Where the log stands.
    end: int
    slots: Sequence[int]
    ids: Sequence[str]
    seqs: Sequence[int]
    texts: Sequence[str]
    vectors: np.ndarray | None
    gone: Sequence[tuple[int, str, int]]


class Generations:
    """Every method raises what the store raises; NotFound where the collection is gone."""

    def __init__(
        self,
        database: Database,
        ownership: Ownership,
        databases: Callable[[Collection], Sequence[Partition]],
    ) -> None:
        """databases: those that a collection's documents lie in, the home first."""
        self._database = database
        self._ownership = ownership
        self._databases = databases

    async def all(self, collection: Collection) -> list[Generation]:
        """Every generation that the collection has had, oldest first."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("generations"), {"uid": collection.uid})
            return [_generation(collection, row) for row in await cursor.fetchall()]

    async def beside(self, collections: Sequence[Collection]) -> list[Generation]:
        """Those of these collections that are not live, and not dropped."""
        by_uid = {collection.uid: collection for collection in collections}
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("generations_beside"))
            return [_generation(by_uid[uid], row) for uid, *row in await cursor.fetchall() if uid in by_uid]

    async def begin(self, wanted: Collection) -> Collection:
        """A new generation, without vectors: the collection as given but for its number.

        PreconditionFailed while there is another one beside the live one.
        """
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("add_generation"), made_with(wanted))
            row = await cursor.fetchone()
        if row is None:
            raise PreconditionFailed(f"collection {wanted.name!r} has another generation beside the live one")
        made = replace(wanted, generation=row[0])
        try:
            for partition in self._databases(made):
                await self._add_vectors(partition, made)
        except BaseException:
            await self.drop(made)
            raise
        return made

    async def set_state(self, made: Collection, state: GenerationState) -> None:
        """What a generation that is not live is good for now."""
        await self._ownership.require(REGAIN_WAIT_S)
        values = {"uid": made.uid, "generation": made.generation, "state": state.value}
        async with self._database.connection() as connection:
            await connection.execute(bare_statement("set_generation_state"), values)

    async def drop(self, made: Collection) -> None:
        """Forget a generation that is not live, with its vectors.

        What a database that is away has of it goes when the next generation is made there.
        """
        await self.set_state(made, GenerationState.DROPPED)
        keep = {each.collection.generation for each in await self.all(made) if each.state != "dropped"}
        for partition in self._databases(made):
            try:
                with partition.named():
                    async with partition.database.connection() as connection, connection.transaction():
                        await drop_vectors(connection, made.uid, keep)
            except RingfortError as error:
                log.warning(
                    "vectors of generation %d of %s stay for now: %s", made.generation, made.name, error
                )

    async def textless(self, collection: Collection) -> int:
        """How many documents have no text that another vector could be made of."""
        count = 0
        for partition in self._databases(collection):
            with partition.named():
                async with partition.database.connection() as connection:
                    cursor = await _run(connection, "textless", collection, {})
                    (found,) = await cursor.fetchone() or (0,)
                    count += found
        return count

    async def unembedded(
        self,
        made: Collection,
        live: Collection,
        database: str,
        limit: int,
        *,
        with_vectors: bool,
        after: int = 0,
    ) -> Unembedded:
        """The next documents, in order, of which a generation has no vectors; at most `limit`.

        Beyond `after`, which is for who reads on before he has put what he has. With vectors, those of the
        live generation are told.
        """
        partition = self._database_of(made, database)
        with partition.named():
            wanted = {
                "uid": made.uid,
                "generation": made.generation,
                "log_id": partition.log_id,
                "limit": limit,
                "after": after,
                "with_vectors": with_vectors,
            }
            async with partition.database.connection() as connection:
                cursor = await _run(connection, "to_embed", live, wanted)
                rows = await cursor.fetchall()
        if not rows:
            raise StorageUnavailable(f"it holds no generation {made.generation} of {made.name!r}", database)
        end, begin = rows[0][:2]
        found = [row[2:] for row in rows if row[2] is not None]
        live_rows = [row for row in found if not row[3]]
        vectors = None
        if with_vectors:
            vectors = np.zeros((len(live_rows), live.dim), np.float32)
            for place, row in enumerate(live_rows):
                vectors[place] = np.frombuffer(row[5], STORED)
        return Unembedded(
            begin,
            found[-1][0] if len(found) == limit else end,
            end,
            slots=[row[1] for row in live_rows],
            ids=[row[2] for row in live_rows],
            seqs=[row[0] for row in live_rows],
            texts=[row[4] or "" for row in live_rows],
            vectors=vectors,
            gone=[(row[1], row[2], row[0]) for row in found if row[3]],
        )

    async def put(self, made: Collection, database: str, page: Unembedded, vectors: np.ndarray) -> None:
        """Store a page's vectors, float32 [n, dim of the generation]: it has come as far as the page goes.

        A document that has moved on meanwhile keeps what it has. StorageUnavailable where somebody else has
        put a page, or has taken the database.
        """
        partition = self._database_of(made, database)
        with partition.named():
            claim = await partition.ownership.require(REGAIN_WAIT_S)
            matrix = np.ascontiguousarray(vectors, STORED)
            values = {
                "uid": made.uid,
                "generation": made.generation,
                "claim": claim.id,
                "after": page.after,
                "upto": page.upto,
                "slots": list(page.slots),
                "ids": list(page.ids),
                "seqs": list(page.seqs),
                "matrix": matrix.data.cast("B") if matrix.size else b"",
                "row_bytes": made.dim * STORED.itemsize,
                "gone_slots": [slot for slot, _, _ in page.gone],
                "gone_ids": [id for _, id, _ in page.gone],
                "gone_seqs": [seq for _, _, seq in page.gone],
            }
            async with partition.database.connection() as connection, connection.transaction():
                cursor = await _run(connection, "put_vectors", made, values)
                if await cursor.fetchone() is None:
                    raise StorageUnavailable("the claim or the page is no longer this service's", database)

    async def close_writes(self, live: Collection) -> dict[str, int]:
        """Have nothing written until `open_writes`; by database, where its log stands from then on.

        Repeated it says the same.
        """
        closed = {}
        for partition in self._databases(live):
            with partition.named():
                claim = await partition.ownership.require(REGAIN_WAIT_S)
                values = {"uid": live.uid, "generation": live.generation, "claim": claim.id}
                async with partition.database.connection() as connection:
                    cursor = await connection.execute(bare_statement("close_writes"), values)
                    row = await cursor.fetchone()
                if row is None:
                    raise StorageUnavailable("the claim to it is no longer held", partition.name)
                closed[partition.name] = row[0]
        return closed

    async def activate(self, made: Collection, left: GenerationState) -> None:
        """A generation is the live one from now on; the one that was becomes `left`.

        Writes have to be closed, and are until `open_writes`. Repeated it changes nothing.
        """
        await self._ownership.require(REGAIN_WAIT_S)
        values = {"uid": made.uid, "generation": made.generation, "state": left.value}
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            known = {each.collection.generation: each.state for each in await _all(connection, made)}
            if known.get(made.generation) is GenerationState.LIVE:
                return
            if known.get(made.generation) not in (GenerationState.READY, GenerationState.PREVIOUS):
                raise PreconditionFailed(f"generation {made.generation} of {made.name!r} is not complete")
            await connection.execute(bare_statement("replace_live"), values)
            await connection.execute(bare_statement("make_live"), values)
            await connection.execute(bare_statement("set_live"), values)

    async def open_writes(self, live: Collection) -> None:
        """Writes bring vectors of this generation from now on."""
        for partition in self._databases(live):
            with partition.named():
                claim = await partition.ownership.require(REGAIN_WAIT_S)
                values = {"uid": live.uid, "generation": live.generation, "claim": claim.id}
                async with partition.database.connection() as connection:
                    cursor = await connection.execute(bare_statement("open_writes"), values)
                    if await cursor.fetchone() is None:
                        raise StorageUnavailable("the claim to it is no longer held", partition.name)

    def _database_of(self, collection: Collection, name: str) -> Partition:
        return next(each for each in self._databases(collection) if each.name == name)

    async def _add_vectors(self, partition: Partition, made: Collection) -> None:
        keep = {each.collection.generation for each in await self.all(made) if each.state != "dropped"}
        with partition.named():
            await partition.ownership.require(REGAIN_WAIT_S)
            async with partition.database.connection() as connection, connection.transaction():
                await drop_vectors(connection, made.uid, keep)
                await add_vectors(connection, made.uid, made.generation)


async def _all(
    connection: psycopg.AsyncConnection[psycopg.rows.TupleRow], of: Collection
) -> list[Generation]:
    cursor = await connection.execute(bare_statement("generations"), {"uid": of.uid})
    return [_generation(of, row) for row in await cursor.fetchall()]


async def _run(
    connection: psycopg.AsyncConnection[psycopg.rows.TupleRow],
    name: str,
    collection: Collection,
    values: dict[str, object],
) -> psycopg.AsyncCursor[psycopg.rows.TupleRow]:
    cursor = connection.cursor(binary=True)
    try:
        return await cursor.execute(
            statement(name, collection.uid, collection.generation), values, prepare=True
        )
    except psycopg.errors.UndefinedTable as error:
        raise NotFound("collection", collection.name) from error


def _generation(collection: Collection, row: Sequence[Any]) -> Generation:
    number, state, model, dim, space, index = row
    its = replace(collection, generation=number, model=model, dim=dim, space=space, index=index)
    return Generation(its, GenerationState(state))
