"""Who owns which slot, as it is stored: a compare-and-set between two writes; and the jobs that change it."""

import asyncio
from uuid import uuid4

import numpy as np
import psycopg
import pytest

from services.deadline import Deadline
from services.metadata.jobs import JobState
from services.metadata.store import Store
from shard_router.errors import NotFound, PreconditionFailed, StorageUnavailable
from shard_router.model import Collection, Upsert
from shard_router.shard_map import Migrating, ShardMap, Steady


def added(state: Steady) -> Migrating:
    return state.migrate(lambda shard_map: shard_map.add_shard(max(shard_map.shards) + 1))


async def epoch_of_a_write(store: Store, collection: Collection) -> int:
    write = Upsert("a", None, {}, np.ones(collection.dim, np.float32))
    return (await store.write(collection, [write], deadline=Deadline.after(20))).epoch


async def test_a_change_is_stored_step_by_step_and_commits_tell_of_it(
    store: Store, collection: Collection
) -> None:
    maps = store.shard_maps
    first = await maps.get(collection)
    assert first == Steady(ShardMap.create(collection.slots, collection.shards))
    assert await epoch_of_a_write(store, collection) == 1
    target = added(first)
    steps = (target, target.cut_over(), target.cut_over().settle())
    for state in steps:
        assert await maps.put(collection, state) == state
        assert await maps.get(collection) == state
        # Whoever never heard that it was stored, and asks again, is told the same.
        assert await maps.put(collection, state) == state
        assert await epoch_of_a_write(store, collection) == state.epoch
    back = added(steps[-1])
    for state in (back, back.cancel()):
        assert await maps.put(collection, state) == state
    assert (await maps.get(collection)).answering.owners == steps[-1].answering.owners


async def test_of_two_who_change_a_map_one_is_told_what_the_other_did(
    store: Store, collection: Collection
) -> None:
    first = await store.shard_maps.get(collection)
    assert isinstance(first, Steady)
    grown, shrunk = added(first), first.migrate(lambda shard_map: shard_map.drain_shard(0))
    told = await asyncio.gather(*(store.shard_maps.put(collection, state) for state in (grown, shrunk)))
    assert told[0] == told[1] == await store.shard_maps.get(collection)
    assert told[0] in (grown, shrunk)
    assert await store.shard_maps.put(collection, added(first).cut_over().settle()) == told[0]


async def test_only_who_holds_the_claim_changes_a_map(
    store: Store, collection: Collection, database_url: str
) -> None:
    first = await store.shard_maps.get(collection)
    assert isinstance(first, Steady)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        await other.execute("UPDATE ringfort.counters SET claim = gen_random_uuid()")
    with pytest.raises(StorageUnavailable, match="claim"):
        await store.shard_maps.put(collection, added(first))
    assert await store.shard_maps.get(collection) == first


async def test_one_job_of_a_collection_runs_and_its_end_is_told_once(
    store: Store, collection: Collection
) -> None:
    job = await store.jobs.begin(collection, "add-shard", 2)
    assert (job.state, job.kind, job.argument, job.ended_at_us) == (JobState.RUNNING, "add-shard", 2, None)
    with pytest.raises(PreconditionFailed, match="another job"):
        await store.jobs.begin(collection, "drain-shard", 0)
    assert job in await store.jobs.running()
    ended = await store.jobs.end(job.id, JobState.FAILED, "no room")
    assert ended is not None
    assert (ended.state, ended.message) == (JobState.FAILED, "no room")
    assert (ended.ended_at_us or 0) >= ended.started_at_us
    assert await store.jobs.end(job.id, JobState.SUCCEEDED, "") is None
    assert await store.jobs.end(str(uuid4()), JobState.SUCCEEDED, "") is None
    again = await store.jobs.begin(collection, "set-replicas", 3)
    assert await store.jobs.all([collection.uid]) == [again, ended]


async def test_a_collection_that_is_gone_has_neither_map_nor_jobs(
    store: Store, collection: Collection
) -> None:
    state = await store.shard_maps.get(collection)
    assert isinstance(state, Steady)
    await store.shard_maps.put(collection, added(state))
    await store.jobs.begin(collection, "add-shard", 2)
    await store.delete_collection(collection.tenant, collection.name)
    with pytest.raises(NotFound):
        await store.shard_maps.get(collection)
    with pytest.raises(NotFound):
        await store.shard_maps.put(collection, added(state))
    with pytest.raises(NotFound):
        await store.jobs.begin(collection, "add-shard", 2)
    assert await store.jobs.all([collection.uid]) == []


async def test_a_page_of_some_slots_reaches_as_far_as_one_of_all(
    store: Store, collection: Collection
) -> None:
    writes = [Upsert(f"d{i}", None, {}, np.full(collection.dim, i, np.float32)) for i in range(50)]
    await store.write(collection, writes, deadline=Deadline.after(20))
    whole = await store.tail(collection, 0)
    tail, slots = store.follow(collection), {row.slot for row in whole.rows[::3]}
    part = await tail(0, sorted(slots))
    assert (part.after, part.upto) == (whole.after, whole.upto)
    assert list(part.rows) == [row for row in whole.rows if row.slot in slots]
    kept = [i for i, row in enumerate(whole.rows) if row.slot in slots]
    np.testing.assert_array_equal(part.vectors, whole.vectors[kept])
    assert (await tail(0, [])).upto == whole.upto
    assert not (await tail(0, [])).rows
