"""Single commands to one server, gathered: those of one tick of the event loop are one pipeline."""

import asyncio
from collections import deque
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from services import tasks
from services.cache.background import start
from services.cache.health import Health
from services.cache.server import Command, Server

#: Commands of one pipeline.
MAX_BATCH = 64


class Commands:
    """Replies within the server's operation timeout; at most `max_pending` wait."""

    def __init__(self, server: Server, health: Health, *, max_pending: int) -> None:
        self._server = server
        self._health = health
        self._max_pending = max_pending
        self._pending: deque[tuple[Command, asyncio.Future[Any]]] = deque()
        self._lane: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, *command: Any) -> Any:
        """The reply; RedisError or OSError where there is none, the server is away or too many wait."""
        if self._closed or not self._health.allows or len(self._pending) >= self._max_pending:
            raise RedisConnectionError("redis is away or busy")
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending.append((command, waiter))
        if self._lane is None:
            self._lane = start(self._drain())
        return await waiter

    async def close(self) -> None:
        """Fails what waits, and all that comes later."""
        self._closed = True
        await tasks.end(self._lane)
        self._fail(list(self._pending), RedisConnectionError("the cache is closed"))
        self._pending.clear()

    async def _drain(self) -> None:
        try:
            while self._pending:
                await asyncio.sleep(0)  # for the others of this tick
                await self._send([self._pending.popleft() for _ in range(min(MAX_BATCH, len(self._pending)))])
        finally:
            self._lane = None

    async def _send(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        try:
            replies = await self._server.run([command for command, _ in batch])
        except asyncio.CancelledError:
            self._fail(batch, RedisConnectionError("the cache is closed"))
            raise
        except Exception as error:  # whatever went wrong, nobody is left waiting
            self._health.failed(error)
            self._fail(batch, RedisConnectionError(str(error)))
            return
        self._health.succeeded()
        for (_, waiter), reply in zip(batch, replies, strict=True):
            if waiter.done():
                continue
            if isinstance(reply, ResponseError):
                waiter.set_exception(reply)
            else:
                waiter.set_result(reply)

    @staticmethod
    def _fail(batch: list[tuple[Command, asyncio.Future[Any]]], error: Exception) -> None:
        for _, waiter in batch:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # a caller who left must not turn it into a warning
