"""Ending background tasks."""

import asyncio
from typing import Any

#: How long a cancelled task has until it is cancelled again: enough for the database driver, on a busy
#: machine, to have the server cancel what it runs, which a second cancellation would cut short.
_AGAIN_S = 1.0


async def end(*tasks: "asyncio.Future[Any] | None") -> None:
    """Cancel those tasks that there are, and wait until all have ended, however they do.

    Again and again: asyncio.wait_for of Python 3.11, under the connection pool and the Redis client's sends,
    may lose a cancellation (https://github.com/python/cpython/issues/86296).
    """
    ending = [task for task in tasks if task is not None]
    while running := [task for task in ending if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_AGAIN_S)
    await asyncio.gather(*ending, return_exceptions=True)
