"""Segments that go bad: what is found, what is answered meanwhile, and how the documents come back."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from memory_log import MemoryLog

from services.deadline import Deadline
from services.shard.replica import Replica
from shard_router.errors import Unavailable, UnknownLog
from shard_router.hashing import slot_of
from shard_router.model import Hit, LogDelta

RNG = np.random.default_rng(9)
#: Two whole segments of 8 rows and an open memtable.
IDS = [f"d{i}" for i in range(20)]
Open = Callable[..., Awaitable[Replica]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def answer(replica: Replica) -> tuple[list[Hit], bool]:
    """All hits, and whether they are all there are."""
    told = await replica.search(
        np.array([[1, 2, 3]], np.float32), 50, filter=None, deadline=Deadline.after(10)
    )
    return told.hits[0], told.complete


async def fill(replica: Replica, log: MemoryLog) -> list[Hit]:
    """Write the documents one by one; what a search then finds."""
    for id in IDS:
        assert replica.offer(log.write({id: RNG.standard_normal(3)}))
    await until(lambda: replica.describe()["segments"] == 2)
    hits, complete = await answer(replica)
    assert complete
    assert len(hits) == len(IDS)
    return hits


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-0/segment-*"))


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "header flipped": lambda segment: flip(segment / "header"),
    "arrays flipped": lambda segment: flip(segment / "arrays"),
    "index flipped": lambda segment: flip(segment / "index"),
    "vectors torn": lambda segment: tear(segment / "vectors"),
    "arrays torn": lambda segment: tear(segment / "arrays"),
    "header torn": lambda segment: tear(segment / "header"),
    "vectors missing": lambda segment: (segment / "vectors").unlink(),
    "header missing": lambda segment: (segment / "header").unlink(),
    "segment missing": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
async def test_what_is_found_damaged_at_the_start_is_read_again_before_serving_and_nothing_else(
    open_replica: Open,
    log: MemoryLog,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    replica = await open_replica()
    before = await fill(replica, log)
    await replica.close()
    second = segments(tmp_path)[1]
    damage(second)
    again = await open_replica()
    assert await answer(again) == (before, True)
    assert again.condition() == ("serving", "")
    stats = again.stats()
    assert (stats["quarantined"], stats["recalled_rows_total"]) == (1, 8)
    assert f"segment {second.name} is set aside" in caplog.text
    again.validate_state()
    await again.close()
    once_more = await open_replica()
    assert await answer(once_more) == (before, True)


async def test_damage_found_while_serving_is_owned_up_to_and_repaired(
    open_replica: Open, log: MemoryLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica = await open_replica()
    before = await fill(replica, log)
    await replica.close()
    first = segments(tmp_path)[0]
    flip(first / "vectors", 5)
    original, reads_go_on = log.tail, asyncio.Event()

    async def tail(after: int) -> LogDelta:
        if after < 16:
            await reads_go_on.wait()
        return await original(after)

    log.tail = tail  # type: ignore[method-assign]
    again = await open_replica()
    assert again.stats()["unverified_bytes"] > 0
    await until(lambda: again.stats()["missing_positions"] > 0)
    assert again.condition()[0] == "repairing"
    hits, complete = await answer(again)
    assert not complete
    assert [hit for hit in before if hit.id in IDS[8:]] == hits
    assert again.stats()["missing_positions"] == 8
    for refused in (again.count(None), again.matching(None, 9), again.vectors(["d0"])):
        with pytest.raises(Unavailable, match="documents again"):
            await refused
    assert list(await again.vectors(["d9"])) == ["d9"]
    assert again.offer(log.write({"new": np.array([1.0, 2.0, 3.0])})), "writes go on"
    reads_go_on.set()
    await until(lambda: again.condition()[0] == "serving")
    hits, complete = await answer(again)
    assert complete
    assert hits[0].id == "new"
    assert hits[1:] == before
    assert await again.count(None) == len(IDS) + 1
    assert (tmp_path / "shard-0" / f"quarantined-{first.name}").is_dir()
    assert f"segment {first.name} of things (shard-0) is damaged" in caplog.text
    assert again.stats()["unverified_bytes"] == 0
    again.validate_state()


async def test_what_is_written_during_a_repair_is_not_undone_by_it(
    open_replica: Open, log: MemoryLog, tmp_path: Path
) -> None:
    replica = await open_replica()
    await fill(replica, log)
    await replica.close()
    flip(segments(tmp_path)[0] / "vectors")
    original, read, go_on = log.tail, asyncio.Event(), asyncio.Event()

    async def slow(after: int) -> LogDelta:
        delta = await original(after)
        if after < 16:
            read.set()
            await go_on.wait()
        return delta

    log.tail = slow  # type: ignore[method-assign]
    again = await open_replica()
    await read.wait()
    assert again.offer(log.write({"d0": np.array([1.0, 2.0, 3.0])}, deletes=("d1", "d9")))
    go_on.set()
    await until(lambda: again.condition()[0] == "serving")
    hits, complete = await answer(again)
    assert complete
    assert hits[0].id == "d0"
    assert {hit.id for hit in hits} == set(IDS) - {"d1", "d9"}
    assert {hit.id: hit.version for hit in hits} == {id: row.version for id, (row, _) in log.live.items()}
    again.validate_state()


async def test_a_document_that_moves_on_during_a_repair_is_missing_until_it_is_followed(
    open_replica: Open, log: MemoryLog, tmp_path: Path
) -> None:
    replica = await open_replica()
    await fill(replica, log)
    await replica.close()
    flip(segments(tmp_path)[0] / "vectors")
    original = log.tail

    async def moving(after: int) -> LogDelta:
        if after < 16 and log.counter < 30:
            # Nobody is told, and the page that is read has it no more.
            log.write({"d0": np.array([1.0, 2.0, 3.0])})
        return await original(after)

    log.tail = moving  # type: ignore[method-assign]
    again = await open_replica(poll_ms=60_000)
    await until(lambda: again.stats()["recalled_rows_total"] > 0 and again.condition()[0] == "serving")
    hits, complete = await answer(again)
    assert complete
    assert {hit.id: hit.version for hit in hits} == {id: row.version for id, (row, _) in log.live.items()}


@pytest.mark.parametrize("taken_again", ["at once", "after the repair"])
@pytest.mark.parametrize("during", ["a page is read", "a page is taken in"])
@pytest.mark.parametrize("deleted", [(), ("d0", "d3", "d6", "d12"), tuple(IDS[::2])], ids=len)
async def test_slots_given_up_amid_a_repair_come_back_as_they_are_written(
    open_replica: Open,
    log: MemoryLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deleted: tuple[str, ...],
    during: str,
    taken_again: str,
) -> None:
    monkeypatch.setattr("services.shard.follower._SLICE_ROWS", 1)
    replica = await open_replica()
    await fill(replica, log)
    await replica.close()
    flip(segments(tmp_path)[0] / "vectors")
    given = sorted({slot_of(id, 16) for id in IDS[::2]})
    original, repaired = log.tail, asyncio.Event()
    taking: list[asyncio.Task[None]] = []
    giving: list[asyncio.Task[None]] = []

    async def give_up() -> None:
        await again.release(given)
        rewritten = {id: RNG.standard_normal(3) for id in ("d1", "d5", "d7")}
        assert again.offer(log.write(rewritten, deletes=deleted))

    async def tail(after: int, slots: Sequence[int] | None = None, rows: int | None = None) -> LogDelta:
        delta = await original(after, slots, rows)
        if slots == given:
            await repaired.wait()
        elif after < 16 and not giving:
            giving.append(asyncio.create_task(give_up()))
            if taken_again == "at once":
                taking.append(asyncio.create_task(again.backfill(given)))
            if during == "a page is read":
                await giving[0]
                await asyncio.sleep(0)
        return delta

    log.tail = tail  # type: ignore[method-assign]
    again = await open_replica()
    await until(lambda: bool(giving) and giving[0].done() and again.condition()[0] == "serving")
    await giving[0]
    again.validate_state()
    repaired.set()
    await (taking[0] if taking else again.backfill(given))
    await again.serve(2, range(16))
    hits, complete = await answer(again)
    assert complete
    assert {hit.id: hit.version for hit in hits} == {id: row.version for id, (row, _) in log.live.items()}
    again.validate_state()


@pytest.mark.parametrize("written", [0, 20])
async def test_a_stop_in_the_middle_of_a_repair_loses_nothing(
    open_replica: Open, log: MemoryLog, tmp_path: Path, written: int
) -> None:
    replica = await open_replica()
    await fill(replica, log)
    await replica.close()
    flip(segments(tmp_path)[0] / "vectors")
    original, never = log.tail, asyncio.Event()

    async def stuck(after: int) -> LogDelta:
        if after < 16:
            await never.wait()
        return await original(after)

    log.tail = stuck  # type: ignore[method-assign]
    again = await open_replica()
    await until(lambda: again.condition()[0] == "repairing")
    for i in range(written):
        assert again.offer(log.write({f"n{i}": RNG.standard_normal(3)}))
    await until(lambda: again.stats()["frozen_memtables"] == 0)
    assert again.condition()[0] == "repairing"
    await again.close()
    log.tail = original  # type: ignore[method-assign]
    last = await open_replica()
    hits, complete = await answer(last)
    assert complete
    assert {hit.id: hit.version for hit in hits} == {id: row.version for id, (row, _) in log.live.items()}
    last.validate_state()


@pytest.mark.parametrize("child_rows", [1, 1000])
async def test_damage_that_a_merge_comes_upon_is_repaired(
    open_replica: Open, log: MemoryLog, tmp_path: Path, child_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.shard.state.RETRY_FIRST_S", 0.01)
    replica = await open_replica(child_rows=child_rows)
    before = await fill(replica, log)
    flip(segments(tmp_path)[1] / "vectors")
    assert replica.offer(log.write(deletes=tuple(IDS[8:13])))
    await until(lambda: replica.stats()["quarantined"] == 1)
    await until(lambda: replica.condition()[0] == "serving")
    assert await answer(replica) == ([hit for hit in before if hit.id not in IDS[8:13]], True)
    replica.validate_state()


async def test_all_segments_may_be_damaged(open_replica: Open, log: MemoryLog, tmp_path: Path) -> None:
    replica = await open_replica()
    before = await fill(replica, log)
    await replica.close()
    for segment in segments(tmp_path):
        flip(segment / "vectors")
    again = await open_replica()
    await until(lambda: again.stats()["quarantined"] == 2)
    await until(lambda: again.condition()[0] == "serving")
    assert await answer(again) == (before, True)
    again.validate_state()


async def test_a_repair_needs_no_deletes_that_the_log_has_forgotten(
    open_replica: Open, log: MemoryLog, tmp_path: Path
) -> None:
    replica = await open_replica()
    before = await fill(replica, log)
    await replica.close()
    flip(segments(tmp_path)[1] / "arrays")
    original = log.tail

    async def forgetful(after: int) -> LogDelta:
        if 0 < after < 16:
            raise UnknownLog(log.log_id, after)
        return await original(after)

    log.tail = forgetful  # type: ignore[method-assign]
    again = await open_replica()
    assert await answer(again) == (before, True)


async def test_a_replica_that_is_behind_what_the_log_remembers_falls(
    open_replica: Open, log: MemoryLog
) -> None:
    replica = await open_replica()
    log.failures = [UnknownLog(log.log_id, 0)]
    await until(replica.fell.is_set)
    with pytest.raises(Unavailable, match="unknown here"):
        await answer(replica)
