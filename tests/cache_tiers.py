"""Cache tiers for tests, and waiting for what happens behind them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from services.cache.tier import CacheTier


@contextlib.asynccontextmanager
async def opened(url: str, op_timeout_ms: int) -> AsyncIterator[CacheTier]:
    """A tier without L1, so that every answer is Redis's."""
    tier = CacheTier(l1_bytes=0, redis_url=url, op_timeout_ms=op_timeout_ms)
    await tier.open()
    try:
        yield tier
    finally:
        await tier.close()


async def eventually(condition: Callable[[], object]) -> None:
    """Until the condition holds, half a minute at most."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what a server does sets no event
            await asyncio.sleep(0.005)
