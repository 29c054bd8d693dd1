"""Work side by side, answers in order."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.gateway.streams import in_order


async def numbers(n: int, read: list[int] | None = None) -> AsyncIterator[int]:
    for i in range(n):
        if read is not None:
            read.append(i)
        yield i


async def collect(results: AsyncIterator[int], into: list[int]) -> None:
    async for result in results:
        into.append(result)  # noqa: PERF401  what came before a failure has to be kept


async def test_results_come_in_order_although_work_ends_out_of_order() -> None:
    ended: list[int] = []

    async def work(i: int) -> int:
        await asyncio.sleep(0.02 if i % 2 == 0 else 0)
        ended.append(i)
        return i * 10

    assert [r async for r in in_order(numbers(6), work, 4)] == [0, 10, 20, 30, 40, 50]
    assert ended != sorted(ended)


async def test_reading_pauses_while_results_wait() -> None:
    read: list[int] = []
    gate = asyncio.Event()

    async def work(i: int) -> int:
        await gate.wait()
        return i

    results = in_order(numbers(100, read), work, 3)
    first = asyncio.ensure_future(anext(results))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(read) <= 5, "a queue of three, one in hand on either side"
    gate.set()
    assert await first == 0
    assert [r async for r in results] == list(range(1, 100))


async def test_a_failure_comes_in_its_place_and_ends_the_stream() -> None:
    async def work(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    got: list[int] = []
    with pytest.raises(ValueError, match="two"):
        await collect(in_order(numbers(10), work, 2), got)
    assert got == [0, 1]


async def test_a_failing_source_is_heard_after_what_it_gave() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        raise ConnectionError("gone")

    async def work(i: int) -> int:
        return i

    got: list[int] = []
    with pytest.raises(ConnectionError):
        await collect(in_order(source(), work, 2), got)
    assert got == [1]


async def test_what_is_under_way_is_cancelled_when_the_reader_leaves() -> None:
    cancelled: list[int] = []

    async def work(i: int) -> int:
        if i == 0:
            return i
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(i)
            raise
        return i

    results = in_order(numbers(10), work, 2)
    assert await anext(results) == 0
    await asyncio.sleep(0)
    await results.aclose()
    assert cancelled
    assert set(cancelled) <= {1, 2, 3}
