"""Work on a stream side by side, answered in order, with back-pressure."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


async def in_order(
    items: AsyncIterator[A], start: Callable[[A], Awaitable[B]], limit: int
) -> AsyncGenerator[B, None]:
    """`start` of every item, about `limit` at once; results in the order of the items.

    Reading pauses while `limit` results wait. A failure comes in its item's place and ends the stream;
    whatever is still under way when the reader leaves is cancelled.
    """
    queue: asyncio.Queue[asyncio.Future[B] | None] = asyncio.Queue(limit)
    under_way: set[asyncio.Future[B]] = set()

    async def feed() -> None:
        last: asyncio.Future[B] | None = None
        try:
            async for item in items:
                task = asyncio.ensure_future(start(item))
                under_way.add(task)
                await queue.put(task)
        except Exception as error:
            last = asyncio.get_running_loop().create_future()
            last.set_exception(error)
        await queue.put(last)

    feeder = asyncio.create_task(feed())
    try:
        while (task := await queue.get()) is not None:
            result = await task
            under_way.discard(task)
            yield result
    finally:
        feeder.cancel()
        for task in under_way:
            task.cancel()
        await asyncio.gather(feeder, *under_way, return_exceptions=True)
