"""One recompute at a time over all gateways: who computes holds a lease in Redis, the others wait.

A lease is a key with a token, set only where there is none, that expires by itself. Its holder renews it
while it computes, so a holder who dies is replaced within LEASE_MS; one who fails or is cancelled gives it
back at once. Nothing is wrong where two compute: leases save work and guarantee nothing.

Many at once are taken by one command. What is free is computed before anything is waited for, so two who want
each other's never wait in a circle.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
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

#: Takes those leases that are free, for ARGV[2] milliseconds; says 1 of each that is ours now, else 0.
_TAKE = (
    "local ours = {} for i, key in ipairs(KEYS) do "
    "ours[i] = redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0 end return table.concat(ours)"
)
#: Renews (ARGV[2] milliseconds) or gives back (0) those leases that are still ours; of those it says 1.
_MINE = (
    "local ours = {} for i, key in ipairs(KEYS) do "
    "if redis.call('GET', key) ~= ARGV[1] then ours[i] = 0 "
    "elseif ARGV[2] == '0' then ours[i] = redis.call('DEL', key) "
    "else ours[i] = redis.call('PEXPIRE', key, ARGV[2]) end end return table.concat(ours)"
)


class Leases:
    """Computes under leases; without a second tier, or while it is away, just computes."""

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

        async def find_it(_: Sequence[int]) -> Mapping[int, T]:
            found = await find()
            return {} if found is None else {0: found}

        async def make_it(_: Sequence[int]) -> Sequence[T]:
            return [await make()]

        (found,) = await self.run_many([name], find_it, make_it, deadline)
        return found

    async def run_many(
        self,
        names: Sequence[bytes],
        find: Callable[[Sequence[int]], Awaitable[Mapping[int, T]]],
        make: Callable[[Sequence[int]], Awaitable[Sequence[T]]],
        deadline: Deadline,
        *,
        soon: Callable[[T], bool] = lambda made: False,
    ) -> list[T]:
        """For each of the names, no two alike, what another gateway has made or `make` makes here.

        `find` and `make` are given places in `names`; `find` tells of those that are there by now, `make`
        makes all. When it returns it must have published what `find` looks for, or be about to where `soon`
        says so: such a lease is left to run out, as whoever waits looks for the value before the lease.
        """
        token = self._rng.randbytes(16)
        wait = Deadline.after(min(WAIT_S, deadline.left_s() * WAIT_SHARE), deadline.clock)
        there: dict[int, T] = {}
        left = list(range(len(names)))
        pause_s = FIRST_PAUSE_S
        #: Whoever held what is free now may have published since we looked last.
        late = False
        waiting = 0
        try:
            while left:
                ours = await self._take([names[place] for place in left], token)
                free = [place for place, taken in zip(left, ours, strict=True) if taken]
                if free:
                    async with self._held([names[place] for place in free], token) as published:
                        if late:
                            there |= await self._found(find, free)
                            free = [place for place in free if place not in there]
                        made = dict(zip(free, await make(free), strict=True)) if free else {}
                        published([names[place] for place, value in made.items() if soon(value)])
                    there |= made
                left = [place for place in left if place not in there]
                self._waiting += len(left) - waiting
                waiting = len(left)
                if left:
                    await asyncio.sleep(pause_s)
                    there |= await self._found(find, left)
                    pause_s, late = min(2 * pause_s, LONGEST_PAUSE_S), True
                    left = [place for place in left if place not in there]
                if left and wait.left_s() <= 0:
                    there |= zip(left, await make(left), strict=True)
                    left = []
        finally:
            self._waiting -= waiting
        return [there[place] for place in range(len(names))]

    async def close(self) -> None:
        """Waits until what is held here has been given back."""
        if self._returning:
            await asyncio.wait(self._returning)

    async def _found(
        self, find: Callable[[Sequence[int]], Awaitable[Mapping[int, T]]], places: Sequence[int]
    ) -> Mapping[int, T]:
        found = await find(places)
        self._avoided += len(found)
        return found

    async def _take(self, names: Sequence[bytes], token: bytes) -> list[bool]:
        """Which of the leases are ours now; also where there is nobody to ask."""
        if self._second is None:
            return [True] * len(names)
        try:
            replies = await self._second.evaluate(_TAKE, names, token, LEASE_MS)
        except (RedisError, OSError) as error:
            logger.debug("no lease to be had: %s", error)
            return [True] * len(names)
        return [reply == ord("1") for reply in replies]

    @asynccontextmanager
    async def _held(
        self, names: Sequence[bytes], token: bytes
    ) -> AsyncIterator[Callable[[Sequence[bytes]], None]]:
        """Leases are renewed meanwhile, and then given back but for those of which it is told."""
        self.taken += len(names)
        back = dict.fromkeys(names)

        def published(those: Sequence[bytes]) -> None:
            for name in those:
                del back[name]

        renewing = start(self._renew(names, token))
        try:
            yield published
        finally:
            renewing.cancel()
            returning = start(self._give_back(list(back), token, renewing))
            self._returning.add(returning)
            returning.add_done_callback(self._returning.discard)

    async def _renew(self, names: Sequence[bytes], token: bytes) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._if_mine(names, token, LEASE_MS)

    async def _give_back(self, names: Sequence[bytes], token: bytes, renewing: asyncio.Task[None]) -> None:
        await tasks.end(renewing)
        if names:
            await self._if_mine(names, token, 0)

    async def _if_mine(self, names: Sequence[bytes], token: bytes, ms: int) -> None:
        if self._second is None:
            return
        try:
            await self._second.evaluate(_MINE, names, token, ms)
        except (RedisError, OSError) as error:
            logger.debug("leases could not be renewed or given back: %s", error)

    def stats(self) -> dict[str, float]:
        """Computations spared by another gateway's, and those that wait for one."""
        return {
            "leases_total": self.taken,
            "lease_recomputes_avoided_total": self._avoided,
            "lease_waiting": self._waiting,
        }
