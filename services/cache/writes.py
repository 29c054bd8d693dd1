"""Writes to Redis, behind the callers' backs: a bounded queue and one task that pipelines SETs.

A cache may lose a write, never delay a caller: what does not fit, and what is queued when Redis goes
away, is dropped and counted. Nothing is kept for its return, so there is no backlog to storm it with.
"""

import asyncio
import logging
from typing import NamedTuple

from services.cache.frame import seal
from services.cache.health import Health
from services.cache.server import Command, Server

logger = logging.getLogger(__name__)

#: One pipeline; packing it takes about a millisecond of the event loop.
MAX_BATCH_KEYS = 64
MAX_BATCH_BYTES = 512 * 1024
#: A larger value would hold up everyone behind it, when written and each time it is read.
MAX_VALUE_BYTES = 1024 * 1024
MAX_PENDING_BYTES = 32 * 1024 * 1024
#: How long the first write waits for company: a pipeline of one costs the event loop as much as one of ten.
GATHER_S = 0.01


class _Write(NamedTuple):
    payload: bytes
    ttl_ms: int | None


class Writes:
    """Takes values at once and writes them soon; of two of the same key, the later."""

    def __init__(self, server: Server, health: Health, *, max_pending: int, give_up_ms: int) -> None:
        self._server = server
        self._health = health
        self._max_pending = max_pending
        #: When a pipeline is given up as a whole.
        self._give_up_ms = give_up_ms
        #: In order of arrival; sum of payloads at most MAX_PENDING_BYTES.
        self._pending: dict[bytes, _Write] = {}
        self._pending_bytes = 0
        self._offered = asyncio.Event()
        self._finishing = False
        self.written = 0
        self.dropped = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._pending)

    def offer(self, key: bytes, payload: bytes, ttl_s: float | None) -> None:
        """Queue one value; `ttl_s` None keeps it until Redis needs the room."""
        replaced = self._pending.get(key)
        grown_bytes = self._pending_bytes + len(payload) - (len(replaced.payload) if replaced else 0)
        if (
            self._finishing
            or not self._health.allows
            or len(payload) > MAX_VALUE_BYTES
            or grown_bytes > MAX_PENDING_BYTES
            or (replaced is None and len(self._pending) >= self._max_pending)
        ):
            self.dropped += 1
            return
        self._pending[key] = _Write(payload, None if ttl_s is None else max(1, round(ttl_s * 1000)))
        self._pending_bytes = grown_bytes
        self._offered.set()

    async def run(self) -> None:
        """Writes what is offered, until `finish`; then what is left."""
        while self._pending or not self._finishing:
            await self._offered.wait()
            if not self._finishing:
                await asyncio.sleep(GATHER_S)
            self._offered.clear()
            while self._pending:
                if not self._health.allows:
                    self._drop_all()
                    break
                await self._write(self._take())

    def finish(self) -> None:
        """Take nothing more; `run` returns once the queue is empty."""
        self._finishing = True
        self._offered.set()

    def _drop_all(self) -> None:
        self.dropped += len(self._pending)
        self._pending.clear()
        self._pending_bytes = 0

    def _take(self) -> dict[bytes, _Write]:
        """The next pipeline's writes, oldest first."""
        batch: dict[bytes, _Write] = {}
        batch_bytes = 0
        for key, write in self._pending.items():
            if len(batch) == MAX_BATCH_KEYS or (batch and batch_bytes + len(write.payload) > MAX_BATCH_BYTES):
                break
            batch[key] = write
            batch_bytes += len(write.payload)
        for key in batch:
            del self._pending[key]
        self._pending_bytes -= batch_bytes
        return batch

    async def _write(self, batch: dict[bytes, _Write]) -> None:
        """One pipeline; a SET that Redis refuses (no memory, read-only) says nothing against its health."""
        commands: list[Command] = [
            ("SET", key, seal(write.payload), *(() if write.ttl_ms is None else ("PX", write.ttl_ms)))
            for key, write in batch.items()
        ]
        try:
            async with asyncio.timeout(self._give_up_ms / 1000):
                replies = await self._server.run(commands)
        except Exception as error:  # whatever went wrong, the writer goes on
            self.dropped += len(batch)
            self._health.failed(error)
            return
        self._health.succeeded()
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        if refused:
            logger.debug("redis refused %d of %d writes: %s", len(refused), len(batch), refused[0])
        self.refused += len(refused)
        self.written += len(batch) - len(refused)
