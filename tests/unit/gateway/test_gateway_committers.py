"""A call's writes are cut by database, and what became of them is put together again."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from memory_log import collection

from services.deadline import Deadline
from services.gateway.catalog import Catalog, Served
from services.gateway.committer import QUEUE_ROWS, Committed
from services.gateway.committers import Committers, joined
from shard_router.databases import databases_of
from shard_router.errors import DeadlineExceeded, Overloaded, StorageUnavailable
from shard_router.model import HOME, Commit, Remove, Version, Write, WriteOutcome
from shard_router.shard_map import ShardMap, Steady

IDS = [f"d{i}" for i in range(40)]


class Databases:
    """Commits what it is given to one log a database; some are away, some hang."""

    def __init__(self) -> None:
        self.upto: dict[str, int] = {}
        self.ids: dict[str, list[str]] = {}
        self.away: set[str] = set()
        self.hanging: set[str] = set()

    async def write(
        self, collection: object, writes: Sequence[Write], *, deadline: Deadline, database: str
    ) -> Commit:
        if database in self.hanging:
            await asyncio.sleep(3600)
        if database in self.away:
            raise StorageUnavailable("no server", database)
        first = self.upto.get(database, 0)
        self.upto[database] = first + len(writes)
        self.ids.setdefault(database, []).extend(write.id for write in writes)
        outcomes = [WriteOutcome(Version(1, first + at + 1)) for at in range(len(writes))]
        return Commit(f"log-{database}", self.upto[database], outcomes, None)


class Empty:
    """A catalog of which nothing is asked but its store."""

    def __init__(self, store: Databases) -> None:
        self.store = store
        self.on_drop: list[Callable[[Served], Awaitable[None]]] = []


@pytest.fixture
def store() -> Databases:
    return Databases()


@pytest.fixture
def committers(store: Databases) -> Committers:
    return Committers(cast(Catalog, cast(Any, Empty(store))))


def served(*databases: str) -> Served:
    made = Served(replace(collection(), databases=databases), Steady(ShardMap.create(16, 1)))
    for name, log in made.logs.items():
        log.attach(f"log-{name}", 0)
    return made


def removes(ids: Sequence[str]) -> list[Remove]:
    return [Remove(id) for id in ids]


async def test_each_write_reaches_its_database_in_order(committers: Committers, store: Databases) -> None:
    both = served(HOME, "east")
    done = await committers.submit(both, removes(IDS)).committed(Deadline.after(10))
    cut = databases_of(both.collection).cut(IDS)
    assert len(cut) == 2
    assert store.ids == {name: [IDS[place] for place in places] for name, places in cut.items()}
    for places in cut.values():
        versions = [done.outcomes[place].version for place in places]
        assert versions == [Version(1, at + 1) for at in range(len(places))]
    assert done.positions == {f"log-{name}": len(places) for name, places in cut.items()}
    assert both.positions == done.positions
    await committers.close()


async def test_a_database_that_is_away_fails_its_own_writes_each_with_an_error_of_its_own(
    committers: Committers, store: Databases
) -> None:
    store.away.add("east")
    both = served(HOME, "east")
    done = await committers.submit(both, removes(IDS)).committed(Deadline.after(10))
    east = databases_of(both.collection).cut(IDS)["east"]
    for place, outcome in enumerate(done.outcomes):
        assert (outcome.version is None) == (place in east)
        if outcome.error is not None:
            outcome.error.within(f"documents[{place}]")
    told = [done.outcomes[place].error for place in east]
    assert all(isinstance(error, StorageUnavailable) and error.database == "east" for error in told)
    assert [error.field for error in told if error] == [f"documents[{place}]" for place in east]
    assert list(done.positions) == ["log-home"]
    await committers.close()


async def test_a_database_that_hangs_is_not_waited_for_beyond_the_deadline(
    committers: Committers, store: Databases
) -> None:
    store.hanging.add("east")
    both = served(HOME, "east")
    done = await committers.submit(both, removes(IDS)).committed(Deadline.after(0.1))
    east = set(databases_of(both.collection).cut(IDS)["east"])
    late = {i for i, outcome in enumerate(done.outcomes) if isinstance(outcome.error, DeadlineExceeded)}
    assert late == east
    (hanging,) = [each for each in committers._of[both].values() if each._task is not None]
    assert hanging._task is not None
    hanging._task.cancel()
    await committers.close()


async def test_a_full_queue_refuses_its_own_writes(committers: Committers, store: Databases) -> None:
    store.hanging.add("east")
    both = served(HOME, "east")
    east = [
        id
        for id in (f"e{i}" for i in range(4 * QUEUE_ROWS))
        if databases_of(both.collection).cut([id]).get("east")
    ]
    full = committers.submit(both, removes(east[:QUEUE_ROWS]))
    await asyncio.sleep(0)
    queued = committers.submit(both, removes(east[:1_000]))
    done = await committers.submit(both, removes(IDS)).committed(Deadline.after(0.2))
    places = databases_of(both.collection).cut(IDS)
    assert all(done.outcomes[place].version is not None for place in places[HOME])
    assert full.writes == QUEUE_ROWS
    assert queued.writes == 1_000
    refused = await queued.committed(Deadline.after(0.2))
    assert all(isinstance(outcome.error, Overloaded) for outcome in refused.outcomes)
    for each in committers._of[both].values():
        if each._task is not None:
            each._waiting.clear()
            each._task.cancel()
    await committers.close()


async def test_where_there_is_one_database_its_errors_are_the_calls(
    committers: Committers, store: Databases
) -> None:
    store.away.add(HOME)
    with pytest.raises(StorageUnavailable):
        await committers.submit(served(HOME), removes(IDS)).committed(Deadline.after(10))
    assert (await committers.submit(served(HOME), []).committed(Deadline.after(10))).positions == {}
    await committers.close()


def test_outcomes_come_together_in_the_order_of_the_call() -> None:
    versions = [WriteOutcome(Version(1, seq)) for seq in (7, 8)]
    made = joined(4, [(1, 3), (0, 2)], [Committed(versions, {"a": 8}), Committed(versions, {"b": 8})])
    assert [outcome.version.seq for outcome in made.outcomes if outcome.version] == [7, 7, 8, 8]
    assert made.positions == {"a": 8, "b": 8}
    with pytest.raises(KeyError):
        joined(1, [(0,)], [KeyError("a fault, and no answer")])
