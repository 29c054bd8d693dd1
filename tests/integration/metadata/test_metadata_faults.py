"""What a lost connection, a slow server or a rival does to writes: nothing lost, nothing twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from services.deadline import Deadline
from services.metadata.store import Store
from shard_router.errors import DeadlineExceeded, RingfortError, StorageUnavailable
from shard_router.model import Collection, Commit, Patch, Remove, Upsert, Version, Write

DIM = 8
#: The end of an answer outside a transaction: ReadyForQuery, idle.
READY = b"Z\x00\x00\x00\x05I"


def upsert(id: str, fill: float = 1.0) -> Upsert:
    return Upsert(id, None, {}, np.full(DIM, fill, np.float32))


async def write(store: Store, collection: Collection, *writes: Write, within_s: float = 10) -> Commit:
    return await store.write(collection, writes, deadline=Deadline.after(within_s))


class Fault(Enum):
    """What happens to the next message that the store sends, before its connection is cut."""

    LOSE_REQUEST = "the server never gets it"
    LOSE_ANSWER = "the server acts on it, and nobody hears"
    DELAY_REQUEST = "the server gets it just before the same write comes once more"


class Wire:
    """A relay between a store and its server, on which messages get lost."""

    def __init__(self, url: str) -> None:
        self._given = conninfo_to_dict(url)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        #: A message kept back, and the server's side of the connection it came on.
        self._kept: tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.fault: Fault | None = None
        #: The server's answer to the message that was kept back.
        self.late_answer = b""
        #: Connections are refused while it is set.
        self.down = False
        self.url = url

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = make_conninfo(self.url, host="127.0.0.1", port=port)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self.down:
            to_client.transport.abort()
            return
        from_server, to_server = await asyncio.open_connection(self._given["host"], self._given["port"])
        self._writers |= {to_client, to_server}
        tasks = {
            asyncio.create_task(self._up(from_client, to_client, from_server, to_server)),
            asyncio.create_task(self._down(from_server, to_client)),
        }
        self._tasks |= tasks

    async def _up(
        self,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        with suppress(ConnectionError):
            while message := await from_client.read(1 << 20):
                if self._kept is not None and b"UPDATE counters" in message:
                    await self._deliver_late()
                fault, self.fault = self.fault, None
                match fault:
                    case None:
                        to_server.write(message)
                    case Fault.LOSE_REQUEST:
                        to_client.transport.abort()
                        to_server.transport.abort()
                    case Fault.LOSE_ANSWER:
                        to_client.transport.abort()
                        to_server.write(message)
                    case Fault.DELAY_REQUEST:
                        to_client.transport.abort()
                        self._kept = (message, from_server, to_server)
        if self._kept is None and not to_server.is_closing():
            to_server.write_eof()

    async def _deliver_late(self) -> None:
        assert self._kept is not None
        (message, _, to_server), self._kept = self._kept, None
        self._late = asyncio.Event()
        to_server.write(message)
        await self._late.wait()
        to_server.transport.abort()

    async def _down(self, from_server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while message := await from_server.read(1 << 20):
                if to_client.is_closing():
                    self.late_answer += message
                    if self.late_answer.endswith(READY) and hasattr(self, "_late"):
                        self._late.set()
                else:
                    to_client.write(message)
        to_client.transport.abort()


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Wire]:
    wire = Wire(database_url)
    await wire.open()
    yield wire
    await wire.close()


@pytest.fixture
async def wired(wire: Wire) -> AsyncIterator[Store]:
    """A store with one connection, so that it is known which message is the next."""
    store = await Store.open(wire.url, pool_size=1)
    yield store
    await store.close()


@asynccontextmanager
async def watcher(database_url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        yield connection


#: A batch that is one message, and one whose positions depend on what is stored.
BATCHES: dict[str, list[Write]] = {
    "unconditional": [upsert("a", 2), upsert("b", 2), upsert("a", 3)],
    "conditional": [
        upsert("a", 2),
        Patch("old", {"rank": 1}),
        upsert(
            "b",
            2,
        ),
        Remove("gone"),
    ],
}


async def warmed_up(store: Store, make_collection) -> Collection:  # type: ignore[no-untyped-def]
    """A collection at position 4, and a connection on which every statement of a write is prepared."""
    collection: Collection = await make_collection(store)
    await write(store, collection, upsert("old"), upsert("gone"))
    await write(store, collection, Patch("old", {"rank": 0}), Remove("nobody"), upsert("other"))
    return collection


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fault", Fault)
async def test_a_commit_whose_fate_is_unknown_happens_once(
    wire: Wire,
    wired: Store,
    make_collection,  # type: ignore[no-untyped-def]
    fault: Fault,
    batch: str,
) -> None:
    collection = await warmed_up(wired, make_collection)
    position = await wired.position(collection)
    writes = BATCHES[batch]
    wire.fault = fault
    commit = await write(wired, collection, *writes)
    assert wire.fault is None
    assert wired.stats()["unconfirmed_total"] == 1
    seqs = [position + 1 + place for place in range(len(writes))]
    assert [outcome.version for outcome in commit.outcomes] == [Version(1, seq) for seq in seqs]
    assert commit.upto == await wired.position(collection) == seqs[-1]
    tail = await wired.tail(collection, position)
    assert {row.id: row.version for row in tail.rows} == {
        one.id: outcome.version for one, outcome in zip(writes, commit.outcomes, strict=True)
    }
    # The next write goes on from there, on a connection that works.
    after = await write(wired, collection, upsert("next"))
    assert after.delta is not None
    assert after.delta.after == commit.upto


async def test_a_write_that_arrives_late_cannot_happen_twice(
    wire: Wire,
    wired: Store,
    make_collection,  # type: ignore[no-untyped-def]
) -> None:
    collection = await warmed_up(wired, make_collection)
    position = await wired.position(collection)
    wire.fault = Fault.DELAY_REQUEST
    commit = await write(wired, collection, upsert("a"))
    assert wire.late_answer.endswith(READY)
    # It was committed by the late message, and the repetition found that out.
    assert b"INSERT" in wire.late_answer or b"SELECT 1" in wire.late_answer
    assert (commit.upto, commit.delta) == (position + 1, None)
    assert await wired.position(collection) == position + 1


async def test_no_answer_about_a_commit_is_said(
    wire: Wire,
    wired: Store,
    make_collection,  # type: ignore[no-untyped-def]
) -> None:
    collection = await warmed_up(wired, make_collection)
    position = await wired.position(collection)
    wire.fault, wire.down = Fault.LOSE_ANSWER, True
    with pytest.raises(StorageUnavailable, match="whether a transaction was committed"):
        await write(wired, collection, upsert("a"), within_s=0.5)
    wire.down = False
    assert await eventually_position(wired, collection) == position + 1


async def eventually_position(store: Store, collection: Collection) -> int:
    async with asyncio.timeout(20):
        while True:
            with suppress(StorageUnavailable):
                return await store.position(collection)


async def test_the_server_may_go_and_come_back(
    wire: Wire,
    wired: Store,
    make_collection,  # type: ignore[no-untyped-def]
) -> None:
    collection = await warmed_up(wired, make_collection)
    wire.down = True
    wire.cut()
    with pytest.raises(StorageUnavailable):
        await wired.ping()
    with pytest.raises(RingfortError) as refused:
        await write(wired, collection, upsert("a"), within_s=0.5)
    assert isinstance(refused.value, StorageUnavailable | DeadlineExceeded)
    wire.down = False
    await eventually_position(wired, collection)
    commit = await write(wired, collection, upsert("b"))
    assert commit.outcomes[0].version is not None


async def test_connections_the_server_ended_are_not_lent(
    store: Store, collection: Collection, database_url: str
) -> None:
    await asyncio.gather(*(store.ping() for _ in range(8)))
    async with watcher(database_url) as connection:
        ended = await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'ringfort'"
        )
        assert ended.rowcount > 2
    await asyncio.gather(*(store.ping() for _ in range(8)))
    commit = await write(store, collection, upsert("a"))
    assert commit.upto == 1
    assert store.stats()["claim_held"] == 1


async def test_backends_killed_around_commits_lose_and_repeat_nothing(
    store: Store, collection: Collection, database_url: str
) -> None:
    told: dict[str, Version | None] = {}
    batches, rows, finished = 30, 17, 0

    async def keep_writing(writer: int) -> None:
        nonlocal finished
        for batch in range(batches):
            ids = [f"{writer}-{batch}-{n}" for n in range(rows)]
            writes: list[Write] = [upsert(id) for id in ids]
            if batch % 3 == 2:
                writes.append(Patch(f"{writer}-{batch - 1}-0", {"rank": batch}))
            while True:
                # A refusal is honest only about batches that may have happened: here every batch is told.
                try:
                    commit = await write(store, collection, *writes, within_s=30)
                    break
                except StorageUnavailable as away:
                    assert "at every attempt" in str(away)
                    if any((await store.get(collection, ids[:1], with_vectors=False))[0]):
                        raise
            for one, outcome in zip(writes, commit.outcomes, strict=True):
                assert outcome.error is None
                told[one.id] = outcome.version
        finished += 1

    async def kill() -> int:
        killed = 0
        async with watcher(database_url) as connection:
            while finished < 3:
                ended = await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid() AND state <> 'idle' ORDER BY random() LIMIT 1"
                )
                killed += ended.rowcount
                await asyncio.sleep(0.01)
        return killed

    killed, *_ = await asyncio.gather(kill(), *(keep_writing(writer) for writer in range(3)))
    assert killed > 5
    whole = await store.tail(collection, 0, limit=100_000)
    assert {row.id: row.version for row in whole.rows} == told
    # Every position was taken by a write that was told so: nothing happened twice.
    assert whole.upto == 3 * (batches * rows + batches // 3)


async def test_a_deadline_ends_a_write_that_waits(
    store: Store, collection: Collection, database_url: str
) -> None:
    async with watcher(database_url) as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM ringfort.counters WHERE collection_uid = %s FOR UPDATE", [collection.uid]
        )
        for writes in BATCHES.values():
            with pytest.raises(DeadlineExceeded, match="database"):
                await write(store, collection, *writes, within_s=0.1)
        with pytest.raises(DeadlineExceeded):
            await write(store, collection, upsert("a"), within_s=0)
        # Readers do not wait for writers.
        assert await store.position(collection) == 0
    assert (await write(store, collection, upsert("a"))).upto == 1


async def test_the_statement_timeout_ends_what_hangs(
    database_url: str,
    make_collection,  # type: ignore[no-untyped-def]
) -> None:
    store = await Store.open(database_url, statement_timeout_ms=150)
    collection = await make_collection(store)
    async with watcher(database_url) as connection, connection.transaction():
        await connection.execute(f"LOCK TABLE ringfort.documents_{collection.uid}".encode())
        with pytest.raises(DeadlineExceeded, match="database"):
            await store.get(collection, ["a"], with_vectors=False)
        for writes in BATCHES.values():
            with pytest.raises(DeadlineExceeded, match="database"):
                await write(store, collection, *writes)
    assert (await store.tail(collection, 0)).upto == 0
    await store.close()


async def test_many_writers_leave_connections_to_readers(
    store: Store, collection: Collection, database_url: str
) -> None:
    async with watcher(database_url) as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM ringfort.counters WHERE collection_uid = %s FOR UPDATE", [collection.uid]
        )
        writers = [asyncio.create_task(write(store, collection, upsert(f"{n}"))) for n in range(40)]
        while store.stats()["waiting_batches"] < 36:
            await asyncio.sleep(0)
        await asyncio.gather(*(store.position(collection) for _ in range(20)))
        assert not any(writer.done() for writer in writers)
    commits = await asyncio.gather(*writers)
    assert sorted(commit.upto for commit in commits) == list(range(1, 41))


async def test_a_lost_claim_is_taken_again(store: Store, collection: Collection, database_url: str) -> None:
    async with watcher(database_url) as connection:
        held = (
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        row = await (await connection.execute(held.encode())).fetchone()
        assert row is not None
        await connection.execute("SELECT pg_terminate_backend(%s, 5000)", row)
        async with asyncio.timeout(10):
            while (again := await (await connection.execute(held.encode())).fetchone()) in (None, row):
                pass
        assert again is not None
    commit = await write(store, collection, upsert("a"))
    assert commit.outcomes[0].version == Version(1, 1)


async def test_a_service_that_was_taken_over_does_not_write(
    wire: Wire,
    wired: Store,
    database_url: str,
    make_collection,  # type: ignore[no-untyped-def]
) -> None:
    collection = await warmed_up(wired, make_collection)
    wire.down = True
    wire.cut()
    rival = await Store.open(database_url)
    wire.down = False
    await eventually_position(wired, collection)
    with pytest.raises(StorageUnavailable):
        await write(wired, collection, upsert("a"))
    assert wired.stats()["claim_held"] == 0
    assert (await write(rival, collection, upsert("b"))).outcomes[0].version is not None
    await rival.close()
    async with asyncio.timeout(10):
        while not wired.stats()["claim_held"]:
            await asyncio.sleep(0.01)
    assert (await write(wired, collection, upsert("a"))).outcomes[0].version is not None


async def test_a_cancelled_write_leaves_the_store_working(
    store: Store, collection: Collection, database_url: str
) -> None:
    async with watcher(database_url) as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM ringfort.counters WHERE collection_uid = %s FOR UPDATE", [collection.uid]
        )
        tasks = [asyncio.create_task(write(store, collection, *writes)) for writes in BATCHES.values()]
        done, _ = await asyncio.wait(tasks, timeout=0.2)
        assert not done
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
    commits = await asyncio.gather(*(write(store, collection, upsert(f"{n}")) for n in range(8)))
    assert sorted(commit.upto for commit in commits) == list(range(1, 9))
