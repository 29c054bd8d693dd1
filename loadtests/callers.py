"""Callers of a service on one event loop, as an application would have them."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2

from loadtests.timing import Load
from ringfort import AsyncClient
from ringfort.together import EMBED_TOGETHER

T = TypeVar("T")

_NOTHING = health_pb2.HealthCheckRequest()


class Callers:
    """One client process's share of a load: the real client, and a bare channel beside it."""

    client: AsyncClient
    #: For calls measured without the client's own work.
    channel: grpc.aio.Channel

    def __init__(self, server: str, *, embed_together: int = EMBED_TOGETHER) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._server, self._embed_together = server, embed_together

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the callers' event loop."""
        return self._runner.run(work)

    def load(self, callers: int, seconds: float, call: Callable[[int], Awaitable[object]]) -> Load:
        """So many callers, each calling again as soon as it is answered; the argument numbers the calls."""
        return self.run(_closed_loop(callers, itertools.count(), seconds, call))

    def calls(self, callers: int, count: int, call: Callable[[int], Awaitable[object]]) -> Load:
        """The same until so many calls have been made."""
        return self.run(_closed_loop(callers, iter(range(count)), None, call))

    async def nothing(self, _: int) -> object:
        """An empty call of the same server: what no call can cost less than."""
        return await self._check(_NOTHING)

    def __enter__(self) -> "Callers":
        async def connect() -> None:
            self.client = AsyncClient(self._server, embed_together=self._embed_together)
            self.channel = grpc.aio.insecure_channel(self._server)
            self._check = self.channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )

        self.run(connect())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def disconnect() -> None:
            await self.client.close()
            await self.channel.close()

        self.run(disconnect())
        self._runner.close()


async def _closed_loop(
    callers: int,
    numbers: Iterator[int],
    seconds: float | None,
    call: Callable[[int], Awaitable[object]],
) -> Load:
    latencies_ms: list[float] = []
    first = time.perf_counter()

    async def caller() -> None:
        now = time.perf_counter()
        for number in numbers:
            await call(number)
            began, now = now, time.perf_counter()
            latencies_ms.append((now - began) * 1e3)
            if seconds is not None and now >= first + seconds:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return Load(time.perf_counter() - first, latencies_ms)
