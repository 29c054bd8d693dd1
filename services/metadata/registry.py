"""Collections and their aliases."""

import json
from collections.abc import Container

import psycopg

from services.metadata.database import Connection, Database
from services.metadata.ownership import REGAIN_WAIT_S, Claim, Ownership
from services.metadata.statements import PARTITIONS, bare_statement, statement
from shard_router.errors import AlreadyExists, NotFound, StorageUnavailable
from shard_router.model import HOME, AttributeType, Collection, Metric


class Registry:
    """The names of collections, and the tables behind them; one change at a time.

    Every method raises StorageUnavailable, DeadlineExceeded, Overloaded.
    """

    def __init__(self, database: Database, ownership: Ownership) -> None:
        self._database = database
        self._ownership = ownership

    async def reserve(self, partitions: list[str]) -> tuple[int, int]:
        """The uid of a collection that is about to be made, and its time in microseconds.

        What is made of it in these partitions is left over, until `create` says that it is not.
        """
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            cursor = await connection.execute(bare_statement("reserve_uid"))
            uid, created_at_us = await cursor.fetchone() or (0, 0)
            if partitions:
                await _leave_over(connection, uid, created_at_us, partitions)
        return uid, created_at_us

    async def create(self, collection: Collection) -> None:
        """Make a new collection known, with tables and a log that are empty.

        AlreadyExists if a collection or an alias has its name; StorageUnavailable where what was made of it
        in its partitions has been removed again meanwhile.
        """
        claim = await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            if not await _register(connection, collection, collection.tenant, collection.name):
                raise AlreadyExists("collection", collection.name)
            cursor = await connection.execute(bare_statement("not_left_over"), {"uid": collection.uid})
            if cursor.rowcount != len(collection.databases) - 1:
                raise StorageUnavailable("making the collection took too long")
            await _create_tables(connection, collection, claim)
            await connection.execute(bare_statement("add_first_generation"), made_with(collection))

    async def adopt(self, collection: Collection) -> bool:
        """In a partition, make tables and a log for a collection.

        False, and nothing changed, where another collection of its number lies there: of a home that was
        restored to an earlier state.
        """
        claim = await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            if await _registration(connection, collection.uid) is not None:
                return False
            await _register(connection, collection, "", str(collection.uid))
            await _create_tables(connection, collection, claim)
        return True

    async def abandon(self, uid: int, created_at_us: int) -> None:
        """In a partition, remove a collection's tables and log, if they are there."""
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            known = await _registration(connection, uid)
            if known == created_at_us:
                await _drop(connection, uid)

    async def holds(self, collection: Collection) -> bool:
        """Whether this database has the collection's tables, and not those of another of its number."""
        async with self._database.connection() as connection:
            known = await _registration(connection, collection.uid)
        return known == collection.created_at_us

    async def collections(self) -> list[Collection]:
        """All collections of all tenants, oldest first, with their aliases."""
        async with self._database.connection() as connection:
            cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
            await cursor.execute(bare_statement("collections"))
            return [
                Collection(
                    **{
                        **row,
                        "metric": Metric(row["metric"]),
                        "schema": {name: AttributeType(kind) for name, kind in row["schema"].items()},
                        "aliases": tuple(row["aliases"]),
                        "databases": tuple(row["databases"]),
                    }
                )
                for row in await cursor.fetchall()
            ]

    async def delete(self, tenant: str, name: str) -> list[tuple[int, int, str]]:
        """Forget a collection, its aliases and its documents; NotFound.

        Writers under way finish first. What its partitions have of it is left over: uid, time and partition
        of each.
        """
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            uid = await _find(connection, tenant, name)
            created_at_us, databases = await _drop(connection, uid)
            partitions = [database for database in databases if database != HOME]
            if partitions:
                await _leave_over(connection, uid, created_at_us, partitions)
        return [(uid, created_at_us, partition) for partition in partitions]

    async def set_alias(self, tenant: str, alias: str, collection: str | None) -> None:
        """Point an alias at a collection, or remove it (None).

        Raises NotFound, and AlreadyExists if a collection has that name.
        """
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            if collection is None:
                cursor = await connection.execute(
                    bare_statement("drop_alias"), {"tenant": tenant, "alias": alias}
                )
                if cursor.rowcount == 0:
                    raise NotFound("alias", alias)
                return
            uid = await _find(connection, tenant, collection)
            names = {"tenant": tenant, "name": alias}
            if await (await connection.execute(bare_statement("find_collection"), names)).fetchone():
                raise AlreadyExists("collection", alias, "alias")
            values = {"tenant": tenant, "alias": alias, "uid": uid}
            await connection.execute(bare_statement("set_alias"), values)


