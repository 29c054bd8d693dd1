"""The service under load with its own Postgres and Valkey, each reached through a proxy that can be slow.

So a fault can be put anywhere: a server killed (its supervisor starts it again), a process stopped for a
while, a network that delays.
"""

import asyncio
import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import psutil

from loadtests.drive.proxy import SlowProxy
from loadtests.drive.scenario import Fault
from loadtests.service import Service, new_data_dir
from ringfort import __version__
from services.data_dir import DataDir
from services.supervisor import Supervisor

T = TypeVar("T")

_CACHE_BYTES = 256 * 1024 * 1024
#: What their processes are called.
_PROCESSES = {"postgres": "postgres", "redis": "valkey-server"}


class House:
    """Servers, proxies and a service on an empty data directory in `directory`; a context manager."""

    def __init__(self, models: Path, directory: Path, **env: str) -> None:
        """`models` holds built models; `env` is the service's."""
        self._models, self._directory, self._env = models, directory, env
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self.service: Service | None = None

    @property
    def grpc(self) -> str:
        """HOST:PORT of the service."""
        return self._running.grpc

    @property
    def http(self) -> str:
        """HOST:PORT of its HTTP face."""
        return self._running.http

    async def fault(self, fault: Fault) -> None:
        """Let it go wrong, and for pauses and delays make it good again after their time."""
        match fault.kind:
            case "kill":
                self._process(fault.target).kill()
            case "pause":
                process = self._process(fault.target)
                family = (
                    [process, *process.children(recursive=True)] if fault.target != "service" else [process]
                )
                await self._paused(family, fault.for_s)
            case "delay":
                proxy = self._proxies[fault.target]
                proxy.delay_s = fault.delay_ms / 1e3
                try:
                    await asyncio.sleep(fault.for_s)
                finally:
                    proxy.delay_s = 0.0

    def delay(self, target: str, delay_ms: float) -> None:
        """Add that much to each way of `postgres` or `redis` from now on."""
        self._proxies[target].delay_s = delay_ms / 1e3

    @property
    def pid(self) -> int:
        """The service's process."""
        return self._running.pid

    def __enter__(self) -> "House":
        self._thread = threading.Thread(target=self._loop.run_forever, name="house", daemon=True)
        self._thread.start()
        try:
            postgres_url, redis_url = self._run(self._open())
            data_dir = new_data_dir(self._directory / "data", self._models, release=__version__)
            urls = {
                "RINGFORT_METADATA__POSTGRES_URL": postgres_url,
                "RINGFORT_CACHE__REDIS_URL": redis_url,
            }
            self.service = Service(data_dir, env=urls | self._env)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def _open(self) -> tuple[str, str]:
        data_dir = DataDir.open(self._directory / "servers", release=__version__)
        self._stack.callback(data_dir.close)
        supervisor = Supervisor(data_dir)
        self._stack.push_async_callback(supervisor.stop)
        await supervisor.end_orphans()
        urls = {
            "postgres": await supervisor.start_postgres(),
            "redis": await supervisor.start_valkey(maxmemory_bytes=_CACHE_BYTES),
        }
        self._proxies: dict[str, SlowProxy] = {}
        for name, url in urls.items():
            parts = urlsplit(url)
            proxy = SlowProxy(str(parts.hostname), int(parts.port or 0))
            self._proxies[name] = await self._stack.enter_async_context(proxy)
            user, at, _ = parts.netloc.rpartition("@")
            urls[name] = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}"))
        return urls["postgres"], urls["redis"]

    def _close(self) -> None:
        try:
            if self.service is not None:
                self.service.stop()
        finally:
            self._run(self._stack.aclose())
            self._run(self._loop.shutdown_default_executor())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(300)

    @property
    def _running(self) -> Service:
        assert self.service is not None, "a house is entered before it is used"
        return self.service

    def _process(self, target: str) -> psutil.Process:
        """The process of a target: the service, or the server that was started for it."""
        if target == "service":
            return psutil.Process(self.pid)
        # By where it works: this process may have started others of the kind.
        home = (self._directory / "servers").resolve()
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it was there a moment ago
                if process.name() == _PROCESSES[target] and Path(process.cwd()).is_relative_to(home):
                    return process
        raise LookupError(f"no {target} runs here")

    @staticmethod
    async def _paused(family: list[psutil.Process], for_s: float) -> None:
        stopped: list[int] = []
        try:
            for process in family:
                os.kill(process.pid, signal.SIGSTOP)
                stopped.append(process.pid)
            await asyncio.sleep(for_s)
        finally:
            for pid in stopped:
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass


def scratch(directory: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder of its own in `directory`, on its disk, gone afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="drive-", dir=directory, ignore_cleanup_errors=True)
