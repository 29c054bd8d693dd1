"""Calls that ask alike travel together, and each gets its own answer or error, in time."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from services.deadline import Deadline
from services.gateway.coalescer import Coalescer
from shard_router.errors import DeadlineExceeded, Overloaded, Unavailable


class Sender:
    """Carries batches out once it may."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.may = asyncio.Event()
        self.error: Exception | None = None

    async def send(self, kind: str, items: Sequence[int], deadline: Deadline) -> Sequence[int]:
        self.batches.append((kind, list(items)))
        await self.may.wait()
        if self.error is not None:
            raise self.error
        return [10 * item for item in items]


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
async def coalescer(sender: Sender) -> AsyncIterator["Coalescer[str, int, int]"]:
    coalescer: Coalescer[str, int, int] = Coalescer(
        sender.send, "the hop", batch_rows=4, in_flight=1, queue_rows=8
    )
    yield coalescer
    await coalescer.close()


def soon() -> Deadline:
    return Deadline.after(20)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_comes_in_one_turn_and_while_a_batch_is_under_way_travels_together(
    coalescer: "Coalescer[str, int, int]", sender: Sender
) -> None:
    first = [asyncio.create_task(coalescer.ask("a", i, 1, soon())) for i in range(3)]
    other = asyncio.create_task(coalescer.ask("b", 7, 1, soon()))
    await turns()
    later = [asyncio.create_task(coalescer.ask("a", i, 1, soon())) for i in range(3, 8)]
    await turns()
    assert sender.batches == [("a", [0, 1, 2]), ("b", [7])]
    sender.may.set()
    assert await asyncio.gather(*first, *later, other) == [0, 10, 20, 30, 40, 50, 60, 70, 70]
    assert sender.batches[2:] == [("a", [3, 4, 5, 6]), ("a", [7])]


async def test_a_large_call_travels_alone(coalescer: "Coalescer[str, int, int]", sender: Sender) -> None:
    sender.may.set()
    answers = await asyncio.gather(*(coalescer.ask("a", i, rows, soon()) for i, rows in enumerate((1, 6, 1))))
    assert answers == [0, 10, 20]
    assert sender.batches == [("a", [0]), ("a", [1]), ("a", [2])]


async def test_a_batch_fails_its_callers_and_no_others(
    coalescer: "Coalescer[str, int, int]", sender: Sender
) -> None:
    sender.error = Unavailable("away")
    failing = [asyncio.create_task(coalescer.ask("a", i, 1, soon())) for i in range(2)]
    await turns()
    sender.may.set()
    for task in failing:
        with pytest.raises(Unavailable, match="away"):
            await task
    sender.error = None
    assert await coalescer.ask("a", 1, 1, soon()) == 10


async def test_whoever_is_late_or_leaves_is_no_part_of_the_next_batch(
    coalescer: "Coalescer[str, int, int]", sender: Sender
) -> None:
    flying = asyncio.create_task(coalescer.ask("a", 0, 1, soon()))
    await turns()
    late = asyncio.create_task(coalescer.ask("a", 1, 1, Deadline.after(0.02)))
    leaving = asyncio.create_task(coalescer.ask("a", 2, 1, soon()))
    staying = asyncio.create_task(coalescer.ask("a", 3, 1, soon()))
    await turns()
    leaving.cancel()
    with pytest.raises(DeadlineExceeded, match="the hop"):
        await late
    sender.may.set()
    assert await asyncio.gather(flying, staying) == [0, 30]
    assert sender.batches == [("a", [0]), ("a", [3])]
    with pytest.raises(DeadlineExceeded):
        await coalescer.ask("a", 4, 1, Deadline.after(-1))


async def test_the_queue_is_bounded(coalescer: "Coalescer[str, int, int]", sender: Sender) -> None:
    waiting = [asyncio.create_task(coalescer.ask("a", i, 1, soon())) for i in range(8)]
    await turns()
    tasks = [asyncio.create_task(coalescer.ask("a", i, 1, soon())) for i in range(4)]
    await turns()
    with pytest.raises(Overloaded):
        await coalescer.ask("a", 9, 1, soon())
    sender.may.set()
    assert len(await asyncio.gather(*waiting, *tasks)) == 12


async def test_closing_fails_what_waits_and_what_flies(
    coalescer: "Coalescer[str, int, int]", sender: Sender
) -> None:
    flying = asyncio.create_task(coalescer.ask("a", 0, 1, soon()))
    await turns()
    waiting = asyncio.create_task(coalescer.ask("a", 1, 1, soon()))
    await turns()
    await coalescer.close()
    for task in (flying, waiting):
        with pytest.raises(Unavailable):
            await task
    with pytest.raises(Unavailable):
        await coalescer.ask("a", 2, 1, soon())
