"""Reads from Redis, gathered: what all callers ask in one tick of the event loop is one MGET.

While all lanes are busy the next batch stays open and gathers on, so a slow server gets fewer, larger
MGETs, not more of them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from services import tasks
from services.cache.background import start
from services.cache.frame import unseal
from services.cache.health import Health
from services.cache.server import Server
from services.telemetry import stage

#: Keys of one MGET; more would hold up everyone behind it.
MAX_BATCH_KEYS = 512
#: MGETs under way at once: one on the wire while the last one's answer is parsed.
LANES = 2

Values = Mapping[bytes, bytes]
NOTHING: Values = {}

_REDIS = stage("redis")


class _Batch:
    """One MGET's keys, and the callers who wait for it."""

    def __init__(self, timeout_s: float, on_timeout: Callable[["_Batch"], None]) -> None:
        self.keys: dict[bytes, None] = {}
        self.waiters: list[asyncio.Future[Values]] = []
        #: The callers have their answer, and the breaker its verdict.
        self.settled = False
        self._timer = asyncio.get_running_loop().call_later(timeout_s, on_timeout, self)

    def settle(self, values: Values) -> None:
        """Answers every caller; the first time only."""
        if self.settled:
            return
        self.settled = True
        self._timer.cancel()
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(values)


class Reads:
    """Values from Redis within `op_timeout_ms`, or nothing; never an error.

    `on_value` gets every value that came, once, also when its callers had already gone. At most
    `max_pending` keys wait; beyond that keys are not looked up.
    """

    def __init__(
        self,
        server: Server,
        health: Health,
        on_value: Callable[[bytes, bytes], None],
        *,
        op_timeout_ms: int,
        max_pending: int,
    ) -> None:
        self._server = server
        self._health = health
        self._on_value = on_value
        self._op_timeout_ms = op_timeout_ms
        self._max_pending = max_pending
        #: Not yet on the wire; only the last one still takes keys.
        self._waiting: deque[_Batch] = deque()
        self._waiting_keys = 0
        self._lanes: set[asyncio.Task[None]] = set()
        self._dispatch_is_due = False
        self._closed = False
        self.hits = 0
        self.misses = 0
        self.corrupt = 0
        self.shed = 0
        self.batches = 0

    async def fetch(self, keys: Sequence[bytes]) -> Values:
        """The values that Redis holds of these keys, by key."""
        if self._closed or not self._health.allows:
            return NOTHING
        if self._waiting_keys + len(keys) > self._max_pending:
            self.shed += len(keys)
            return NOTHING
        began_s = time.perf_counter()
        try:
            return await self._joined(keys)
        finally:
            _REDIS.took(time.perf_counter() - began_s)

    async def _joined(self, keys: Sequence[bytes]) -> Values:
        """The values, of one batch or of several."""
        if len(keys) <= MAX_BATCH_KEYS:
            return await self._join(keys)
        waiters = [self._join(keys[i : i + MAX_BATCH_KEYS]) for i in range(0, len(keys), MAX_BATCH_KEYS)]
        values: dict[bytes, bytes] = {}
        for waiter in waiters:
            values.update(await waiter)
        return values

    def _join(self, keys: Sequence[bytes]) -> asyncio.Future[Values]:
        """A place in the open batch, or in a new one where these keys do not fit."""
        loop = asyncio.get_running_loop()
        batch = self._waiting[-1] if self._waiting else None
        if batch is None or len(batch.keys) + len(keys) > MAX_BATCH_KEYS:
            batch = _Batch(self._op_timeout_ms / 1000, self._expire)
            self._waiting.append(batch)
        before = len(batch.keys)
        batch.keys.update(dict.fromkeys(keys))
        self._waiting_keys += len(batch.keys) - before
        waiter: asyncio.Future[Values] = loop.create_future()
        batch.waiters.append(waiter)
        if not self._dispatch_is_due:
            self._dispatch_is_due = True
            loop.call_soon(self._dispatch)
        return waiter

    def _dispatch(self) -> None:
        """At the end of the tick, and whenever a lane is free again."""
        self._dispatch_is_due = False
        while self._waiting and len(self._lanes) < LANES:
            batch = self._waiting.popleft()
            self._waiting_keys -= len(batch.keys)
            lane = start(self._ask(batch))
            self._lanes.add(lane)
            lane.add_done_callback(self._free)

    def _free(self, lane: asyncio.Task[None]) -> None:
        self._lanes.discard(lane)
        self._dispatch()

    def _expire(self, batch: _Batch) -> None:
        """Its time is up, on the wire or still waiting for a lane."""
        if batch in self._waiting:
            self._waiting.remove(batch)
            self._waiting_keys -= len(batch.keys)
        batch.settle(NOTHING)
        self._health.failed(TimeoutError(f"no answer within {self._op_timeout_ms} ms"))

    async def _ask(self, batch: _Batch) -> None:
        """One MGET; a late answer still fills L1, but its callers and its verdict are gone."""
        try:
            values = await self._mget(list(batch.keys))
        except Exception as error:  # whatever went wrong, to the callers it is a miss
            if not batch.settled:
                self._health.failed(error)
        else:
            if not batch.settled:
                self._health.succeeded()
            batch.settle(values)
        finally:
            batch.settle(NOTHING)

    async def _mget(self, keys: list[bytes]) -> Values:
        self.batches += 1
        values = {}
        for key, data in zip(keys, await self._server.get(keys), strict=True):
            if not isinstance(data, bytes):  # nothing, or a refusal of this one key
                self.misses += 1
            elif (value := unseal(data)) is None:
                self.misses += 1
                self.corrupt += 1
            else:
                self.hits += 1
                values[key] = value
                self._on_value(key, value)
        return values

    async def close(self) -> None:
        """Ends the MGETs under way; their callers, and all later ones, get misses."""
        self._closed = True
        while self._waiting:
            self._waiting.pop().settle(NOTHING)
        self._waiting_keys = 0
        await tasks.end(*self._lanes)
