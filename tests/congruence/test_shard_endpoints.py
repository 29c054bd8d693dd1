"""A replica answers the same whether it is in this process or on a node."""

import asyncio
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from memory_log import MemoryLog
from sides import SCHEMA, OpenShard

from protos.ringfort import v1 as pb
from services.deadline import Deadline
from services.gateway.endpoints import ShardEndpoint
from shard_router import filters
from shard_router.errors import DeadlineExceeded, DimensionMismatch, StaleEpoch, Unavailable
from shard_router.model import Attributes, Hit, Include, Version

EVERYTHING: Attributes = {
    "rank": -7,
    "name": "é",
    "share": 1.0,
    "free": True,
    "released": 1_700_000_000_000_001,
    "tags": ("x", "y"),
}
A, B, C = (np.array(v, np.float32) for v in ([1, 0, 0], [0, 1, 0], [0, 0, 1]))


def soon() -> Deadline:
    return Deadline.after(20)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def nearest(shard: ShardEndpoint, query: np.ndarray, k: int = 3, **options: object) -> list[Hit]:
    options.setdefault("filter", None)
    answer = await shard.search(query[None, :], k, deadline=soon(), **options)  # type: ignore[arg-type]
    assert answer.complete
    return answer.hits[0]


def told(hit: Hit) -> tuple[str, float, Version, Mapping[str, object], str | None, list[float] | None]:
    vector = None if hit.vector is None else hit.vector.tolist()
    return hit.id, hit.score, hit.version, dict(hit.attributes), hit.text, vector


async def test_a_hit_has_every_part_with_its_type(open_shard: OpenShard, log: MemoryLog) -> None:
    log.write({"a": A, "b": B}, attributes={"a": EVERYTHING})
    shard = await open_shard()
    assert shard.position == 2
    hit, _ = await nearest(shard, A, include=Include(vector=True))
    text = log.rows["a"][0].text
    assert told(hit) == ("a", 1.0, Version(1, 1), EVERYTHING, text, [1.0, 0.0, 0.0])
    assert [type(hit.attributes[name]) for name in EVERYTHING] == [type(v) for v in EVERYTHING.values()]
    bare, _ = await nearest(shard, A, include=Include(attributes=False, text=False))
    assert told(bare) == ("a", 1.0, Version(1, 1), {}, None, None)


async def test_rendered_hits_are_the_field_of_an_answer(open_shard: OpenShard, log: MemoryLog) -> None:
    log.write({"a": A, "b": B}, attributes={"a": EVERYTHING})
    shard = await open_shard()
    answer = await shard.search_rendered(np.stack([A, B, C]), 1, filter=None, deadline=soon())
    found = [pb.SearchResponse.FromString(hits.body()).hits for hits in answer.hits]
    assert [[hit.id for hit in hits] for hits in found] == [["a"], ["b"], ["a"]]
    assert [row.id for row in answer.hits[0].rows] == ["a"]
    assert answer.hits[0].rows[0].version == Version(1, 1)
    assert found[0][0].attributes["tags"].keywords.values == ["x", "y"]
    assert set(found[0][0].attributes) == set(SCHEMA)


async def test_many_callers_get_their_own_answers(open_shard: OpenShard, log: MemoryLog) -> None:
    rng = np.random.default_rng(3)
    vectors = {f"d{i}": v for i, v in enumerate(rng.standard_normal((200, 3)).astype(np.float32))}
    log.write(vectors)
    shard = await open_shard()
    answers = await asyncio.gather(
        *(
            shard.search(np.stack([v] * (1 + i % 3)), 1 + i % 2, filter=None, deadline=soon())
            for i, v in enumerate(vectors.values())
        )
    )
    for i, answer in enumerate(answers):
        assert [len(hits) for hits in answer.hits] == [1 + i % 2] * (1 + i % 3)
        assert {hits[0].id for hits in answer.hits} == {f"d{i}"}


async def test_what_was_excluded_or_does_not_pass_is_not_found(open_shard: OpenShard, log: MemoryLog) -> None:
    ranks: dict[str, Attributes] = {"a": {"rank": 1}, "b": {"rank": 2}, "c": {"rank": 3}}
    log.write({"a": A, "b": B, "c": C}, attributes=ranks)
    shard = await open_shard()
    filter = filters.check(filters.parse('rank >= 2 and not name = "x"'), SCHEMA)
    assert [hit.id for hit in await nearest(shard, A, filter=filter)] == ["b", "c"]
    assert [hit.id for hit in await nearest(shard, A, exclude=frozenset({"a", "b"}))] == ["c"]
    assert await shard.count(filter) == 2
    assert await shard.count(None) == 3
    assert sorted(await shard.matching(filter, 10)) == [("b", Version(1, 2)), ("c", Version(1, 3))]
    assert len(await shard.matching(None, 2)) == 2
    assert {id: v.tolist() for id, v in (await shard.vectors(["b", "z"])).items()} == {"b": [0, 1, 0]}
    assert await shard.vectors([]) == {}


