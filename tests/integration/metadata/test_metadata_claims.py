"""Who may write: a claim that another took over, and a database that was restored from a backup."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from services.deadline import Deadline
from services.metadata.store import Store
from shard_router.errors import NotFound, RingfortError, StorageUnavailable, UnknownLog, VersionConflict
from shard_router.model import Collection, Commit, Patch, Upsert, Version, Write

MakeCollection = Callable[..., Awaitable[Collection]]
DIM = 8


def upsert(id: str, if_version: Version | None = None) -> Upsert:
    return Upsert(id, None, {}, np.ones(DIM, np.float32), if_version)


async def write(store: Store, collection: Collection, *writes: Write, within_s: float = 10) -> Commit:
    return await store.write(collection, writes, deadline=Deadline.after(within_s))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        yield connection


#: One statement, and a transaction that reads before it writes.
WRITES: dict[str, list[Write]] = {
    "unconditional": [upsert("a"), upsert("b")],
    "conditional": [upsert("b"), Patch("old", {"rank": 1})],
}


@pytest.mark.parametrize("batch", WRITES)
async def test_a_write_that_waits_while_the_claim_is_taken_writes_nothing(
    store: Store, collection: Collection, database_url: str, batch: str
) -> None:
    """It was sent before, and gets its turn after: only with the claim taken again it is written."""
    await write(store, collection, upsert("old"))
    async with connected(database_url) as rival:
        async with rival.transaction():
            await rival.execute("SELECT FROM ringfort.counters FOR UPDATE")
            late = asyncio.create_task(write(store, collection, *WRITES[batch]))
            waiting = b"SELECT FROM pg_locks WHERE NOT granted"
            while (await rival.execute(waiting)).rowcount == 0:
                pass
            await rival.execute("UPDATE ringfort.counters SET claim = %s", [uuid4()])
        commit = await late
    assert (store.stats()["superseded_total"], store.stats()["unconfirmed_total"]) == (1, 0)
    assert [outcome.version for outcome in commit.outcomes] == [Version(1, 2), Version(1, 3)]
    assert await store.position(collection) == commit.upto == 3
    # And nothing is doubted any more.
    await write(store, collection, *WRITES[batch])
    assert store.stats()["superseded_total"] == 1


async def test_a_service_that_was_taken_over_unnoticed_is_refused(
    store: Store, collection: Collection, make_collection: MakeCollection, database_url: str
) -> None:
    async with connected(database_url) as rival, connected(database_url) as killer:
        holder = (
            b"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted "
            b"AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        (pid,) = await (await killer.execute(holder)).fetchone() or (0,)
        # Who stands in line has it before anybody can try for it.
        key = int.from_bytes(b"ringfort", "big")
        taking = asyncio.create_task(rival.execute("SELECT pg_advisory_lock(%s)", [key]))
        while (await killer.execute(b"SELECT FROM pg_locks WHERE NOT granted")).rowcount == 0:
            pass
        await killer.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        await taking
        await rival.execute("UPDATE ringfort.counters SET claim = %s", [uuid4()])
        with pytest.raises(StorageUnavailable, match=r"claim|another Ringfort service"):
            await write(store, collection, upsert("a"))
        with pytest.raises(StorageUnavailable, match=r"claim|another Ringfort service"):
            await make_collection(store)
        assert store.stats()["claim_held"] == 0
        assert await store.position(collection) == 0
    async with asyncio.timeout(20):
        while not store.stats()["claim_held"]:
            await store.ping()
    assert (await write(store, collection, upsert("a"))).upto == 1


async def test_taking_the_claim_waits_for_the_write_under_way(
    database_url: str, make_collection: MakeCollection
) -> None:
    before = await Store.open(database_url)
    collection = await make_collection(before)
    await before.close()
    async with connected(database_url) as predecessor:
        async with predecessor.transaction():
            # What the predecessor's server process still works at after the predecessor was killed.
            counter = f"UPDATE ringfort.counters SET seq = seq + 1 WHERE collection_uid = {collection.uid}"
            await predecessor.execute(counter.encode())
            opening = asyncio.create_task(Store.open(database_url))
            async with connected(database_url) as watcher:
                waiting = b"SELECT FROM pg_locks WHERE NOT granted"
                while (await watcher.execute(waiting)).rowcount == 0:
                    pass
            assert not opening.done()
        after = await opening
    assert await after.position(collection) == 1
    await after.close()


# -- another log under the same URL


async def restore(postgres_url: str, backup: str, name: str) -> None:
    """Put a copy of the database in the place of the one that is there, clients or not."""
    async with connected(postgres_url) as connection:
        await connection.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false".encode())
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
        await connection.execute(f"ALTER DATABASE {backup} RENAME TO {name}".encode())


@pytest.fixture
async def backed_up(
    postgres_url: str, make_collection: MakeCollection
) -> AsyncIterator[tuple[str, str, str, Collection]]:
    """A database's URL and name, its backup's name, and a collection at position 3, in both."""
    name, backup = f"restored_{uuid4().hex}", f"backup_{uuid4().hex}"
    url = make_conninfo(postgres_url, dbname=name)
    async with connected(postgres_url) as connection:
        await connection.execute(f"CREATE DATABASE {name}".encode())
        store = await Store.open(url)
        collection = await make_collection(store)
        await write(store, collection, *map(upsert, "abc"))
        await store.close()
        await connection.execute(f"CREATE DATABASE {backup} TEMPLATE {name}".encode())
    yield url, name, backup, collection
    async with connected(postgres_url) as connection:
        for each in (name, backup):
            await connection.execute(f"DROP DATABASE IF EXISTS {each} WITH (FORCE)".encode())


async def test_a_restored_backup_is_another_log_in_a_later_term(
    backed_up: tuple[str, str, str, Collection], postgres_url: str
) -> None:
    url, name, backup, collection = backed_up
    store = await Store.open(url)
    log_id = store.log_id
    lost = await write(store, collection, upsert("lost"), upsert("d"))
    assert [outcome.version for outcome in lost.outcomes] == [Version(1, 4), Version(1, 5)]
    await restore(postgres_url, backup, name)
    # Whatever is asked from now on is answered about the backup, in its own log's name, or refused.
    async with asyncio.timeout(20):
        while store.log_id == log_id:
            try:
                commit = await write(store, collection, upsert("early"), within_s=0.2)
            except RingfortError:
                continue
            assert commit.log_id != log_id
            assert all(outcome.version >= Version(2, 4) for outcome in commit.outcomes if outcome.version)
    assert await eventually(lambda: store.get(collection, ["lost"], with_vectors=False)) == ([None], None)
    position = await store.position(collection)
    with pytest.raises(UnknownLog):
        await store.tail(collection, position + 1)
    # Position 5 is taken again, and a version of the log that was lost does not fit it.
    commit = await write(store, collection, *(upsert(f"{n}") for n in range(3)), upsert("d"))
    (newest,) = [outcome.version for outcome in commit.outcomes[-1:]]
    assert newest is not None
    assert newest > Version(1, 1_000_000)
    refused = await write(store, collection, upsert("d", if_version=Version(1, newest.seq)))
    assert isinstance(refused.outcomes[0].error, VersionConflict)
    held = await write(store, collection, upsert("d", if_version=newest))
    assert held.outcomes[0].error is None
    # What lies there from before keeps its version.
    rows, _ = await store.get(collection, ["a"], with_vectors=False)
    assert rows[0] is not None
    assert rows[0].version == Version(1, 1)
    await store.close()
    # The term stays when the same database is opened once more.
    again = await Store.open(url)
    assert (again.log_id, (await write(again, collection, upsert("z"))).outcomes[0].version) == (
        store.log_id,
        Version(2, newest.seq + 2),
    )
    await again.close()


async def eventually(ask: Callable[[], Awaitable[object]]) -> object:
    async with asyncio.timeout(20):
        while True:
            try:
                return await ask()
            except (StorageUnavailable, NotFound):
                await asyncio.sleep(0.01)
