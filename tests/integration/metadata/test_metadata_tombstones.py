"""Deletes are remembered for a time: what is forgotten after it, and who has to begin with nothing then."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import psycopg
import pytest

from services.deadline import Deadline
from services.metadata.store import Store
from services.metadata.tombstones import PURGE_ROWS
from shard_router.errors import LogPurged
from shard_router.model import Collection, Commit, LogDelta, Remove, Upsert, Write

MakeCollection = Callable[..., Awaitable[Collection]]
DIM = 8
#: Far shorter than any test, and far longer: the ages themselves are the server's business.
AT_ONCE_S, NEVER_S = 1e-3, 3600.0


def upsert(id: str) -> Upsert:
    return Upsert(id, None, {}, np.ones(DIM, np.float32))


async def write(store: Store, collection: Collection, *writes: Write) -> Commit:
    return await store.write(collection, writes, deadline=Deadline.after(10))


@pytest.fixture
async def forgetful(database_url: str) -> AsyncIterator[Store]:
    """A store that forgets deletes at once."""
    store = await Store.open(database_url, tombstone_ttl_s=AT_ONCE_S)
    yield store
    await store.close()


async def forgotten(store: Store, collection: Collection) -> None:
    """Returns once the collection's log knows of no delete."""
    async with asyncio.timeout(20):
        while any(row.deleted for row in (await store.tail(collection, 0, 10_000)).rows):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert store.stats()["purge_failures_total"] == 0


async def read(tail: Callable[[int], Awaitable[LogDelta]], after: int) -> tuple[dict[str, bool], int]:
    """What a reader at a position learns (id -> deleted) and where it ends."""
    told: dict[str, bool] = {}
    while True:
        delta = await tail(after)
        told |= {row.id: row.deleted for row in delta.rows}
        if delta.upto == after:
            return told, after
        after = delta.upto


async def test_tombstones_go_and_the_floor_says_so(forgetful: Store, make_collection: MakeCollection) -> None:
    collection = await make_collection(forgetful)
    await write(forgetful, collection, upsert("kept"), upsert("gone"), upsert("late"))
    await write(forgetful, collection, Remove("gone"))
    await forgotten(forgetful, collection)
    # Position 4 was the tombstone. Who stands at it or beyond knows of it.
    assert (await forgetful.tail(collection, 4)).upto == 4
    for below in (1, 2, 3):
        with pytest.raises(LogPurged) as refused:
            await forgetful.tail(collection, below)
        assert (refused.value.position, refused.value.floor) == (below, 4)
    # Who has nothing need not hear of it.
    assert await read(forgetful.follow(collection), 0) == ({"kept": False, "late": False}, 4)
    # Live documents stay, wherever they lie, and a log goes on.
    await write(forgetful, collection, upsert("gone"))
    assert [row.id for row in (await forgetful.tail(collection, 4)).rows] == ["gone"]


async def test_a_log_without_deletes_is_read_from_anywhere(
    forgetful: Store, make_collection: MakeCollection
) -> None:
    untouched, deleted_from = await make_collection(forgetful), await make_collection(forgetful)
    for collection in (untouched, deleted_from):
        await write(forgetful, collection, upsert("a"), upsert("b"), upsert("a"))
    await write(forgetful, deleted_from, Remove("a"))
    await forgotten(forgetful, deleted_from)
    assert [row.id for row in (await forgetful.tail(untouched, 1)).rows] == ["b", "a"]


async def test_nothing_is_forgotten_before_its_time(
    database_url: str, make_collection: MakeCollection
) -> None:
    store = await Store.open(database_url, tombstone_ttl_s=NEVER_S)
    collection = await make_collection(store)
    await write(store, collection, upsert("old"), upsert("new"), Remove("old"))
    await store.close()
    # As if an hour had passed since the log was noted to stand at 3.
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(
            "INSERT INTO ringfort.marks VALUES (%s, 3, clock_timestamp() - make_interval(secs => %s))",
            [collection.uid, NEVER_S / 2],
        )
        forgetful = await Store.open(database_url, tombstone_ttl_s=NEVER_S / 4)
        await forgetful.purge_tombstones()
        assert not [row for row in (await forgetful.tail(collection, 0)).rows if row.deleted]
        # The mark is used up; a delete of now is not as old as it.
        await write(forgetful, collection, Remove("new"))
        await forgetful.purge_tombstones()
        assert [row.deleted for row in (await forgetful.tail(collection, 3)).rows] == [True]
        await forgetful.close()


async def test_a_reader_that_began_with_nothing_is_not_refused_half_way(
    forgetful: Store, make_collection: MakeCollection
) -> None:
    collection = await make_collection(forgetful)
    live = [f"{n:05}" for n in range(6_000)]
    await write(forgetful, collection, *map(upsert, live), upsert("x"))
    await write(forgetful, collection, Remove("x"))
    await forgotten(forgetful, collection)
    tail = forgetful.follow(collection)
    first = await tail(0)
    assert 0 < first.upto < len(live)
    # Its second page begins below the floor, which lies where the log stood when the reader began.
    assert (await read(tail, first.upto))[1] == len(live) + 2
    # What is deleted and forgotten while it reads does concern it.
    tail = forgetful.follow(collection)
    first = await tail(0)
    await write(forgetful, collection, Remove(live[0]))
    await forgotten(forgetful, collection)
    for _ in range(2):
        with pytest.raises(LogPurged):
            await tail(first.upto)
    told, _ = await read(tail, 0)
    assert told.keys() == set(live[1:])
    # Who reads from 0 what it lacks is still one that has documents, wherever it stands itself.
    with pytest.raises(LogPurged):
        await tail(first.upto + 1)


async def test_many_are_purged_page_by_page_beside_writers(
    forgetful: Store, make_collection: MakeCollection
) -> None:
    """Positions, claims and counts stay right while tombstones are written, revived and purged at once."""
    collection = await make_collection(forgetful)
    ids = [f"{n}" for n in range(PURGE_ROWS + 700)]
    expected: set[str] = set()
    for round in range(3):
        await write(forgetful, collection, *map(upsert, ids))
        gone = ids[round::2]
        await asyncio.gather(
            write(forgetful, collection, *map(Remove, gone)),
            *(write(forgetful, collection, upsert(f"beside-{round}-{n}")) for n in range(20)),
        )
        expected = set(ids) - set(gone)
    expected |= {f"beside-{round}-{n}" for round in range(3) for n in range(20)}
    await forgotten(forgetful, collection)
    rows, _ = await forgetful.scan(collection, None, 10_000, with_vectors=False)
    assert {row.id for row in rows} == expected


async def test_a_collection_that_goes_meanwhile_is_no_failure(
    forgetful: Store, make_collection: MakeCollection
) -> None:
    """At whatever moment of a purge it goes."""

    async def come_and_go() -> None:
        for _ in range(20):
            collection = await make_collection(forgetful)
            await write(forgetful, collection, upsert("a"), upsert("b"), Remove("a"))
            await forgetful.delete_collection("default", collection.name)

    churn = asyncio.gather(come_and_go(), come_and_go())
    while not churn.done():
        await forgetful.purge_tombstones()
    await churn
    other = await make_collection(forgetful)
    await write(forgetful, other, upsert("a"), Remove("a"))
    await forgotten(forgetful, other)