def made_with(collection: Collection) -> dict[str, object]:
    """What a collection's generation is made with, as statements ask for it."""
    return {
        "uid": collection.uid,
        "generation": collection.generation,
        "model": collection.model,
        "dim": collection.dim,
        "space": collection.space,
        "index": collection.index,
    }


async def add_vectors(connection: Connection, uid: int, generation: int) -> None:
    """A table of vectors for a generation."""
    await connection.execute(statement("create_vectors", uid, generation))
    await connection.execute(bare_statement("add_embedded"), {"uid": uid, "generation": generation})


async def drop_vectors(connection: Connection, uid: int, keep: Container[int] = ()) -> None:
    """No tables of vectors any more but of these generations."""
    cursor = await connection.execute(bare_statement("tables_of_vectors"), {"uid": uid})
    for (generation,) in await cursor.fetchall():
        if generation not in keep:
            await connection.execute(statement("drop_vectors_table", uid, generation))
            gone = {"uid": uid, "generation": generation}
            await connection.execute(bare_statement("drop_embedded"), gone)


async def _find(connection: Connection, tenant: str, name: str) -> int:
    cursor = await connection.execute(bare_statement("find_collection"), {"tenant": tenant, "name": name})
    row = await cursor.fetchone()
    if row is None:
        raise NotFound("collection", name)
    return int(row[0])


async def _register(connection: Connection, collection: Collection, tenant: str, name: str) -> bool:
    values = {
        "uid": collection.uid,
        "tenant": tenant,
        "name": name,
        "dim": collection.dim,
        "metric": collection.metric.value,
        "schema": json.dumps({attribute: kind.value for attribute, kind in collection.schema.items()}),
        "model": collection.model,
        "slots": collection.slots,
        "shards": collection.shards,
        "replicas": collection.replicas,
        "index": collection.index,
        "max_staleness_ms": collection.max_staleness_ms,
        "space": collection.space,
        "databases": list(collection.databases),
        "created_at_us": collection.created_at_us,
    }
    cursor = await connection.execute(bare_statement("create_collection"), values)
    return await cursor.fetchone() is not None


async def _registration(connection: Connection, uid: int) -> int | None:
    """When the collection of that number was made, where there is one."""
    cursor = await connection.execute(bare_statement("registration"), {"uid": uid})
    row = await cursor.fetchone()
    return None if row is None else int(row[0])


async def _create_tables(connection: Connection, collection: Collection, claim: Claim) -> None:
    uid = collection.uid
    await connection.execute(bare_statement("create_counter"), {"uid": uid, "claim": claim.id})
    await connection.execute(statement("create_tables", uid))
    await add_vectors(connection, uid, collection.generation)
    for part in range(PARTITIONS):
        await connection.execute(statement("create_partition", uid, part=part))


async def _drop(connection: Connection, uid: int) -> tuple[int, list[str]]:
    """Forget a collection; its time and its databases."""
    await connection.execute(statement("drop_tables", uid))
    await drop_vectors(connection, uid)
    await connection.execute(bare_statement("drop_recent_writes"), {"uid": uid})
    cursor = await connection.execute(bare_statement("drop_registration"), {"uid": uid})
    row = await cursor.fetchone()
    assert row is not None, "it was found a moment ago, and the registry is locked"
    return row[0], row[1]


async def _leave_over(connection: Connection, uid: int, created_at_us: int, partitions: list[str]) -> None:
    values = {"uid": uid, "created_at_us": created_at_us, "partitions": partitions}
    await connection.execute(bare_statement("leave_over"), values)
