"""One recompute at a time over all gateways: who computes holds a lease in Redis, the others wait.

A lease is a key with a token, set only where there is none, that expires by itself. Its holder renews it
while it computes, so a holder who dies is replaced within LEASE_MS; one who fails or is cancelled gives it
back at once. Nothing is wrong where two compute: leases save work and guarantee nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

from redis.exceptions import RedisError

from services import tasks
from services.cache.background import start
from services.cache.redis_tier import SecondTier
from services.deadline import Deadline

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_MS = 1_000
#: How often a lease is renewed while its holder computes.
RENEW_S = LEASE_MS / 3_000
#: Pauses between looks for the value, or for the lease to be free.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.05
#: A caller waits for another gateway no longer than this part of its own time, and never longer than WAIT_S.
WAIT_SHARE, WAIT_S = 0.5, 10.0

#: Renews (ARGV[2] milliseconds) or gives back (0) a lease that is still ours.
_MINE = (
    "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end "
    "if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end "
    "return redis.call('PEXPIRE', KEYS[1], ARGV[2])"
)


class Leases:
    """`run` computes under a lease; without a second tier, or while it is away, it just computes."""

    def __init__(self, second: SecondTier | None, *, rng: Random) -> None:
        self._second = second
        self._rng = rng
        #: Leases on their way back.
        self._returning: set[asyncio.Task[None]] = set()
        #: Leases that were had here.
        self.taken = 0
        self._avoided = 0
        self._waiting = 0

    async def run(
        self,
        name: bytes,
        find: Callable[[], Awaitable[T | None]],
        make: Callable[[], Awaitable[T]],
        deadline: Deadline,
    ) -> T:
        """What `find` finds once another gateway has made it, or what `make` makes here.

        `make` must have published what `find` looks for when it returns.
        """
        token = self._rng.randbytes(16)
        wait = Deadline.after(min(WAIT_S, deadline.left_s() * WAIT_SHARE), deadline.clock)
        pause_s = FIRST_PAUSE_S
        self._waiting += 1
        try:
            while not await self._take(name, token):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                if (found := await find()) is not None:
                    self._avoided += 1
                    return found
                if wait.left_s() <= 0:
                    return await make()
        finally:
            self._waiting -= 1
        self.taken += 1
        renewing = start(self._renew(name, token))
        try:
            # Whoever held it before may have published between our last look and now.
            if pause_s > FIRST_PAUSE_S and (found := await find()) is not None:
                self._avoided += 1
                return found
            return await make()
        finally:
            renewing.cancel()
            returning = start(self._give_back(name, token, renewing))
            self._returning.add(returning)
            returning.add_done_callback(self._returning.discard)

    async def close(self) -> None:
        """Waits until what is held here has been given back."""
        if self._returning:
            await asyncio.wait(self._returning)

    async def _take(self, name: bytes, token: bytes) -> bool:
        """Whether the lease is ours now; also where there is nobody to ask."""
        if self._second is None:
            return True
        try:
            return bool(await self._second.run(name, "SET", name, token, "NX", "PX", LEASE_MS))
        except (RedisError, OSError) as error:
            logger.debug("no lease to be had: %s", error)
            return True

    async def _renew(self, name: bytes, token: bytes) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._if_mine(name, token, LEASE_MS)

    async def _give_back(self, name: bytes, token: bytes, renewing: asyncio.Task[None]) -> None:
        await tasks.end(renewing)
        await self._if_mine(name, token, 0)

    async def _if_mine(self, name: bytes, token: bytes, ms: int) -> None:
        if self._second is None:
            return
        try:
            await self._second.run(name, "EVAL", _MINE, 1, name, token, ms)
        except (RedisError, OSError) as error:
            logger.debug("a lease could not be renewed or given back: %s", error)

    def stats(self) -> dict[str, float]:
        """Computations spared by another gateway's, and those that wait for one."""
        return {
            "leases_total": self.taken,
            "lease_recomputes_avoided_total": self._avoided,
            "lease_waiting": self._waiting,
        }
