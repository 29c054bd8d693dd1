import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_log import MemoryLog

from protos.ringfort import v1 as pb
from services import wire
from services.deadline import Deadline
from services.shard.replica import Replica
from services.shard.state import REWRITE_TRIES
from shard_router import filters
from shard_router.errors import (
    DeadlineExceeded,
    DimensionMismatch,
    Overloaded,
    StorageUnavailable,
    Unavailable,
)
from shard_router.model import AttributeType, Hit, Include, LogDelta, Metric

SCHEMA = {"rank": AttributeType.INT, "name": AttributeType.KEYWORD}
RNG = np.random.default_rng(8)
Open = Callable[..., Awaitable[Replica]]


def soon() -> Deadline:
    return Deadline.after(10)


def vectors(*ids: str) -> dict[str, np.ndarray]:
    return {id: RNG.standard_normal(3).astype(np.float32) for id in ids}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def nearest(replica: Replica, query: list[float], k: int = 3, **options: Any) -> list[Hit]:
    options.setdefault("filter", None)
    answer = await replica.search(np.array([query], np.float32), k, deadline=soon(), **options)
    return answer.hits[0]


async def sealed(replica: Replica) -> None:
    await until(lambda: replica.stats()["frozen_memtables"] == 0)


async def test_what_the_log_holds_is_found_with_all_its_parts(open_replica: Open, log: MemoryLog) -> None:
    log.write({"a": np.array([3.0, 4.0, 0.0]), "b": np.array([0.0, 0.0, 1.0])}, attributes={"a": {"rank": 7}})
    replica = await open_replica()
    assert replica.position == 2
    hit, other = await nearest(replica, [1, 0, 0], include=Include(vector=True))
    row, _ = log.rows["a"]
    assert (hit.id, hit.version, hit.attributes, hit.text) == ("a", row.version, {"rank": 7}, row.text)
    assert hit.score == pytest.approx(0.6)
    assert hit.vector is not None
    assert hit.vector.tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert (other.id, other.score) == ("b", 0.0)
    bare = await nearest(replica, [1, 0, 0], include=Include(attributes=False, text=False))
    assert (bare[0].attributes, bare[0].text, bare[0].vector) == ({}, None, None)


@pytest.mark.parametrize(
    ("metric", "score"), [(Metric.COSINE, 0.6), (Metric.INNER_PRODUCT, 6.0), (Metric.L2, -17.0)]
)
async def test_a_larger_score_is_better_under_every_metric(
    open_replica: Open, log: MemoryLog, metric: Metric, score: float
) -> None:
    log.write({"a": np.array([3.0, 4.0, 0.0]), "worse": np.array([-9.0, 9.0, 0.0])})
    replica = await open_replica(metric=metric)
    hits = await nearest(replica, [2, 0, 0])
    assert [hit.id for hit in hits] == ["a", "worse"]
    assert hits[0].score == pytest.approx(score)


