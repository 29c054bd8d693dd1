import asyncio

import pytest

from services.cache.single_flight import SingleFlight
from shard_router.errors import DeadlineExceeded, EmbedderUnavailable


class Work:
    """A computation that ends when told, and counts how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.ends: list[asyncio.Future[str]] = []

    async def __call__(self) -> str:
        self.begun += 1
        self.ends.append(asyncio.get_running_loop().create_future())
        try:
            return await self.ends[-1]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def start(flights: SingleFlight, work: Work, callers: int) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(flights.run("key", work)) for _ in range(callers)]
    await settle()
    return tasks


async def test_a_thousand_callers_are_one_computation():
    flights, work = SingleFlight(), Work()
    tasks = await start(flights, work, 1_000)
    assert work.begun == 1
    work.ends[0].set_result("answer")
    assert await asyncio.gather(*tasks) == ["answer"] * 1_000
    assert flights.stats() == {"recomputes": 0, "recomputes_avoided_total": 999}


async def test_keys_do_not_wait_for_each_other_and_results_are_not_kept():
    flights = SingleFlight()

    async def once(value: int) -> int:
        return value

    assert await asyncio.gather(*(flights.run(i, lambda i=i: once(i)) for i in range(5))) == [*range(5)]
    assert await flights.run(0, lambda: once(10)) == 10


async def test_the_first_callers_leaving_disturbs_nobody():
    flights, work = SingleFlight(), Work()
    first, *others = await start(flights, work, 4)
    first.cancel()
    await settle()
    assert first.cancelled()
    work.ends[0].set_result("answer")
    assert await asyncio.gather(*others) == ["answer"] * 3
    assert (work.begun, work.cancelled) == (1, 0)


async def test_a_follower_leaving_disturbs_nobody():
    flights, work = SingleFlight(), Work()
    first, follower = await start(flights, work, 2)
    follower.cancel()
    await settle()
    assert follower.cancelled()
    work.ends[0].set_result("answer")
    assert await first == "answer"


async def test_when_all_have_left_the_work_is_cancelled_and_the_next_caller_begins_anew():
    flights, work = SingleFlight(), Work()
    tasks = await start(flights, work, 3)
    for task in tasks:
        task.cancel()
    await settle()
    assert work.cancelled == 1
    (task,) = await start(flights, work, 1)
    assert work.begun == 2
    work.ends[1].set_result("answer")
    assert await task == "answer"


async def test_a_failure_is_everyones():
    flights, work = SingleFlight(), Work()
    tasks = await start(flights, work, 3)
    work.ends[0].set_exception(EmbedderUnavailable("minilm", "it is down"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [EmbedderUnavailable] * 3
    assert work.begun == 1
    assert flights.stats() == {"recomputes": 0, "recomputes_avoided_total": 0}


async def test_a_deadline_is_the_first_callers_own_and_one_follower_takes_over():
    flights, work = SingleFlight(), Work()
    first, *others = await start(flights, work, 4)
    work.ends[0].set_exception(DeadlineExceeded("embed"))
    await settle()
    with pytest.raises(DeadlineExceeded):
        await first
    assert work.begun == 2
    work.ends[1].set_result("answer")
    assert await asyncio.gather(*others) == ["answer"] * 3


async def test_work_that_is_cancelled_from_within_leaves_nobody_hanging():
    flights, work = SingleFlight(), Work()
    first, *others = await start(flights, work, 3)
    work.ends[0].cancel()
    await settle()
    assert first.cancelled()
    assert work.begun == 2
    work.ends[1].set_result("answer")
    assert await asyncio.gather(*others) == ["answer"] * 2
