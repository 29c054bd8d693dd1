"""Collections and their aliases."""

import json

import psycopg

from services.metadata.database import Connection, Database
from services.metadata.ownership import REGAIN_WAIT_S, Ownership
from services.metadata.statements import PARTITIONS, bare_statement, statement
from shard_router.errors import AlreadyExists, NotFound
from shard_router.model import AttributeType, Collection, Metric, Schema


class Registry:
    """The names of collections, and the tables behind them; one change at a time.

    Every method raises StorageUnavailable, DeadlineExceeded, Overloaded.
    """

    def __init__(self, database: Database, ownership: Ownership) -> None:
        self._database = database
        self._ownership = ownership

    async def create(
        self,
        *,
        tenant: str,
        name: str,
        dim: int,
        metric: Metric,
        schema: Schema,
        model: str | None,
        slots: int,
        shards: int,
        replicas: int,
        index: str,
        max_staleness_ms: int,
        space: str,
    ) -> Collection:
        """A new, empty collection at generation 1; AlreadyExists if a collection or alias has its name."""
        values = {
            "tenant": tenant,
            "name": name,
            "dim": dim,
            "metric": metric.value,
            "schema": json.dumps({attribute: kind.value for attribute, kind in schema.items()}),
            "model": model,
            "slots": slots,
            "shards": shards,
            "replicas": replicas,
            "index": index,
            "max_staleness_ms": max_staleness_ms,
            "space": space,
        }
        claim = await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            cursor = await connection.execute(bare_statement("create_collection"), values)
            row = await cursor.fetchone()
            if row is None:
                raise AlreadyExists("collection", name)
            uid, generation, schema_version, created_at_us = row
            await connection.execute(bare_statement("create_counter"), {"uid": uid, "claim": claim.id})
            await connection.execute(statement("create_tables", uid, generation))
            for part in range(PARTITIONS):
                await connection.execute(statement("create_partition", uid, part=part))
        return Collection(
            uid=uid,
            tenant=tenant,
            name=name,
            dim=dim,
            metric=metric,
            schema=dict(schema),
            schema_version=schema_version,
            model=model,
            slots=slots,
            shards=shards,
            replicas=replicas,
            index=index,
            max_staleness_ms=max_staleness_ms,
            generation=generation,
            space=space,
            created_at_us=created_at_us,
        )

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
                    }
                )
                for row in await cursor.fetchall()
            ]

    async def delete(self, tenant: str, name: str) -> None:
        """Forget a collection, its aliases and its documents; NotFound.

        Writers under way finish first.
        """
        async with self._database.connection() as connection, connection.transaction():
            await connection.execute(bare_statement("lock_registry"))
            uid, generation = await _find(connection, tenant, name)
            await connection.execute(statement("drop_tables", uid, generation))
            await connection.execute(bare_statement("drop_recent_writes"), {"uid": uid})
            await connection.execute(bare_statement("drop_registration"), {"uid": uid})

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
            uid, _ = await _find(connection, tenant, collection)
            names = {"tenant": tenant, "name": alias}
            if await (await connection.execute(bare_statement("find_collection"), names)).fetchone():
                raise AlreadyExists("collection", alias, "alias")
            values = {"tenant": tenant, "alias": alias, "uid": uid}
            await connection.execute(bare_statement("set_alias"), values)


async def _find(connection: Connection, tenant: str, name: str) -> tuple[int, int]:
    cursor = await connection.execute(bare_statement("find_collection"), {"tenant": tenant, "name": name})
    row = await cursor.fetchone()
    if row is None:
        raise NotFound("collection", name)
    return row[0], row[1]
