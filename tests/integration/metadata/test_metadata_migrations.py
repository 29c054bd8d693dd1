"""A database of the first release is brought up to date, with everything in it; forwards only, and once."""

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from services.deadline import Deadline
from services.metadata.schema import migrations
from services.metadata.store import StartupRefused, Store
from shard_router.hashing import slot_of
from shard_router.model import AttributeType, Remove, Upsert, Version

DIM = 4
#: A collection's own tables as the first release made them.
FIRST_TABLES = """
CREATE TABLE documents_1 (
    slot integer NOT NULL, id text COLLATE "C" NOT NULL, seq bigint NOT NULL, term integer NOT NULL DEFAULT 1,
    deleted boolean NOT NULL, text text, attributes jsonb NOT NULL, PRIMARY KEY (slot, id)
) PARTITION BY HASH (slot);
CREATE INDEX documents_1_seq ON documents_1 (seq);
CREATE TABLE documents_1_0 PARTITION OF documents_1 FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE TABLE vectors_1_1 (
    slot integer NOT NULL, id text COLLATE "C" NOT NULL, doc_seq bigint NOT NULL,
    vector bytea STORAGE EXTERNAL NOT NULL, PRIMARY KEY (slot, id)
);
INSERT INTO collections
    (tenant, name, dim, metric, schema, slots, shards, replicas, index, max_staleness_ms, space)
VALUES ('default', 'old', 4, 'cosine', '{"rank": "int"}', 8, 1, 1, 'auto', 0, 'vectors:4');
INSERT INTO counters (collection_uid, seq, writes) VALUES (1, 7, 3);
"""
VECTOR = np.arange(1, DIM + 1, dtype=np.float32)


@pytest.fixture
def first_release(postgres_url: str) -> Iterator[str]:
    """The URL of a database as the first release left it: a document at 5, and a tombstone at 7."""
    name = f"first_{uuid4().hex}"
    url = make_conninfo(postgres_url, dbname=name)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        with psycopg.connect(url, autocommit=True, options="-c search_path=ringfort") as first:
            first_name, first_text = migrations()[1]
            first.execute(first_text.encode())
            first.execute("INSERT INTO migrations (number, name) VALUES (1, %s)", [first_name])
            first.execute(FIRST_TABLES.encode())
            for id, seq, deleted in (("kept", 5, False), ("gone", 7, True)):
                row = [slot_of(id, 8), id, seq, deleted]
                first.execute(
                    "INSERT INTO documents_1 VALUES (%s, %s, %s, 1, %s, 'text', '{\"rank\": 1}')", row
                )
            first.execute(
                "INSERT INTO vectors_1_1 VALUES (%s, 'kept', 5, %s)", [slot_of("kept", 8), VECTOR.tobytes()]
            )
        yield url
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def test_what_the_first_release_wrote_is_served(first_release: str) -> None:
    store = await Store.open(first_release, tombstone_ttl_s=1e-3)
    [collection] = await store.collections()
    assert (collection.name, collection.schema) == ("old", {"rank": AttributeType.INT})
    rows, vectors = await store.get(collection, ["kept", "gone"], with_vectors=True)
    assert rows[0] is not None
    assert (rows[0].version, rows[0].attributes, rows[1]) == (Version(1, 5), {"rank": 1}, None)
    assert vectors is not None
    np.testing.assert_array_equal(vectors[0], VECTOR)
    commit = await store.write(
        collection, [Upsert("new", None, {}, VECTOR), Remove("kept")], deadline=Deadline.after(10)
    )
    assert [outcome.version for outcome in commit.outcomes] == [Version(1, 8), Version(1, 9)]
    # Its tombstones age like those of a collection made today.
    async with asyncio.timeout(20):
        while [row.id for row in (await store.tail(collection, 0)).rows] != ["new"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await store.close()


async def test_migrations_are_recorded_and_not_repeated(first_release: str) -> None:
    for _ in range(2):
        await (await Store.open(first_release)).close()
        with psycopg.connect(first_release) as connection:
            recorded = connection.execute("SELECT number, name FROM ringfort.migrations ORDER BY number")
            assert recorded.fetchall() == [(number, name) for number, (name, _) in migrations().items()]
    assert list(migrations()) == list(range(1, len(migrations()) + 1))


async def test_two_that_start_at_once_migrate_once(first_release: str) -> None:
    opened = await asyncio.gather(*(Store.open(first_release) for _ in range(2)), return_exceptions=True)
    stores = [store for store in opened if isinstance(store, Store)]
    refused = [error for error in opened if isinstance(error, StartupRefused)]
    assert (len(stores), len(refused)) == (1, 1)
    [store] = stores
    assert len(await store.collections()) == 1
    await store.close()


async def test_a_migration_that_fails_leaves_what_was_there(first_release: str) -> None:
    with psycopg.connect(first_release, autocommit=True) as connection:
        connection.execute("CREATE TABLE ringfort.marks (of_somebody_else integer)")
        with pytest.raises(StartupRefused, match="cannot be prepared"):
            await Store.open(first_release)
        found = connection.execute("SELECT max(number) FROM ringfort.migrations").fetchone()
        columns = connection.execute(
            "SELECT FROM pg_attribute WHERE attrelid = 'ringfort.logs'::regclass AND attname = 'term'"
        )
        assert (found, columns.rowcount) == ((1,), 0)
        connection.execute("DROP TABLE ringfort.marks")
    store = await Store.open(first_release)
    assert len(await store.collections()) == 1
    await store.close()
