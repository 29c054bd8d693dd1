"""Slots a replica follows, has and answers for."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from memory_log import MemoryLog

from services.deadline import Deadline
from services.shard.holdings import Holdings
from services.shard.replica import Replica
from shard_router.errors import StaleEpoch
from shard_router.hashing import slot_of
from shard_router.model import LogDelta, Version

Open = Callable[..., Awaitable[Replica]]
EVEN, ODD = [slot for slot in range(16) if slot % 2 == 0], [slot for slot in range(16) if slot % 2]


def of(slots: list[int], ids: Any) -> set[str]:
    return {id for id in ids if slot_of(id, 16) in slots}


async def found(replica: Replica, epoch: int | None = None) -> set[str]:
    deadline = Deadline.after(20)
    answer = await replica.search(
        np.ones((1, 3)), 1000, filter=None, exact=True, epoch=epoch, deadline=deadline
    )
    return {hit.id for hit in answer.hits[0]}


async def versions(replica: Replica) -> dict[str, Version]:
    answer = await replica.search(np.ones((1, 3)), 1000, filter=None, exact=True, deadline=Deadline.after(20))
    return {hit.id: hit.version for hit in answer.hits[0]}


async def follow(replica: Replica, delta: LogDelta) -> None:
    if not replica.offer(delta):
        assert await replica.wait_for(delta.upto, Deadline.after(20))


def documents(count: int, name: str = "d") -> dict[str, np.ndarray]:
    return {f"{name}{i}": np.ones(3) for i in range(count)}


def test_only_what_is_whole_is_answered_for() -> None:
    holdings = Holdings(4, [0, 1], epoch=3)
    assert holdings.follow([1, 2]) == [2]
    with pytest.raises(ValueError, match=r"\[2\] are not whole"):
        holdings.serve(4, [0, 2])
    holdings.complete([2])
    holdings.serve(4, [0, 2])
    with pytest.raises(ValueError, match="epoch 3 after epoch 4"):
        holdings.serve(3, [0])
    assert holdings.slots_followed() == [0, 1, 2]
    holdings.release([1, 2])
    assert holdings.served.tolist() == [True, False, False, False]


def test_an_epoch_is_answered_at_while_the_slots_were_the_same() -> None:
    holdings = Holdings(4, [0, 1], epoch=3)
    holdings.serve(4, [0, 1])
    for epoch in (3, 4, None):
        holdings.require(epoch)
    holdings.serve(5, [0])
    with pytest.raises(StaleEpoch) as stale:
        holdings.require(4)
    assert (stale.value.seen, stale.value.current) == (4, 5)
    with pytest.raises(StaleEpoch):
        holdings.require(6)


def test_epochs_that_were_not_told_of_are_not_answered_at() -> None:
    holdings = Holdings(4, [], epoch=2)
    holdings.follow([1])
    holdings.complete([1])
    # At 3 and 4 it was to answer for slot 1, and nobody could tell it; at 5 it is not any more.
    holdings.serve(5, [])
    for epoch in (2, 3, 4):
        with pytest.raises(StaleEpoch):
            holdings.require(epoch)
    holdings.require(5)
    holdings.serve(6, [])
    holdings.require(5)


async def test_slots_are_taken_over_unseen_and_given_away(open_replica: Open, log: MemoryLog) -> None:
    log.write(documents(40))
    replica = await open_replica(slots=EVEN, epoch=1)
    assert await found(replica) == of(EVEN, log.live)
    await replica.backfill(ODD)
    delta = log.write(documents(30, "new"), deletes=("d1", "d2"))
    await follow(replica, delta)
    assert await found(replica, 1) == of(EVEN, log.live)
    assert await replica.count(None) == len(of(EVEN, log.live)) == replica.describe()["documents"]
    odd = next(iter(of(ODD, log.live)))
    assert await replica.vectors([odd]) == {}
    await replica.serve(2, [*EVEN, *ODD])
    assert await found(replica, 2) == set(log.live)
    with pytest.raises(StaleEpoch):
        await replica.search(np.ones((1, 3)), 1, filter=None, epoch=1, deadline=Deadline.after(20))
    await replica.serve(3, ODD)
    assert await found(replica, 3) == of(ODD, log.live)
    await replica.release(EVEN)
    assert replica.followed() == frozenset(ODD)
    await follow(replica, log.write(documents(20, "last")))
    assert await found(replica) == of(ODD, log.live)
    replica.validate_state()


async def test_slots_are_moved_in_small_pages(open_replica: Open, log: MemoryLog) -> None:
    log.page_rows = 4096
    log.write(documents(900))
    pages: list[int] = []

    async def counted(after: int, slots: Any = None, rows: Any = None) -> Any:
        page = await log.tail(after, slots, rows)
        if slots == ODD:
            pages.append(len(page.rows))
        return page

    replica = await open_replica(slots=EVEN, tail=counted, tail_rows=4096, memtable_rows=1000)
    await replica.backfill(ODD)
    assert sum(pages) == len(of(ODD, log.live))
    assert max(pages) <= 128
    await replica.serve(2, ODD)
    assert await found(replica, 2) == of(ODD, log.live)


async def test_slots_are_moved_however_fast_others_write(open_replica: Open, log: MemoryLog) -> None:
    """At every page more is written than a page of a move holds, and less than a whole one."""
    log.page_rows = 4096
    log.write(documents(300))
    reads = itertools.count()

    async def outrun(after: int, slots: Any = None, rows: Any = None) -> Any:
        if slots == ODD and (number := next(reads)) < 20:
            log.write(documents(600, f"new-{number}-"))
        return await log.tail(after, slots, rows)

    replica = await open_replica(slots=EVEN, tail=outrun, tail_rows=4096, memtable_rows=100_000)
    await replica.backfill(ODD)
    assert next(reads) < 20
    await replica.serve(2, ODD)
    assert await replica.count(None) == len(of(ODD, log.live))


async def test_what_is_written_and_deleted_while_slots_are_read_is_as_it_was_written(
    open_replica: Open, log: MemoryLog
) -> None:
    log.page_rows = 4
    log.write(documents(40))
    replica = await open_replica(slots=EVEN, tail_rows=4)
    original, number = log.tail, 0

    async def busy(after: int, slots: Any = None, rows: Any = None) -> Any:
        nonlocal number
        page = await original(after, slots, rows)
        if slots is not None and number < 20:
            # Between a page and its arrival documents go, move on, and come anew.
            number += 1
            replica.offer(log.write({f"d{number + 20}": np.ones(3)}, deletes=(f"d{number}",)))
            replica.offer(log.write({f"d{number - 1}": np.ones(3)}))
        return page

    log.tail = busy  # type: ignore[method-assign]
    await replica.backfill(ODD)
    assert await replica.wait_for(log.counter, Deadline.after(20))
    await replica.serve(2, range(16))
    assert await found(replica) == set(log.live)
    replica.validate_state()


async def test_a_replica_opened_again_has_what_it_is_to_have(open_replica: Open, log: MemoryLog) -> None:
    log.write(documents(60))
    replica = await open_replica(slots=EVEN, epoch=4)
    await replica.backfill(ODD)
    await replica.serve(6, [*EVEN, *ODD])
    await follow(replica, log.write(documents(60, "more"), deletes=("d3",)))
    await replica.close()
    log.write(documents(5, "late"), deletes=("d4",))
    for slots in ([*EVEN, *ODD], ODD, EVEN, [*ODD, *EVEN]):
        again = await open_replica(slots=slots, epoch=7)
        assert await found(again) == of(slots, log.live)
        again.validate_state()
        await again.close()


def test_slots_given_up_and_followed_again_are_not_kept() -> None:
    holdings = Holdings(8, (), 1)
    holdings.follow([1, 2])
    begun = holdings.changes
    holdings.follow([3])
    assert holdings.kept([1, 2], begun)
    assert not holdings.kept([3], begun)
    holdings.release([2])
    assert not holdings.kept([1, 2], begun)
    assert holdings.follow([2]) == [2]
    assert holdings.kept([1], begun)
    assert not holdings.kept([2], begun)
    assert holdings.kept([1, 2], holdings.changes)


#: What becomes of documents while their slots are not followed: which are written anew, and which deleted.
CHANGES: dict[str, tuple[range, range]] = {
    "nothing": (range(0), range(0)),
    "rewritten": (range(0, 40, 3), range(0)),
    "deleted": (range(0), range(0, 40, 3)),
    "both": (range(0, 40, 3), range(1, 40, 3)),
}


@pytest.mark.parametrize("during", ["a page is read", "a page is taken in"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_slots_given_up_while_they_are_read_and_taken_again_are_read_whole(
    open_replica: Open,
    log: MemoryLog,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[range, range],
    during: str,
) -> None:
    monkeypatch.setattr("services.shard.follower._SLICE_ROWS", 2)
    log.page_rows = 6
    log.write(documents(40))
    replica = await open_replica(slots=EVEN, tail_rows=6)
    original, reads, go_on = log.tail, 0, asyncio.Event()
    second: list[asyncio.Task[None]] = []

    async def give_up() -> None:
        await replica.release(ODD)
        rewritten, deleted = change
        upserts = {f"d{i}": np.ones(3) for i in rewritten}
        assert replica.offer(log.write(upserts, deletes=tuple(f"d{i}" for i in deleted)))

    async def tail(after: int, slots: Any = None, rows: Any = None) -> LogDelta:
        nonlocal reads
        page = await original(after, slots, rows)
        if slots != ODD:
            return page
        reads += 1
        if second and not after:
            await go_on.wait()
        elif reads == 2:
            given_up = asyncio.create_task(give_up())
            second.append(asyncio.create_task(replica.backfill(ODD)))
            if during == "a page is read":
                await given_up
                await asyncio.sleep(0)
        return page

    log.tail = tail  # type: ignore[method-assign]
    await replica.backfill(ODD)
    with pytest.raises(ValueError, match="are not whole"):
        await replica.serve(2, range(16))
    go_on.set()
    await second[0]
    await replica.serve(2, range(16))
    assert await versions(replica) == {id: row.version for id, (row, _) in log.live.items()}
    replica.validate_state()