async def test_a_push_that_fits_is_searchable_at_once_and_one_that_does_not_is_read(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica(poll_ms=60_000)
    first, second, third = (log.write(vectors(id)) for id in "abc")
    assert replica.offer(first)
    assert replica.position == 1
    assert not replica.offer(third)
    assert await replica.wait_for(3, soon())
    assert replica.offer(second), "what is applied already is no reason to read the log"
    assert {hit.id for hit in await nearest(replica, [1, 1, 1])} == {"a", "b", "c"}
    assert not replica.offer(LogDelta("other", 3, 4, [], np.zeros((0, 3), np.float32)))
    replica.validate_state()


async def test_superseded_and_deleted_documents_are_gone_at_once(open_replica: Open, log: MemoryLog) -> None:
    replica = await open_replica()
    ids = [f"d{i}" for i in range(20)]
    for id in ids:
        assert replica.offer(log.write(vectors(id)))
    await sealed(replica)
    assert replica.describe()["segments"] == 2
    east = np.array([1.0, 0.0, 0.0])
    assert replica.offer(log.write({"d0": east, "d19": east}, deletes=("d1", "d18")))
    hits = await nearest(replica, [1, 0, 0], k=30)
    assert [hit.id for hit in hits[:2]] == ["d0", "d19"]
    assert {hit.id for hit in hits} == set(ids) - {"d1", "d18"}
    assert [hit.version for hit in hits] == [log.rows[hit.id][0].version for hit in hits]
    replica.validate_state()


async def test_a_restart_recovers_from_segments_and_reads_only_the_rest_of_the_log(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica()
    for i in range(21):
        replica.offer(log.write(vectors(f"d{i}")))
    replica.offer(log.write(deletes=("d3",)))
    await sealed(replica)
    before = await nearest(replica, [1, 2, 3], k=30)
    await replica.close()
    log.write({"new": np.array([1.0, 2.0, 3.0])}, deletes=("d5",))
    log.reads.clear()
    again = await open_replica()
    assert log.reads == [16]
    hits = await nearest(again, [1, 2, 3], k=30)
    assert [hit.id for hit in hits] == ["new", *(hit.id for hit in before if hit.id != "d5")]
    assert [hit.score for hit in hits[1:]] == [hit.score for hit in before if hit.id != "d5"]
    again.validate_state()


async def test_a_crash_at_any_file_leaves_what_it_takes_to_recover(
    open_replica: Open, log: MemoryLog, tmp_path: Path
) -> None:
    replica = await open_replica()
    for i in range(30):
        replica.offer(log.write(vectors(f"d{i}")))
    await sealed(replica)
    before = await nearest(replica, [1, 2, 3], k=40)
    await replica.close()
    directory = tmp_path / "shard-0"
    (directory / ".manifest-0000000000000099.part").write_bytes(b"half")
    (directory / ".segment-0000000000000099.part").mkdir()
    (directory / "segment-0000000000000098").mkdir()
    (directory / "manifest-0000000000000097").write_bytes(b"torn")
    again = await open_replica()
    assert await nearest(again, [1, 2, 3], k=40) == before
    left = {path.name.partition("-")[0] for path in directory.iterdir()}
    assert left == {"manifest", "segment"}
    assert not (directory / "segment-0000000000000098").exists()


@pytest.mark.parametrize("change", [{"log_id": "log-2"}, {"space": "another"}])
async def test_files_of_another_log_or_space_are_not_used(
    open_replica: Open, log: MemoryLog, change: dict[str, str]
) -> None:
    replica = await open_replica()
    for i in range(9):
        replica.offer(log.write(vectors(f"d{i}")))
    await sealed(replica)
    await replica.close()
    log.log_id = change.get("log_id", log.log_id)
    log.rows = {id: pair for id, pair in log.rows.items() if id == "d8"}
    log.reads.clear()
    again = await open_replica(**change)
    assert log.reads[0] == 0
    assert [hit.id for hit in await nearest(again, [1, 1, 1], k=20)] == ["d8"]


async def test_many_small_segments_become_few_and_the_answers_stay(
    open_replica: Open, log: MemoryLog, tmp_path: Path
) -> None:
    replica = await open_replica()
    for i in range(100):
        replica.offer(log.write(vectors(f"d{i}")))
        await sealed(replica)
    replica.offer(log.write(deletes=("d7", "d99")))
    await until(lambda: replica.stats()["rewrites_total"] >= 1)
    assert replica.describe()["segments"] < 8
    hits = await nearest(replica, [1, 0, 0], k=200)
    assert {hit.id for hit in hits} == set(log.live)
    replica.validate_state()
    await until(lambda: len(list(tmp_path.glob("shard-0/segment-*"))) == replica.describe()["segments"])
    await replica.close()
    again = await open_replica()
    assert await nearest(again, [1, 0, 0], k=200) == hits


async def test_a_segment_that_is_mostly_dead_is_rewritten_and_one_wholly_dead_dropped(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica()
    ids = [f"d{i}" for i in range(17)]
    for id in ids:
        replica.offer(log.write(vectors(id)))
    await sealed(replica)
    replica.offer(log.write(deletes=(*ids[:8], *ids[8:13])))
    await until(lambda: replica.stats()["rewrites_total"] >= 1)
    assert replica.describe()["segments"] == 1
    assert {hit.id for hit in await nearest(replica, [1, 0, 0], k=20)} == set(ids[13:])
    replica.validate_state()


async def test_a_full_disk_costs_no_answers_and_the_seal_is_tried_again(
    open_replica: Open, log: MemoryLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await open_replica()
    monkeypatch.setattr("services.shard.state.RETRY_FIRST_S", 0.01)
    full = OSError(28, "No space left on device")

    def refuse(*_: object) -> None:
        raise full

    with monkeypatch.context() as disk:
        disk.setattr("index_builder.segments.files.os.fsync", refuse)
        for i in range(20):
            assert replica.offer(log.write(vectors(f"d{i}")))
        await until(lambda: replica.stats()["file_failures_total"] >= 2)
        assert len(await nearest(replica, [1, 0, 0], k=30)) == 20
        assert replica.describe()["segments"] == 0
        assert replica.describe()["pending_rows"] == 16
        assert replica.condition()[0] == "disk_full"
        assert replica.stats()["disk_full"] == 1
    await until(lambda: replica.describe()["segments"] == 2)
    assert replica.condition() == ("serving", "")
    assert replica.stats()["disk_full"] == replica.describe()["pending_rows"] == 0
    assert "No space left" in caplog.text
    assert len(await nearest(replica, [1, 0, 0], k=30)) == 20
    replica.validate_state()


async def test_memory_is_bounded_while_files_cannot_be_written(
    open_replica: Open, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = await open_replica()
    monkeypatch.setattr("services.shard.state.RETRY_FIRST_S", 0.01)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("index_builder.segments.files.os.fsync", refuse)
        taken = [replica.offer(log.write(vectors(f"d{i}"))) for i in range(120)]
        assert 64 <= sum(taken) <= 80
        assert not await replica.wait_for(log.counter, Deadline.after(0.05))
    assert await replica.wait_for(log.counter, soon())
    assert replica.describe()["documents"] == 120


async def test_what_cannot_be_merged_is_searched_as_it_is_and_tried_again_at_the_next_start(
    open_replica: Open, log: MemoryLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.shard.state.RETRY_FIRST_S", 0.001)
    replica = await open_replica(child_rows=1)

    async def killed(*_: object) -> None:
        raise OSError("the merge ended with -9: ")

    with monkeypatch.context() as memory:
        memory.setattr("services.shard.file_work.merge_in_child", killed)
        for i in range(65):
            replica.offer(log.write(vectors(f"d{i}")))
        await until(lambda: replica.condition()[0] == "unmerged")
        assert replica.stats()["left_segments"] == 8
        assert replica.stats()["file_failures_total"] == REWRITE_TRIES
        assert replica.describe()["pending_rows"] == 0
        assert "8 segments could not be rewritten" in replica.condition()[1]
        assert {hit.id for hit in await nearest(replica, [1, 0, 0], k=100)} == set(log.live)
    await replica.close()
    assert "the merge ended with -9" in caplog.text
    again = await open_replica()
    await until(lambda: again.stats()["rewrites_total"] == 1)
    assert again.condition() == ("serving", "")
    assert {hit.id for hit in await nearest(again, [1, 0, 0], k=100)} == set(log.live)


async def test_a_quiet_memtable_is_sealed_before_it_is_full(
    open_replica: Open, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.shard.state.QUIET_ROWS", 3)
    monkeypatch.setattr("services.shard.state.QUIET_S", 0.01)
    replica = await open_replica()
    replica.offer(log.write(vectors("a", "b", "c")))
    await until(lambda: replica.describe()["segments"] == 1)
    assert replica.describe()["memtable_rows"] == 0
    assert len(await nearest(replica, [1, 0, 0])) == 3


async def test_an_answer_never_claims_a_position_whose_documents_moved_on_unseen(
    open_replica: Open, log: MemoryLog
) -> None:
    log.page_rows = 4
    replica = await open_replica(poll_ms=60_000)
    log.write(vectors(*(f"d{i}" for i in range(6))))
    log.write({"d0": np.array([1.0, 0.0, 0.0])})  # position 1 is superseded by 7, on the second page
    original, seen = log.tail, []

    async def watch(after: int) -> LogDelta:
        seen.append((after, replica.position))
        return await original(after)

    log.tail = watch
    replica.wake()
    assert await replica.wait_for(7, soon())
    assert seen == [(0, 0), (5, 0)], "after the first page nothing was certain yet"


async def test_a_page_read_before_a_push_does_not_undo_it(open_replica: Open, log: MemoryLog) -> None:
    replica = await open_replica(poll_ms=60_000)
    original, read, go_on = log.tail, asyncio.Event(), asyncio.Event()

    async def slow(after: int) -> LogDelta:
        delta = await original(after)
        read.set()
        await go_on.wait()
        return delta

    log.tail = slow
    born = log.write(vectors("a", "b"))
    replica.wake()
    await read.wait()
    assert replica.offer(born)
    assert replica.offer(log.write(deletes=("a",)))
    go_on.set()
    assert replica.offer(log.write(vectors("c")))
    await until(lambda: replica.stats()["tail_reads_total"] == 2)
    assert {hit.id for hit in await nearest(replica, [1, 0, 0])} == {"b", "c"}
    assert replica.position == 4
    replica.validate_state()


async def test_large_merges_run_in_a_child_and_closing_ends_it(open_replica: Open, log: MemoryLog) -> None:
    replica = await open_replica(child_rows=1)
    for i in range(65):
        replica.offer(log.write(vectors(f"d{i}")))
    await until(lambda: replica.stats()["rewrites_total"] == 1)
    assert replica.describe()["segments"] == 1
    assert {hit.id for hit in await nearest(replica, [1, 0, 0], k=100)} == set(log.live)
    replica.offer(log.write(deletes=tuple(f"d{i}" for i in range(60))))
    await until(lambda: replica.stats()["merging"] == 1)
    await replica.close()
    again = await open_replica()
    assert {hit.id for hit in await nearest(again, [1, 0, 0], k=100)} == set(log.live)
    again.validate_state()


async def test_outages_of_the_log_are_sat_out(open_replica: Open, log: MemoryLog) -> None:
    replica = await open_replica()
    log.failures = [StorageUnavailable("restarting"), StorageUnavailable("restarting")]
    log.write(vectors("a"))
    assert await replica.wait_for(1, soon())
    assert not log.failures


async def test_opening_fails_where_the_log_cannot_be_read(open_replica: Open, log: MemoryLog) -> None:
    log.failures = [StorageUnavailable("away")]
    with pytest.raises(StorageUnavailable):
        await open_replica()


async def test_opening_fails_where_the_log_is_another_than_named(open_replica: Open) -> None:
    with pytest.raises(Unavailable, match="it was another"):
        await open_replica(log_id="another")


async def test_a_replica_whose_log_was_exchanged_stops_answering(open_replica: Open, log: MemoryLog) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    waiting = asyncio.create_task(replica.wait_for(5, soon()))
    await asyncio.sleep(0)
    log.log_id = "restored"
    assert not await waiting
    with pytest.raises(Unavailable, match="restored"):
        await nearest(replica, [1, 0, 0])
    assert replica.fell.is_set()
    assert replica.condition()[0] == "down"
    assert not replica.offer(log.write(vectors("b")))


async def test_waiting_for_a_position_ends_at_the_deadline(open_replica: Open, log: MemoryLog) -> None:
    replica = await open_replica()
    assert await replica.wait_for(0, Deadline.after(-1))
    assert not await replica.wait_for(1, Deadline.after(-1))
    assert not await replica.wait_for(1, Deadline.after(0.01))


@pytest.mark.parametrize("rows", [5, 40])
async def test_filters_select_in_memtables_and_segments_alike(
    open_replica: Open, log: MemoryLog, rows: int
) -> None:
    replica = await open_replica()
    for i in range(rows):
        replica.offer(log.write(vectors(f"d{i}"), attributes={f"d{i}": {"rank": i, "name": f"n{i % 2}"}}))
    await sealed(replica)
    wanted = filters.parse('rank < 20 and name = "n1"')
    expected = {f"d{i}" for i in range(min(rows, 20)) if i % 2}
    for _ in range(2):
        assert {hit.id for hit in await nearest(replica, [1, 0, 0], k=50, filter=wanted)} == expected
    assert await replica.count(wanted) == len(expected)
    assert await replica.count(None) == rows
    matching = await replica.matching(wanted, 100)
    assert {id for id, _ in matching} == expected
    assert all(version == log.rows[id][0].version for id, version in matching)
    assert len(await replica.matching(None, 3)) == 3
    assert await nearest(replica, [1, 0, 0], filter=filters.parse("rank = 1000")) == []


async def test_equal_scores_are_in_order_of_id_and_exclusions_are_made_up_for(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica()
    east = np.array([1.0, 0.0, 0.0])
    for id in ("e", "c", "a", "d", "b", "f", "h", "g", "i", "j"):
        replica.offer(log.write({id: east}))
    await sealed(replica)
    assert [hit.id for hit in await nearest(replica, [2, 0, 0], k=4)] == ["a", "b", "c", "d"]
    hits = await nearest(replica, [2, 0, 0], k=4, exclude=frozenset({"a", "c", "nobody"}))
    assert [hit.id for hit in hits] == ["b", "d", "e", "f"]


async def test_vectors_are_those_searched_with(open_replica: Open, log: MemoryLog) -> None:
    replica = await open_replica()
    replica.offer(log.write({"a": np.array([0.0, 5.0, 0.0]), **vectors(*"bcdefghij")}))
    await sealed(replica)
    found = await replica.vectors(["a", "j", "nobody"])
    assert sorted(found) == ["a", "j"]
    assert found["a"].tolist() == [0, 1, 0]


async def test_a_wrong_dimension_and_a_passed_deadline_are_refused(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica()
    with pytest.raises(DimensionMismatch):
        await replica.search(np.zeros((1, 4), np.float32), 1, filter=None, deadline=soon())
    with pytest.raises(DeadlineExceeded):
        await replica.search(np.zeros((1, 3), np.float32), 1, filter=None, deadline=Deadline.after(-1))
    empty = await replica.search(np.zeros((0, 3), np.float32), 1, filter=None, deadline=soon())
    assert empty.hits == []
    assert await nearest(replica, [1, 0, 0]) == []


async def test_many_callers_share_scans_and_each_gets_its_own_answer(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(vectors(*(f"d{i}" for i in range(300))))
    replica = await open_replica(memtable_rows=100)
    await sealed(replica)
    queries = RNG.standard_normal((200, 3)).astype(np.float32)
    alone = [await nearest(replica, query.tolist(), k=5) for query in queries]
    before = replica.stats()["batches_total"]
    busy = [threads.submit(time.sleep, 0.05) for _ in range(2)]
    together = await asyncio.gather(*(nearest(replica, query.tolist(), k=5) for query in queries))
    assert all(job.done() for job in busy)
    assert together == alone
    assert replica.stats()["batches_total"] - before < 30
    whole = await replica.search(queries, 5, filter=None, deadline=soon())
    assert whole.hits == alone


async def test_searches_of_many_kinds_at_once_get_their_own_answers(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(
        vectors(*(f"d{i}" for i in range(200))), attributes={f"d{i}": {"rank": i % 10} for i in range(200)}
    )
    replica = await open_replica(memtable_rows=80)
    await sealed(replica)
    kinds = [(rank, k) for rank in range(10) for k in (5, 40)]

    async def search(rank: int, k: int) -> list[str]:
        found = await replica.search(
            np.ones((1, 3), np.float32), k, filter=filters.parse(f"rank = {rank}"), deadline=soon()
        )
        return [hit.id for hit in found.hits[0]]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*(search(rank, k) for rank, k in kinds))

    alone = [await search(rank, k) for rank, k in kinds]
    for (rank, k), ids in zip(kinds, alone, strict=True):
        assert len(ids) == min(k, 20)
        assert {int(id[1:]) % 10 for id in ids} == {rank}
    # While threads are free, while they are not, and once all are known to be short.
    for hold in (False, True, False, True):
        busy = [threads.submit(time.sleep, 0.05) for _ in range(2)] if hold else []
        assert await all_of_them() == alone
        await asyncio.gather(*map(asyncio.wrap_future, busy))


async def test_rendered_hits_are_those_of_the_values(open_replica: Open, log: MemoryLog) -> None:
    log.write(vectors(*(f"d{i}" for i in range(40))), attributes={"d3": {"rank": 7}})
    replica = await open_replica(memtable_rows=30)
    await sealed(replica)
    queries = RNG.standard_normal((3, 3)).astype(np.float32)
    for exclude in (frozenset[str](), frozenset({"d3", "d5", "nobody"})):
        options: dict[str, Any] = {"filter": None, "exclude": exclude, "deadline": soon()}
        values = await replica.search(queries, 35, **options)
        rendered = await replica.search_rendered(queries, 35, **options)
        for hits, told in zip(values.hits, rendered.hits, strict=True):
            message = pb.SearchResponse.FromString(told.body())
            assert list(message.hits) == [wire.hit_on_wire(hit, SCHEMA) for hit in hits]
            assert [row.id for row in told.rows] == [hit.id for hit in hits]


async def test_a_lone_short_search_does_not_wait_for_a_thread(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    for _ in range(50):  # until it is known to be short, on however busy a machine
        await nearest(replica, [1, 0, 0])
    freed = threading.Event()
    busy = [threads.submit(freed.wait, 10) for _ in range(2)]
    assert [hit.id for hit in await nearest(replica, [1, 0, 0])] == ["a"]
    assert not any(job.done() for job in busy)
    freed.set()


async def test_more_than_may_wait_is_refused_and_what_waits_is_answered(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    freed = threading.Event()
    busy = [threads.submit(freed.wait, 10) for _ in range(2)]
    queries = np.ones((5000, 3), np.float32)
    asked = [asyncio.create_task(replica.search(queries, 1, filter=None, deadline=soon())) for _ in range(2)]
    with pytest.raises(Overloaded):
        await asked[1]
    freed.set()
    answer = await asked[0]
    assert [[hit.id for hit in hits] for hits in answer.hits] == [["a"]] * 5000
    assert all(job.result() for job in busy)


async def test_every_search_ends_at_its_own_deadline(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    freed = threading.Event()
    busy = [threads.submit(freed.wait, 10) for _ in range(2)]
    query = np.ones((1, 3), np.float32)
    ends: list[str] = []

    async def ask(name: str, seconds: float) -> None:
        try:
            await replica.search(query, 1, filter=None, deadline=Deadline.after(seconds))
        except DeadlineExceeded:
            ends.append(name)

    asked = [
        asyncio.create_task(ask(name, s)) for name, s in (("long", 10), ("second", 0.02), ("first", 0.01))
    ]
    await until(lambda: len(ends) == 2)
    assert ends == ["first", "second"]
    assert not any(job.done() for job in busy)
    freed.set()
    await asyncio.gather(*asked)
    assert ends == ["first", "second"]


async def test_callers_who_left_or_are_late_cost_no_search(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    busy = [threads.submit(time.sleep, 0.1) for _ in range(2)]
    left = asyncio.create_task(nearest(replica, [1, 0, 0]))
    await asyncio.sleep(0)
    left.cancel()
    with suppress(asyncio.CancelledError):
        await left
    with pytest.raises(DeadlineExceeded):
        await replica.search(np.ones((1, 3), np.float32), 1, filter=None, deadline=Deadline.after(0.01))
    await until(lambda: all(job.done() for job in busy) and replica.stats()["waiting_queries"] == 0)
    assert [hit.id for hit in await nearest(replica, [1, 0, 0])] == ["a"]
    assert replica.stats()["batches_total"] == 1


async def test_a_search_that_fails_fails_its_callers_and_nobody_else(
    open_replica: Open, log: MemoryLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    with monkeypatch.context() as broken:
        broken.setattr("services.shard.memtable.Memtable.search", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await nearest(replica, [1, 0, 0])
    assert "searches failed" in caplog.text
    assert [hit.id for hit in await nearest(replica, [1, 0, 0])] == ["a"]


async def test_closing_fails_what_waits_and_waits_for_what_runs(
    open_replica: Open, log: MemoryLog, threads: ThreadPoolExecutor
) -> None:
    log.write(vectors("a"))
    replica = await open_replica()
    busy = [threads.submit(time.sleep, 0.05) for _ in range(2)]
    waiting = asyncio.create_task(nearest(replica, [1, 0, 0]))
    await asyncio.sleep(0)
    await replica.close()
    assert any(job.done() for job in busy), "the search that was under way had to wait for a thread"
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await nearest(replica, [1, 0, 0])
    await replica.close()


async def test_answers_are_whole_while_writes_seals_and_merges_go_on(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica()
    fixed = {f"fixed{i}": np.array([1.0, i / 100, 0.0]) for i in range(10)}
    replica.offer(log.write(fixed))
    done = False

    async def write() -> None:
        nonlocal done
        for i in range(300):
            replica.offer(log.write({f"d{i % 40}": np.array([-1.0, RNG.random(), RNG.random()])}))
            await asyncio.sleep(0)
        done = True

    async def read() -> None:
        while not done:
            hits = await nearest(replica, [1, 0, 0], k=10)
            assert [hit.id for hit in hits] == list(fixed)
            everything = await nearest(replica, [1, 0, 0], k=100)
            ids = [hit.id for hit in everything]
            assert len(ids) == len(set(ids)) >= 10

    await asyncio.gather(write(), read(), read())
    await sealed(replica)
    assert {hit.id for hit in await nearest(replica, [1, 0, 0], k=100)} == set(log.live)
    replica.validate_state()
