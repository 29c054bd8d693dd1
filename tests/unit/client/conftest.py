"""A fake service, and both clients behind one face."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from client_fakes import FakeService

from ringfort import AsyncClient, Client


@pytest.fixture
def fake() -> Iterator[FakeService]:
    service = FakeService()
    yield service
    service.stop()


class Awaited:
    """An AsyncClient whose every method is awaited to its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._make(*args, **kwargs))

    async def _make(self, *args: Any, **kwargs: Any) -> AsyncClient:
        return AsyncClient(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            return self._runner.run(self._listed(made) if hasattr(made, "__aiter__") else made)

        return call

    async def _listed(self, stream: Any) -> list[Any]:
        return [each async for each in stream]

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest, fake: FakeService) -> Iterator[Any]:
    """Makes a client of either kind to the fake service."""
    clients: list[Any] = []

    def connect(**kwargs: Any) -> Any:
        clients.append(request.param(fake.address, **kwargs))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Any) -> Any:
    return connect(timeout_s=10)
