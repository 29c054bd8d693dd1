"""The log: the order of positions is the order of visibility, so a tail never skips a row."""

import asyncio

import numpy as np
import psycopg
import pytest

from services.deadline import Deadline
from services.metadata.store import Store
from shard_router.errors import UnknownLog
from shard_router.model import Collection, LogRow, Patch, Remove, Upsert, Version, Write

DIM = 8


def upsert(id: str, fill: float = 1.0) -> Upsert:
    return Upsert(id, None, {}, np.full(DIM, fill, np.float32))


async def test_an_empty_log(store: Store, collection: Collection) -> None:
    tail = await store.tail(collection, 0)
    assert (tail.log_id, tail.after, tail.upto, list(tail.rows)) == (store.log_id, 0, 0, [])
    assert tail.vectors.shape == (0, DIM)
    assert tail.vectors.dtype == np.float32


async def test_pages_add_up_to_the_log(store: Store, collection: Collection) -> None:
    writes: list[Write] = [upsert(f"{n % 40}", n) for n in range(100)]
    writes += [Remove("7"), Patch("8", {"rank": 1}), Remove("nobody")]
    await store.write(collection, writes, deadline=Deadline.after(10))
    whole = await store.tail(collection, 0)
    assert whole.upto == await store.position(collection) == 102
    assert len(whole.rows) == 40
    position, pages, rows, vectors = 0, 0, list[LogRow](), list[np.ndarray]()
    while position < 102:
        page = await store.tail(collection, position, limit=9)
        assert page.after == position
        assert all(position < row.version.seq <= page.upto for row in page.rows)
        rows += page.rows
        vectors.append(page.vectors)
        position, pages = page.upto, pages + 1
    assert pages == 5
    assert rows == list(whole.rows)
    np.testing.assert_array_equal(np.concatenate(vectors), whole.vectors)
    assert [row.version.seq for row in rows] == sorted(row.version.seq for row in rows)


async def test_a_full_last_page_is_followed_by_an_empty_one(store: Store, collection: Collection) -> None:
    await store.write(collection, [upsert("a"), upsert("b")], deadline=Deadline.after(10))
    assert (await store.tail(collection, 0, limit=2)).upto == 2
    assert list((await store.tail(collection, 2, limit=2)).rows) == []


async def test_a_position_the_log_never_had_is_refused(store: Store, collection: Collection) -> None:
    await store.write(collection, [upsert("a")], deadline=Deadline.after(10))
    with pytest.raises(UnknownLog) as refused:
        await store.tail(collection, 2)
    assert (refused.value.position, refused.value.counter) == (2, 1)


async def test_a_bigserial_log_loses_rows(database_url: str) -> None:
    """Why positions are not a sequence: number 2 commits before 1, and a reader at 2 never sees 1."""
    async with (
        await psycopg.AsyncConnection.connect(database_url) as slow,
        await psycopg.AsyncConnection.connect(database_url) as fast,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as reader,
    ):
        await reader.execute("CREATE TABLE naive (seq bigserial PRIMARY KEY, id text)")
        await slow.execute("INSERT INTO naive (id) VALUES ('slow')")
        await fast.execute("INSERT INTO naive (id) VALUES ('fast')")
        await fast.commit()
        page = await (await reader.execute("SELECT seq, id FROM naive WHERE seq > 0 ORDER BY seq")).fetchall()
        assert page == [(2, "fast")]
        await slow.commit()
        rest = await (await reader.execute("SELECT seq, id FROM naive WHERE seq > 2 ORDER BY seq")).fetchall()
        assert rest == []
        everything = await (await reader.execute("SELECT id FROM naive ORDER BY seq")).fetchall()
        assert everything == [("slow",), ("fast",)]


async def test_a_write_waits_for_the_one_that_took_positions_before(
    store: Store, collection: Collection, database_url: str
) -> None:
    """The same race against the counter: the second writer cannot commit first."""
    async with await psycopg.AsyncConnection.connect(database_url) as slow:
        counter = f"UPDATE ringfort.counters SET seq = seq + 1 WHERE collection_uid = {collection.uid}"
        await slow.execute(counter.encode())
        fast = asyncio.create_task(store.write(collection, [upsert("fast")], deadline=Deadline.after(10)))
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watcher:
            waiting = b"SELECT FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
            while (await watcher.execute(waiting)).rowcount == 0:
                pass
        tail = await store.tail(collection, 0)
        assert (tail.upto, list(tail.rows)) == (0, [])
        assert not fast.done()
        row = f"INSERT INTO ringfort.documents_{collection.uid} VALUES (0, 'slow', 1, 1, true, NULL, '{{}}')"
        await slow.execute(row.encode())
        await slow.commit()
        assert (await fast).outcomes[0].version == Version(1, 2)
    assert [row.id for row in (await store.tail(collection, 0)).rows] == ["slow", "fast"]


async def test_a_tail_beside_writers_skips_nothing(store: Store, collection: Collection) -> None:
    writers, batches = 4, 25
    done = 0

    async def keep_writing(writer: int) -> None:
        nonlocal done
        rng = np.random.default_rng(writer)
        for batch in range(batches):
            rows = int(rng.integers(1, 40))
            writes: list[Write] = [upsert(f"{writer}-{batch}-{n}", n) for n in range(rows)]
            if batch % 5 == 4:
                writes.append(Patch(f"{writer}-{batch - 1}-0", {"rank": batch}))
                writes.append(Remove(f"{writer}-{batch - 2}-0"))
            await store.write(collection, writes, deadline=Deadline.after(20))
        done += 1

    async def follow() -> tuple[dict[str, LogRow], int]:
        position, applied = 0, dict[str, LogRow]()
        while True:
            finished = done == writers
            delta = await store.tail(collection, position, limit=23)
            for row in delta.rows:
                known = applied.get(row.id)
                assert known is None or known.version < row.version
                applied[row.id] = row
            position = delta.upto
            if finished and delta.after == delta.upto:
                return applied, position

    (applied, position), *_ = await asyncio.gather(
        follow(), *(keep_writing(writer) for writer in range(writers))
    )
    assert position == await store.position(collection)
    whole = await store.tail(collection, 0, limit=100_000)
    assert applied == {row.id: row for row in whole.rows}