async def test_what_was_committed_is_taken_or_read(open_shard: OpenShard, log: MemoryLog) -> None:
    shard = await open_shard()
    delta = log.write({"a": A}, attributes={"a": EVERYTHING})
    assert shard.offer(delta)
    assert await shard.wait_for(1, soon())
    assert [told(hit)[:4] for hit in await nearest(shard, A)] == [("a", 1.0, Version(1, 1), EVERYTHING)]
    log.write({"b": B})
    missed = log.write(deletes=("a",))
    if not shard.offer(missed):
        shard.wake()
    assert await shard.wait_for(3, soon())
    assert shard.position == 3
    assert [hit.id for hit in await nearest(shard, B)] == ["b"]
    assert not await shard.wait_for(4, Deadline.after(0.05))
    log.write({"c": C})
    shard.wake()
    assert await shard.wait_for(4, soon())


async def test_errors_are_of_the_same_class_and_name_the_same_field(
    open_shard: OpenShard, log: MemoryLog
) -> None:
    shard = await open_shard()
    with pytest.raises(DimensionMismatch) as mismatch:
        await shard.search(np.ones((1, 2), np.float32), 1, filter=None, deadline=soon())
    assert (mismatch.value.field, mismatch.value.got, mismatch.value.want) == ("query", 2, 3)
    with pytest.raises(DeadlineExceeded):
        await shard.search(np.ones((1, 3), np.float32), 1, filter=None, deadline=Deadline.after(-1))
    empty = await shard.search(np.ones((0, 3), np.float32), 1, filter=None, deadline=soon())
    assert empty.hits == []


async def test_it_tells_how_it_does(open_shard: OpenShard, log: MemoryLog) -> None:
    shard = await open_shard()
    assert shard.condition() == ("serving", "")
    log.write({f"d{i}": A for i in range(20)})
    shard.wake()
    await until(lambda: [(s.kind, s.rows, s.live) for s in shard.segments()] != [])
    await until(lambda: shard.describe()["documents"] == 20)
    assert shard.describe().keys() >= {"documents", "segments", "memtable_rows", "pending_rows", "position"}
    assert shard.stats()["documents"] == 20


async def test_a_log_that_was_exchanged_takes_it_down(open_shard: OpenShard, log: MemoryLog) -> None:
    log.write({"a": A})
    shard = await open_shard()
    log.log_id = "another"
    log.write({"b": B})
    shard.wake()
    async with asyncio.timeout(20):
        await shard.fell.wait()
    assert not await shard.wait_for(9, soon())
    with pytest.raises(Unavailable):
        await shard.search(A[None, :], 1, filter=None, deadline=soon())


async def test_closed_it_answers_nothing(open_shard: OpenShard, log: MemoryLog) -> None:
    shard = await open_shard()
    await shard.close()
    with pytest.raises(Unavailable):
        await shard.search(A[None, :], 1, filter=None, deadline=soon())
    log.write({"a": A})
    again = await open_shard()
    assert [hit.id for hit in await nearest(again, A)] == ["a"]


async def test_it_answers_for_the_slots_it_is_told(open_shard: OpenShard, log: MemoryLog) -> None:
    log.write({f"d{i}": A for i in range(64)})
    by_slot = {id: row.slot for id, (row, _) in log.rows.items()}
    shard = await open_shard()
    assert shard.followed() == frozenset(range(16))
    half = list(range(8))
    await shard.serve(2, half)
    mine = {id for id, slot in by_slot.items() if slot < 8}
    assert {hit.id for hit in await nearest(shard, A, 64, epoch=2)} == mine
    assert await shard.count(None, epoch=2) == len(mine)
    for ask in (
        lambda: nearest(shard, A, epoch=1),
        lambda: shard.count(None, epoch=1),
        lambda: shard.matching(None, 5, epoch=1),
        lambda: shard.vectors(["d1"], epoch=1),
    ):
        with pytest.raises(StaleEpoch) as stale:
            await ask()
        assert (stale.value.seen, stale.value.current) == (1, 2)
    await shard.release(list(range(8, 16)))
    assert shard.followed() == frozenset(half)
    with pytest.raises(ValueError, match="not whole"):
        await shard.serve(3, range(16))
    await shard.backfill(list(range(16)))
    await shard.serve(3, range(16))
    assert await shard.count(None, epoch=3) == 64
