"""What a lost connection, a slow server or a rival does to writes: nothing lost, nothing twice."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
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

MakeCollection = Callable[..., Awaitable[Collection]]
DIM = 8
#: The end of an answer outside a transaction: ReadyForQuery, idle.
READY = b"Z\x00\x00\x00\x05I"


def upsert(id: str, fill: float = 1.0) -> Upsert:
    return Upsert(id, None, {}, np.full(DIM, fill, np.float32))


async def write(store: Store, collection: Collection, *writes: Write, within_s: float = 10) -> Commit:
    return await store.write(collection, writes, deadline=Deadline.after(within_s))


class Fault(Enum):
    """What happens to one message of the store, whose connection is cut at that moment."""

    LOSE_REQUEST = "the server never gets it"
    LOSE_ANSWER = "the server acts on it, and nobody hears"
    DELAY_REQUEST = "the server gets it later, just before the same write comes once more"
    HOLD_REQUEST = "the server never gets it, and the connection is not cut: as if the store was stopped"


class Wire:
    """A relay between a store and its server, on which messages get lost."""

    def __init__(self, url: str) -> None:
        self._upstream = conninfo_to_dict(url)
        self._tasks = asyncio.TaskGroup()
        self._streams: set[asyncio.StreamWriter] = set()
        self._late: tuple[bytes, asyncio.StreamWriter] | None = None
        self._late_done = asyncio.Event()
        #: What happens to the next message that contains `marker`.
        self.fault: Fault | None = None
        self.marker = b""
        #: A message is held.
        self.held = asyncio.Event()
        #: The server's answer to a message that came late.
        self.late_answer = b""
        #: Connections are refused while it is set.
        self.down = False
        self.url = url

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Wire"]:
        async with self._tasks:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.url = make_conninfo(self.url, host="127.0.0.1", port=server.sockets[0].getsockname()[1])
            yield self
            server.close()
            self._late_done.set()
            self.cut()

    def cut(self) -> None:
        for stream in self._streams:
            stream.transport.abort()

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self.down:
            to_client.transport.abort()
            return
        from_server, to_server = await asyncio.open_connection(self._upstream["host"], self._upstream["port"])
        self._streams |= {to_client, to_server}
        self._tasks.create_task(self._requests(from_client, to_client, to_server))
        self._tasks.create_task(self._answers(from_server, to_client))

    async def _requests(
        self,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        to_server: asyncio.StreamWriter,
    ) -> None:
        with suppress(ConnectionError):
            while message := await from_client.read(1 << 20):
                if self._late is not None and any(
                    sign in message for sign in (b"UPDATE counters", b"LOCK TABLE")
                ):
                    await self._deliver_late()
                if self.fault is None or self.marker not in message:
                    to_server.write(message)
                    continue
                fault, self.fault = self.fault, None
                if fault is Fault.HOLD_REQUEST:
                    self.held.set()
                    while await from_client.read(1 << 20):
                        pass
                    break
                to_client.transport.abort()
                if fault is Fault.LOSE_ANSWER:
                    to_server.write(message)
                if fault is Fault.DELAY_REQUEST:
                    self._late = message, to_server
                    return
                break
        if not to_server.is_closing():
            to_server.write_eof()

    async def _deliver_late(self) -> None:
        assert self._late is not None
        (message, to_server), self._late = self._late, None
        to_server.write(message)
        await self._late_done.wait()
        to_server.write_eof()

    async def _answers(self, from_server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while message := await from_server.read(1 << 20):
                if not to_client.is_closing():
                    to_client.write(message)
                    continue
                self.late_answer += message
                if READY in message:
                    self._late_done.set()
        to_client.transport.abort()


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Wire]:
    async with Wire(database_url).opened() as wire:
        yield wire


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


MARK = np.full(DIM, 2, np.float32).tobytes()
#: A batch that is one message, and one whose positions depend on what is stored.
BATCHES: dict[str, list[Write]] = {
    "unconditional": [upsert("b", 2), upsert("a", 3)],
    "conditional": [upsert("b", 2), Patch("old", {"rank": 1}), upsert("a", 3), Remove("gone")],
}
#: Where the server has committed and only the answer is lost.
COMMITTED = {
    "unconditional": (Fault.LOSE_ANSWER, MARK),
    "conditional": (Fault.LOSE_ANSWER, b"COMMIT"),
}


async def warmed_up(store: Store, make_collection: MakeCollection) -> Collection:
    """A collection at position 4, and a connection on which every statement of a write is prepared."""
    collection: Collection = await make_collection(store)
    await write(store, collection, upsert("old"), upsert("gone"))
    await write(store, collection, Patch("old", {"rank": 0}), Remove("nobody"), upsert("other"))
    return collection


@pytest.mark.parametrize(
    ("fault", "batch", "marker"),
    [
        (Fault.LOSE_REQUEST, "unconditional", MARK),
        (Fault.LOSE_ANSWER, "unconditional", MARK),
        (Fault.DELAY_REQUEST, "unconditional", MARK),
        (Fault.LOSE_REQUEST, "conditional", b"BEGIN"),
        (Fault.LOSE_REQUEST, "conditional", MARK),
        (Fault.LOSE_ANSWER, "conditional", MARK),
        (Fault.LOSE_REQUEST, "conditional", b"COMMIT"),
        (Fault.LOSE_ANSWER, "conditional", b"COMMIT"),
        (Fault.DELAY_REQUEST, "conditional", b"COMMIT"),
    ],
    ids=lambda part: "vector" if part is MARK else getattr(part, "name", str(part)),
)
async def test_a_write_whose_fate_is_unknown_happens_once(
    wire: Wire,
    wired: Store,
    make_collection: MakeCollection,
    fault: Fault,
    batch: str,
    marker: bytes,
) -> None:
    collection = await warmed_up(wired, make_collection)
    position = await wired.position(collection)
    writes = BATCHES[batch]
    wire.fault, wire.marker = fault, marker
    commit = await write(wired, collection, *writes)
    assert wire.fault is None
    assert wired.stats()["unconfirmed_total"] == 1
    assert (READY in wire.late_answer) == (
        fault is Fault.DELAY_REQUEST or (fault, marker) == COMMITTED[batch]
    )
    assert [outcome.version for outcome in commit.outcomes] == [
        Version(1, position + 1 + place) for place in range(len(writes))
    ]
    assert commit.upto == await wired.position(collection) == position + len(writes)
    tail = await wired.tail(collection, position)
    assert {row.id: row.version for row in tail.rows} == {
        one.id: outcome.version for one, outcome in zip(writes, commit.outcomes, strict=True)
    }
    # The next write goes on from there, on a connection that works.
    following = await write(wired, collection, upsert("next"))
    assert following.delta is not None
    assert following.delta.after == commit.upto


@pytest.mark.parametrize("marker", [MARK, b"COMMIT"], ids=["vector", "COMMIT"])
async def test_who_is_stopped_within_a_transaction_does_not_keep_others_from_the_log(
    wire: Wire, make_collection: MakeCollection, marker: bytes
) -> None:
    store = await Store.open(wire.url, pool_size=4)
    try:
        collection = await warmed_up(store, make_collection)
        position = await store.position(collection)
        wire.fault, wire.marker = Fault.HOLD_REQUEST, marker
        batch = BATCHES["conditional"]
        stopped = asyncio.create_task(write(store, collection, *batch, within_s=60))
        await wire.held.wait()
        # It holds the log's counter.
        other = await write(store, collection, upsert("meanwhile", 4), within_s=8)
        assert [outcome.version for outcome in other.outcomes] == [Version(1, position + 1)]
        commit = await stopped
        assert commit.upto == await store.position(collection) == position + 1 + len(batch)
        assert store.stats()["unconfirmed_total"] == 1
    finally:
        await store.close()


async def test_no_answer_about_a_commit_is_said(
    wire: Wire,
    wired: Store,
    make_collection: MakeCollection,
) -> None:
    collection = await warmed_up(wired, make_collection)
    position = await wired.position(collection)
    wire.fault, wire.marker, wire.down = Fault.LOSE_ANSWER, MARK, True
    with pytest.raises(StorageUnavailable, match="whether a transaction was committed cannot be told"):
        await write(wired, collection, upsert("a", 2), within_s=0.5)
    wire.down = False
    assert await eventually_position(wired, collection) == position + 1


async def test_a_commit_too_long_ago_to_be_remembered_is_not_repeated(
    wire: Wire, wired: Store, make_collection: MakeCollection, database_url: str
) -> None:
    collection = await warmed_up(wired, make_collection)
    position = await wired.position(collection)
    wire.fault, wire.marker, wire.down = Fault.LOSE_ANSWER, MARK, True
    lost = asyncio.create_task(write(wired, collection, upsert("a", 2)))
    async with watcher(database_url) as connection:
        committed = (
            f"SELECT FROM ringfort.counters WHERE collection_uid = {collection.uid} AND seq > {position}"
        )
        while (await connection.execute(committed.encode())).rowcount == 0:
            pass
        # What many other transactions would do.
        await connection.execute("UPDATE ringfort.counters SET writes = writes + 5000")
        await connection.execute("DELETE FROM ringfort.recent_writes")
    wire.down = False
    with pytest.raises(StorageUnavailable, match="transactions have passed"):
        await lost
    assert await wired.position(collection) == position + 1


async def eventually_position(store: Store, collection: Collection) -> int:
    async with asyncio.timeout(20):
        while True:
            with suppress(StorageUnavailable):
                return await store.position(collection)


async def test_the_server_may_go_and_come_back(
    wire: Wire,
    wired: Store,
    make_collection: MakeCollection,
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
    batches, rows, finished, doubted = 30, 17, 0, 0

    async def keep_writing(writer: int) -> None:
        nonlocal finished, doubted
        for batch in range(batches):
            ids = [f"{writer}-{batch}-{n}" for n in range(rows)]
            writes: list[Write] = [upsert(id) for id in ids]
            if batch % 3 == 2:
                writes.append(Patch(f"{writer}-{batch - 1}-0", {"rank": batch}))
            commit = None
            while commit is None:
                try:
                    commit = await write(store, collection, *writes, within_s=30)
                except StorageUnavailable:
                    doubted += len(writes)
            for one, outcome in zip(writes, commit.outcomes, strict=True):
                assert outcome.error is None
                told[one.id] = outcome.version
        finished += 1

    async def kill() -> int:
        killed = 0
        async with watcher(database_url) as connection:
            while finished < 3:
                ended = await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                    "AND datname = current_database() AND state <> 'idle' ORDER BY random() LIMIT 1"
                )
                killed += ended.rowcount
                await asyncio.sleep(0.01)
        return killed

    killed, *_ = await asyncio.gather(kill(), *(keep_writing(writer) for writer in range(3)))
    assert killed > 5
    whole = await store.tail(collection, 0, limit=100_000)
    assert {row.id: row.version for row in whole.rows} == told
    # Every position was taken by a write that was told so, or left in doubt: nothing happened twice.
    confirmed = 3 * (batches * rows + batches // 3)
    assert confirmed <= whole.upto <= confirmed + doubted


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
    make_collection: MakeCollection,
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
            await store.ping()
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
    make_collection: MakeCollection,
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
            await wired.ping()
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
