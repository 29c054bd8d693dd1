"""Documents of one collection in several databases: nothing in the wrong one, nothing left, nothing lost."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from services.deadline import Deadline
from services.metadata.store import StartupRefused, Store
from shard_router.databases import databases_of
from shard_router.errors import AlreadyExists, NotFound, StorageUnavailable
from shard_router.model import HOME, Collection, Remove, Upsert
from shard_router.shard_map import Steady

MakeCollection = Callable[..., Awaitable[Collection]]
DIM = 8
IDS = [f"d{i}" for i in range(60)]


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def urls(make_database: Callable[..., str]) -> dict[str, str]:
    return {HOME: make_database(), "east": make_database()}


@asynccontextmanager
async def opened(urls: dict[str, str], **more: Any) -> AsyncIterator[Store]:
    partitions = {name: url for name, url in urls.items() if name != HOME}
    store = await Store.open(urls[HOME], partitions=partitions, **more)
    try:
        yield store
    finally:
        await store.close()


def upserts(ids: list[str]) -> list[Upsert]:
    return [Upsert(id, f"text of {id}", {"rank": i}, np.full(DIM, i, np.float32)) for i, id in enumerate(ids)]


async def fill(store: Store, collection: Collection, ids: list[str]) -> None:
    writes = upserts(ids)
    for database, places in databases_of(collection).cut(ids).items():
        its = [writes[place] for place in places]
        done = await store.write(collection, its, deadline=Deadline.after(10), database=database)
        assert all(outcome.version is not None for outcome in done.outcomes)
        assert done.log_id == store.log_id_of(database)


def stored(url: str, collection: Collection) -> set[str]:
    """The ids that a database has of a collection; KeyError where it has no tables of it."""
    with psycopg.connect(url) as connection:
        try:
            found = connection.execute(
                f"SELECT id FROM ringfort.documents_{collection.uid}".encode()
            ).fetchall()
        except psycopg.errors.UndefinedTable:
            raise KeyError(collection.name) from None
    return {id for (id,) in found}


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_documents_lie_where_their_slots_do_and_are_read_as_one(
    urls: dict[str, str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        made = await make_collection(store)
        assert made.databases == (HOME, "east")
        assert await store.collections() == [made]
        await fill(store, made, IDS)
        cut = databases_of(made).cut(IDS)
        assert {name: stored(url, made) for name, url in urls.items()} == {
            name: {IDS[place] for place in places} for name, places in cut.items()
        }
        assert await store.positions(made) == {name: len(places) for name, places in cut.items()}
        asked = [*IDS[::7], "nobody", *IDS[:3]]
        rows, vectors = await store.get(made, asked, with_vectors=True)
        assert [row and row.id for row in rows] == [id if id in IDS else None for id in asked]
        assert vectors is not None
        assert [int(vector[0]) for vector in vectors] == [IDS.index(id) if id in IDS else 0 for id in asked]
        assert (await store.get(made, [], with_vectors=False)) == ([], None)
        for size in (1, 7, 60, 100):
            found: list[tuple[int, str]] = []
            after = None
            while True:
                page, matrix = await store.scan(made, after, size, with_vectors=True)
                assert matrix is not None
                assert [int(vector[0]) for vector in matrix] == [IDS.index(row.id) for row in page]
                found += [(row.slot, row.id) for row in page]
                if len(page) < size:
                    break
                after = found[-1]
            assert found == sorted(found)
            assert sorted(id for _, id in found) == sorted(IDS)
        assert (await store.scan(made, None, 5, with_vectors=False))[1] is None


async def test_a_collection_made_before_stays_at_home(
    urls: dict[str, str], make_collection: MakeCollection
) -> None:
    async with opened({HOME: urls[HOME]}) as store:
        old = await make_collection(store)
        assert old.databases == (HOME,)
        await fill(store, old, IDS)
    async with opened(urls) as store:
        [again] = await store.collections()
        assert again == old
        rows, _ = await store.get(again, IDS, with_vectors=False)
        assert all(rows)
        with pytest.raises(KeyError):
            stored(urls["east"], old)


async def test_a_partition_that_is_away_at_the_start_is_opened_when_it_comes(
    urls: dict[str, str], make_database: Callable[..., str], make_collection: MakeCollection
) -> None:
    name = f"late_{uuid4().hex}"
    said: list[str] = []
    late = make_conninfo(urls[HOME], dbname=name)
    async with opened({**urls, "late": late}, say=said.append) as store:
        assert any("'late'" in each for each in said)
        assert "does not exist" in store.databases["late"]
        assert (store.databases[HOME], store.databases["east"], store.log_id_of("late")) == ("", "", "")
        with pytest.raises(StorageUnavailable, match="'late' is away"):
            await make_collection(store, name="three")
        make_database(name=name)
        await until(lambda: not store.databases["late"])
        made = await make_collection(store, name="three")
        assert made.databases == (HOME, "east", "late")
        await fill(store, made, IDS)
        assert store.log_id_of("late") in {store.claims[each].log_id for each in store.claims}


async def test_a_partition_is_known_for_what_it_is(
    urls: dict[str, str], make_database: Callable[..., str], make_collection: MakeCollection
) -> None:
    urls["west"] = make_database()
    async with opened(urls) as store:
        made = await make_collection(store)
        await fill(store, made, IDS)
    # Exchanged: neither is written to.
    async with opened({HOME: urls[HOME], "east": urls["west"], "west": urls["east"]}) as store:
        assert "is the partition 'west', not 'east'" in store.databases["east"]
        assert "is the partition 'east', not 'west'" in store.databases["west"]
        places = databases_of(made).cut(IDS)["east"]
        with pytest.raises(StorageUnavailable, match="'east' is away"):
            await store.write(
                made, [Remove(IDS[place]) for place in places], deadline=Deadline.after(10), database="east"
            )
        with pytest.raises(StorageUnavailable) as error:
            await store.get(made, IDS, with_vectors=False)
        assert error.value.field.startswith("ids[")
        rows, _ = await store.get(made, [IDS[databases_of(made).cut(IDS)[HOME][0]]], with_vectors=False)
        assert rows[0] is not None
    with pytest.raises(StartupRefused, match="is a partition"):
        await Store.open(urls["east"])
    # Another service's partition, and its home.
    other = {HOME: make_database(), "east": urls["east"], "home2": urls[HOME]}
    async with opened(other) as store:
        assert "is a partition of another Ringfort service" in store.databases["east"]
        assert "is the home of another Ringfort service" in store.databases["home2"]


async def test_a_name_that_is_needed_and_not_configured_is_said(
    urls: dict[str, str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        made = await make_collection(store)
        await fill(store, made, IDS)
    said: list[str] = []
    async with opened({HOME: urls[HOME]}, say=said.append) as store:
        assert said == ["collections need the database 'east', which metadata.partitions does not name"]
        with pytest.raises(StorageUnavailable, match=r"'east' is away: .* does not name it"):
            await store.scan(made, None, 10, with_vectors=False)
        with pytest.raises(StorageUnavailable, match="'east'"):
            await store.attach(made, "east")
        assert (await store.attach(made))[0] == store.log_id


async def test_a_deleted_collection_leaves_nothing_and_waits_for_a_partition_that_is_away(
    urls: dict[str, str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        first, second = (
            await make_collection(store, name="first"),
            await make_collection(store, name="second"),
        )
        await store.delete_collection("default", "first")
        with pytest.raises(KeyError):
            stored(urls["east"], first)
        await fill(store, second, IDS)
    async with opened({HOME: urls[HOME]}) as store:
        await store.delete_collection("default", "second")
        await store.sweep()
        assert stored(urls["east"], second)
    async with opened(urls) as store:
        again = await make_collection(store, name="second")
        assert again.uid > second.uid
        assert stored(urls["east"], again) == set()
        assert stored(urls["east"], second)
        await store.sweep()
        assert stored(urls["east"], again) == set()
        with pytest.raises(KeyError):
            stored(urls["east"], second)
        await store.delete_collection("default", "second")
        with pytest.raises(NotFound):
            await store.attach(again)


async def test_what_was_never_made_to_the_end_goes_and_what_is_swept_meanwhile_is_not_made(
    urls: dict[str, str], make_collection: MakeCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(urls) as store:
        registry, create = store._registry, store._registry.create
        seen: list[Collection] = []

        async def swept(collection: Collection) -> None:
            seen.append(collection)
            assert stored(urls["east"], collection) == set()
            await store.sweep()
            await create(collection)

        async def crash(collection: Collection) -> None:
            seen.append(collection)
            raise Crash

        with monkeypatch.context() as patched:
            patched.setattr(registry, "create", swept)
            with pytest.raises(StorageUnavailable, match="took too long"):
                await make_collection(store, name="one")
            patched.setattr(registry, "create", crash)
            with pytest.raises(Crash):
                await make_collection(store, name="one")
        assert stored(urls["east"], seen[1]) == set()
        made = await make_collection(store, name="one")
        with pytest.raises(AlreadyExists):
            await make_collection(store, name="one")
        await fill(store, made, IDS)
        await store.sweep()
        for gone in seen:
            with pytest.raises(KeyError):
                stored(urls["east"], gone)
        assert await store.collections() == [made]
        with psycopg.connect(urls[HOME]) as connection:
            assert connection.execute("SELECT count(*) FROM ringfort.leftovers").fetchone() == (0,)
        assert (await store.positions(made)).keys() == {HOME, "east"}


async def test_a_partition_that_was_restored_is_another_log(
    urls: dict[str, str], make_database: Callable[..., str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        made = await make_collection(store)
        await fill(store, made, IDS)
        before, terms = await store.attach(made, "east"), store.claims["east"].term
    urls["east"] = make_database(copy_of=urls["east"])
    async with opened(urls) as store:
        log_id, position = await store.attach(made, "east")
        assert log_id != before[0]
        assert position == before[1]
        assert store.claims["east"].term == terms + 1
        assert (await store.attach(made))[0] == store.log_id


async def test_a_partition_without_the_collection_is_not_taken_for_an_empty_one(
    urls: dict[str, str], make_database: Callable[..., str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        made = await make_collection(store, name="old")
        await fill(store, made, IDS)
    async with opened({**urls, "east": make_database()}) as store:
        with pytest.raises(StorageUnavailable, match="holds nothing of the collection 'old'"):
            await store.attach(made, "east")


async def test_a_home_that_was_restored_makes_no_collection_of_anothers_documents(
    urls: dict[str, str], make_database: Callable[..., str], make_collection: MakeCollection
) -> None:
    async with opened(urls):
        pass
    backup = make_database(copy_of=urls[HOME])
    async with opened(urls) as store:
        lost = [await make_collection(store) for _ in range(3)]
        await fill(store, lost[0], IDS)
        await fill(store, lost[2], IDS)
    async with opened({**urls, HOME: backup}) as store:
        made = await make_collection(store)
        assert made.uid > lost[2].uid
        assert stored(urls["east"], lost[0]) != set()
        assert stored(urls["east"], made) == set()
        await store.sweep()
        assert stored(urls["east"], lost[2]) != set()
        assert await store.collections() == [made]


async def test_commits_to_every_database_tell_the_maps_epoch(
    urls: dict[str, str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        made = await make_collection(store)
        state = await store.shard_maps.get(made)
        assert isinstance(state, Steady)
        migrating = state.migrate(lambda shard_map: shard_map.add_shard(2))
        assert await store.shard_maps.put(made, migrating) == migrating
        assert await store.shard_maps.put(made, migrating) == migrating, "asked again"
        writes = upserts(IDS)
        for database, places in databases_of(made).cut(IDS).items():
            its = [writes[place] for place in places]
            done = await store.write(made, its, deadline=Deadline.after(10), database=database)
            assert done.epoch == migrating.epoch == 2


async def test_a_claim_that_was_taken_over_writes_to_no_partition(
    urls: dict[str, str], make_collection: MakeCollection
) -> None:
    async with opened(urls) as store:
        made = await make_collection(store)
        east = [IDS[place] for place in databases_of(made).cut(IDS)["east"]]
        with psycopg.connect(urls["east"], autocommit=True) as connection:
            # As whoever takes the claim does; our own is none the wiser.
            connection.execute("UPDATE ringfort.counters SET claim = gen_random_uuid()")
        done = await store.write(made, upserts(east), deadline=Deadline.after(20), database="east")
        assert done.upto == len(east)
        assert store.stats_of_each()["east"]["superseded_total"] >= 1
        assert store.stats()["superseded_total"] == 0
