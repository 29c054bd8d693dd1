"""Ending background tasks."""

import asyncio

#: How long a cancelled task has until it is cancelled again.
_AGAIN_S = 0.05


async def end(task: "asyncio.Task[None] | None") -> None:
    """Cancel a task, if there is one, and wait until it has ended.

    Again and again: asyncio.wait_for of Python 3.11, under the connection pool, may lose a cancellation.
    """
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_S)
