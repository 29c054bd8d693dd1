"""A generation's vectors come beside the live one's, and which of them writes bring is one row."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest

from services.deadline import Deadline
from services.metadata import log
from services.metadata.database import Connection
from services.metadata.generations import GenerationState
from services.metadata.ownership import Claim
from services.metadata.store import Store
from shard_router.errors import GenerationChanged, PreconditionFailed, StorageUnavailable
from shard_router.model import HOME, Collection, Commit, LogDelta, Patch, Remove, Upsert, Write

MakeCollection = Callable[..., Awaitable[Collection]]
DIM, OTHER_DIM = 8, 4


def upsert(id: str, fill: float, *, dim: int = DIM, text: str = "some text") -> Upsert:
    return Upsert(id, text, {}, np.full(dim, fill, np.float32))


async def write(store: Store, collection: Collection, *writes: Write) -> Commit:
    return await store.write(collection, writes, deadline=Deadline.after(10))


async def begun(store: Store, live: Collection) -> Collection:
    return await store.generations.begin(replace(live, dim=OTHER_DIM, space="other", model="m@2"))


async def put_page(store: Store, made: Collection, live: Collection, fill: float, limit: int = 100) -> int:
    page = await store.generations.unembedded(made, live, HOME, limit, with_vectors=False)
    await store.generations.put(made, HOME, page, np.full((len(page.ids), made.dim), fill, np.float32))
    return page.upto


async def tail(store: Store, collection: Collection) -> LogDelta:
    return await store.follow(collection)(0)


def fills(delta: LogDelta) -> dict[str, float]:
    return {row.id: float(v[0]) for row, v in zip(delta.rows, delta.vectors, strict=True) if not row.deleted}


async def test_who_follows_another_generation_gets_as_far_as_its_vectors(
    store: Store, collection: Collection
) -> None:
    await write(store, collection, *(upsert(id, 1.0) for id in "abcde"))
    made = await begun(store, collection)
    assert (made.generation, (await tail(store, made)).upto) == (2, 0)
    assert await put_page(store, made, collection, 7.0, limit=3) == 3
    delta = await tail(store, made)
    assert (delta.upto, fills(delta), delta.vectors.shape) == (
        3,
        {"a": 7.0, "b": 7.0, "c": 7.0},
        (3, OTHER_DIM),
    )
    await write(store, collection, upsert("a", 2.0), Remove("b"), Patch("d", {"rank": 1}))
    # What has moved on is not where it was, and not yet where it is.
    delta = await tail(store, made)
    assert (delta.upto, fills(delta)) == (3, {"c": 7.0})
    assert await put_page(store, made, collection, 8.0) == 8
    delta = await tail(store, made)
    assert (delta.upto, fills(delta)) == (8, {"c": 7.0, "a": 8.0, "d": 8.0, "e": 8.0})
    assert [row.id for row in delta.rows if row.deleted] == ["b"]
    assert fills(await tail(store, collection)) == {"c": 1.0, "e": 1.0, "a": 2.0, "d": 1.0}


async def test_a_page_is_put_once_and_never_over_a_later_vector(store: Store, collection: Collection) -> None:
    await write(store, collection, upsert("a", 1.0), upsert("b", 1.0))
    made = await begun(store, collection)
    generations = store.generations
    page = await generations.unembedded(made, collection, HOME, 100, with_vectors=True)
    assert (page.after, page.upto, page.end, page.ids, page.texts) == (0, 2, 2, ["a", "b"], ["some text"] * 2)
    assert page.vectors is not None
    np.testing.assert_array_equal(page.vectors, np.ones((2, DIM)))
    vectors = np.full((2, OTHER_DIM), 5.0, np.float32)
    await generations.put(made, HOME, page, vectors)
    with pytest.raises(StorageUnavailable, match="no longer"):
        await generations.put(made, HOME, page, vectors)
    nothing = await generations.unembedded(made, collection, HOME, 100, with_vectors=True)
    assert (nothing.after, nothing.upto, nothing.ids) == (2, 2, [])


async def test_writes_are_closed_and_opened_for_another_generation(
    store: Store, collection: Collection
) -> None:
    generations = store.generations
    await write(store, collection, upsert("a", 1.0), upsert("b", 1.0))
    made = await begun(store, collection)
    await put_page(store, made, collection, 5.0)
    with pytest.raises(PreconditionFailed, match="not complete"):
        await generations.activate(made, GenerationState.PREVIOUS)
    await generations.set_state(made, GenerationState.READY)
    assert await generations.close_writes(collection) == {HOME: 2}
    assert await generations.close_writes(collection) == {HOME: 2}
    for refused in (upsert("c", 1.0), Patch("a", {"rank": 1}), Remove("a")):
        commit = await write(store, collection, refused)
        assert isinstance(commit.outcomes[0].error, GenerationChanged)
        assert (commit.upto, commit.delta) == (0, None)
    assert (await tail(store, collection)).upto == 2
    await generations.activate(made, GenerationState.PREVIOUS)
    await generations.activate(made, GenerationState.PREVIOUS)
    [told] = [each for each in await store.collections() if each.uid == collection.uid]
    assert (told.generation, told.dim, told.space, told.model) == (2, OTHER_DIM, "other", "m@2")
    states = {each.collection.generation: each.state for each in await generations.all(told)}
    assert states == {1: GenerationState.PREVIOUS, 2: GenerationState.LIVE}
    await generations.open_writes(made)
    assert (await write(store, made, upsert("c", 6.0, dim=OTHER_DIM), Patch("a", {"rank": 1}))).upto == 4
    assert isinstance((await write(store, collection, upsert("d", 1.0))).outcomes[0].error, GenerationChanged)
    assert fills(await tail(store, made)) == {"b": 5.0, "c": 6.0, "a": 5.0}
    # The one that was live follows in the same way.
    assert ((await tail(store, collection)).upto, await store.attach(collection)) == (2, (store.log_id, 2))
    assert (await store.attach(made), await store.position(collection)) == ((store.log_id, 4), 4)
    with pytest.raises(GenerationChanged):
        await store.get(collection, ["c"], with_vectors=True)
    with pytest.raises(GenerationChanged):
        await store.scan(collection, None, 10, with_vectors=True)
    await put_page(store, collection, made, 1.5)
    assert fills(await tail(store, collection)) == {"b": 1.0, "c": 1.5, "a": 1.5}


async def test_one_generation_at_most_is_beside_the_live_one(
    store: Store, make_collection: MakeCollection
) -> None:
    collection = await make_collection(store)
    await write(store, collection, upsert("a", 1.0), Upsert("bare", None, {}, np.ones(DIM, np.float32)))
    assert await store.generations.textless(collection) == 1
    made = await begun(store, collection)
    with pytest.raises(PreconditionFailed, match="another generation"):
        await begun(store, collection)
    assert [each.collection for each in await store.generations.beside([collection])] == [made]
    await store.generations.drop(made)
    assert await store.generations.beside([collection]) == []
    with pytest.raises(StorageUnavailable, match="holds no generation"):
        await put_page(store, made, collection, 1.0)
    assert (await begun(store, collection)).generation == 3
    await store.delete_collection(collection.tenant, collection.name)
    assert await store.generations.beside([collection]) == []


async def test_a_write_that_met_closed_doors_knows_that_its_claim_is_held(
    store: Store, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(store, collection, upsert("a", 1.0))
    await store.generations.close_writes(collection)
    refusal = log._refusal

    async def opened_meanwhile(connection: Connection, collection: Collection, claim: Claim) -> Exception:
        await store.generations.open_writes(collection)
        return await refusal(connection, collection, claim)

    monkeypatch.setattr(log, "_refusal", opened_meanwhile)
    commit = await write(store, collection, upsert("b", 1.0))
    assert isinstance(commit.outcomes[0].error, GenerationChanged)
    assert store.stats()["superseded_total"] == 0
    assert (await write(store, collection, upsert("b", 1.0))).upto == 2
