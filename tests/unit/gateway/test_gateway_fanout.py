"""Whom the fan-out asks when copies are slow, away, or of another epoch; the copies are made of faults."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from memory_log import collection

from index_builder.segments.index_spec import DEFAULT_EFFORT
from services.deadline import Deadline
from services.gateway.fanout import FanOut, Found
from services.gateway.served import Served
from services.shard.replica import ShardAnswer
from shard_router.errors import DeadlineExceeded, ShardUnavailable, StaleEpoch, Unavailable
from shard_router.model import HOME, Hit, Include, Version
from shard_router.resharding import Copy
from shard_router.shard_map import ShardMap, Steady


class FaultyCopy:
    """Answers with one hit that names it, after whatever `before` does."""

    position = 7

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, 0
        self.fell = asyncio.Event()
        self.before: Callable[[int | None], Any] = lambda epoch: None

    async def search(self, *_: Any, epoch: int | None, **__: Any) -> ShardAnswer[list[Hit]]:
        self.asked += 1
        waits = self.before(epoch)
        if waits is not None:
            await waits
        return ShardAnswer(7, [[Hit(self.name, 1.0, Version(1, 1))]], 0.1, True)


def served_by(replicas: int, shards: int = 1) -> tuple[Served, list[FaultyCopy]]:
    one = collection()
    object.__setattr__(one, "replicas", replicas)
    served = Served(one, Steady(ShardMap.create(16, shards)))
    served.logs[HOME].attach("log-1", 0)
    copies = []
    for shard in range(shards):
        for number in range(replicas):
            copies.append(FaultyCopy(f"{shard}-{number}"))
            served.join(Copy(shard, number), copies[-1])  # type: ignore[arg-type]
    return served, copies


async def search(
    served: Served, deadline: Deadline | None = None, min_coverage: float = 0.0
) -> Found[list[Hit]]:
    return await FanOut(random.Random(1)).search(
        served, np.ones((1, 3), np.float32), 10, filter=None, exact=False, effort=DEFAULT_EFFORT,
        include=Include(), min_coverage=min_coverage, deadline=deadline or Deadline.after(30),
    )  # fmt: skip


def ids(found: Found[list[Hit]]) -> list[str]:
    return [hit.id for hit in found.hits[0]]


def unavailable(epoch: int | None) -> None:
    raise Unavailable("away")


async def test_a_slow_copy_is_not_waited_for_and_what_it_does_ends() -> None:
    served, (first, second) = served_by(2)
    for _ in range(64):
        served.latencies.add(1.0)
    first.before = second.before = lambda epoch: None if first.asked + second.asked > 1 else never.wait()
    never = asyncio.Event()
    found = await search(served)
    assert (first.asked, second.asked, len(ids(found))) == (1, 1, 1)
    assert set(served.logs[HOME].in_flight.values()) == {0}
    assert len(asyncio.all_tasks()) == 1


async def test_a_copy_that_is_away_is_retried_at_the_other_and_coverage_stays_whole() -> None:
    served, copies = served_by(2)
    copies[0].before = unavailable
    for _ in range(20):
        found = await search(served, min_coverage=1.0)
        assert (ids(found), found.asked, found.answered) == (["0-1"], 1, 1)
    assert copies[0].asked > 0
    copies[1].before = unavailable
    with pytest.raises(ShardUnavailable):
        await search(served)


async def test_a_copy_that_is_down_is_not_asked() -> None:
    served, copies = served_by(2)
    copies[1].fell.set()
    for _ in range(20):
        assert ids(await search(served)) == ["0-0"]
    assert copies[1].asked == 0
    copies[0].fell.set()
    with pytest.raises(ShardUnavailable):
        await search(served)


async def test_a_shard_that_is_out_shows_in_the_coverage() -> None:
    for replicas in (1, 2):
        served, copies = served_by(replicas, shards=2)
        for copy in copies[:replicas]:
            copy.before = unavailable
        found = await search(served)
        assert (found.asked, found.answered, found.complete) == (2, 1, False)
        with pytest.raises(ShardUnavailable):
            await search(served, min_coverage=0.9)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 1), (1, 2), (2, 2)])
async def test_a_search_that_meets_another_epoch_is_planned_again(replicas: int, shards: int) -> None:
    served, copies = served_by(replicas, shards)
    epochs: list[int | None] = []

    def stale(epoch: int | None) -> None:
        epochs.append(epoch)
        if len(epochs) == 2:
            served.state = Steady(ShardMap(2, served.shard_map.owners))
        if len(epochs) <= 3:
            raise StaleEpoch(epoch or 0, 2)

    for copy in copies:
        copy.before = stale
    found = await search(served)
    assert found.complete
    assert found.epoch == epochs[-1] == 2
    for copy in copies:
        copy.before = lambda epoch: stale_for_ever()

    def stale_for_ever() -> None:
        raise StaleEpoch(2, 9)

    with pytest.raises(DeadlineExceeded):
        await search(served, Deadline.after(0.05))
