"""Background tasks whose failure is seen and whose end is certain."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

logger = logging.getLogger(__name__)

#: How long a cancelled task has until it is cancelled again.
_PATIENCE_S = 0.05


def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Runs the work in a task; should it fail, the log says so."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_report)
    return task


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels the tasks until all have ended.

    Once is not enough: asyncio.wait_for of Python 3.11, under the client's sends, loses a cancellation that
    comes as the send completes (https://github.com/python/cpython/issues/86296).
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_PATIENCE_S)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background task of the cache ended", exc_info=error)
