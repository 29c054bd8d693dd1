"""Runs Postgres and Valkey as our children: started, watched, restarted, and ended with us."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from random import Random
from typing import Any, TypeVar

from services import tasks
from services.data_dir import DataDir, StartupError, unusable
from services.servers.child import Child, Command, Server, free_port
from services.servers.postgres import PostgresServer
from services.servers.valkey import ValkeyServer

T = TypeVar("T")

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_MAX_POLL_S = 0.25
#: Room for a crash recovery of all of `max_wal_size`.
_START_LIMIT_S = 300.0
_START_TRIES = 5
_TIDY_EVERY_S = 60.0
#: A child that lived this long did not die of its start; its next restart is again an early one.
_STEADY_S = 30.0


class ServerEndedError(StartupError):
    """A server process ended unasked."""

    def __init__(self, name: str, status: int, last_words: str) -> None:
        if status < 0:
            how = f"was killed by signal {-status}"
        else:
            how = f"ended with status {status}" + (f", saying: {last_words}" if last_words else "")
        super().__init__(f"{name} {how}")
        self.name, self.status = name, status


def backoff_s(failures: int) -> float:
    """Seconds to wait before the restart after so many failed ones: 0.2, doubling, at most 5."""
    return float(min(0.2 * 2 ** min(failures, 10), 5.0))


class Supervisor:
    """Keeps the servers of one data directory running until `stop()`.

    A server that dies unasked is started again on the same port, so clients only have to reconnect.
    `on_change(name, state)` hears every change of `state()`, on the event loop.
    """

    def __init__(
        self,
        data_dir: DataDir,
        *,
        on_change: Callable[[str, str], None] | None = None,
        random: Random | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._on_change = on_change
        self._random = random or Random()
        self._states: dict[str, str] = {}
        #: Every process not yet reaped, by id; `stop()` ends them whatever else happened.
        self._children: dict[int, Child] = {}
        #: Starts under way and watches; processes are spawned in these tasks only.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending_orphans = asyncio.Lock()
        self._restarts: Counter[str] = Counter()
        self._stopping = False

    async def start_postgres(self) -> str:
        """The URL of our Postgres, which answers by then; made first when the directory has none."""
        return await self._start(PostgresServer)

    async def start_valkey(self, *, maxmemory_bytes: int) -> str:
        """The URL of our Valkey, which answers by then and holds at most so many bytes."""
        return await self._start(partial(ValkeyServer, maxmemory_bytes=maxmemory_bytes))

    async def end_orphans(self) -> None:
        """Ends what a previous owner of the directory left running; every start begins with it."""
        async with self._ending_orphans:
            orphans = await _to_its_end(asyncio.to_thread(self._data_dir.end_orphans))
        for name in orphans:
            logger.warning("ended %s, which a previous owner of %s left running", name, self._data_dir.path)

    def state(self) -> dict[str, str]:
        """Every server started so far: "running", "restarting" or "stopped"."""
        return dict(self._states)

    def stats(self) -> dict[str, float]:
        """For every server started so far, whether it is up (1 or 0) and how often it was restarted."""
        up = {f"{name}_up": float(state == "running") for name, state in self._states.items()}
        return up | {f"{name}_restarts_total": float(self._restarts[name]) for name in self._states}

    async def stop(self) -> None:
        """Ends every child and reaps it, whatever was going on; calling it again is fine."""
        self._stopping = True
        while begun := list(self._tasks):
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
        await asyncio.gather(*(self._end(child) for child in list(self._children.values())))
        for name in self._states:
            self._set_state(name, "stopped")

    async def _start(self, make: Callable[[DataDir], Server]) -> str:
        """Starts a server in a task of ours, so that `stop()` can cut it short from anywhere."""
        self._require_not_stopping()
        try:
            task = self._keep(self._bring_up(make(self._data_dir)))
            return await task
        except OSError as error:
            raise unusable(self._data_dir.path, error) from error
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise StartupError("stopped while starting") from None

    async def _bring_up(self, server: Server) -> str:
        await self.end_orphans()
        await self._set_up(server)
        for attempt in range(_START_TRIES):
            port = free_port(self._random)
            try:
                child = await self._launch(server, port)
                break
            except ServerEndedError as error:
                # Its port may be taken meanwhile, or the last of a killed server still be going away.
                if attempt == _START_TRIES - 1:
                    raise
                logger.warning("%s; trying again", error)
                await asyncio.sleep(backoff_s(attempt))
        self._set_state(server.name, "running")
        watch = self._keep(self._watch(server, port, child))
        watch.add_done_callback(partial(self._watch_ended, server.name))
        return server.url(port)

    async def _set_up(self, server: Server) -> None:
        command = await _to_its_end(asyncio.to_thread(server.setup))
        if command is None:
            return
        child = await self._spawn(f"{server.name} setup", command, server.grace_s)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                status = await child.wait()
        except TimeoutError:
            raise StartupError(f"{server.name} could not be set up in {_START_LIMIT_S:.0f} s") from None
        finally:
            await self._end(child)
        if status != 0:
            raise StartupError(f"{server.name} could not be set up: {server.last_words() or status}")
        server.setup_done()

    async def _launch(self, server: Server, port: int) -> Child:
        """A running child that answers on the port; on any other way out it has been ended."""
        command = await _to_its_end(asyncio.to_thread(server.command, port))
        child = await self._spawn(server.name, command, server.grace_s)
        ready = asyncio.ensure_future(_until_it_answers(server, port))
        ended = asyncio.ensure_future(child.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=_START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ServerEndedError(server.name, ended.result(), server.last_words())
            if not ready.done():
                raise StartupError(f"{server.name} did not answer within {_START_LIMIT_S:.0f} s")
            ready.result()
            return child
        except BaseException:
            await self._end(child)
            raise
        finally:
            await tasks.end(ready, ended)

    async def _watch(self, server: Server, port: int, child: Child) -> None:
        """Starts the server again whenever it ends, until cancelled."""
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            since_s = clock()
            status = await self._ended(server, child)
            await self._end(child)
            if clock() - since_s >= _STEADY_S:
                failures = 0
            self._set_state(server.name, "restarting")
            logger.error("%s; starting it again", ServerEndedError(server.name, status, server.last_words()))
            child = await self._relaunch(server, port, failures)
            failures += 1
            self._restarts[server.name] += 1
            self._set_state(server.name, "running")
            logger.warning("%s is running again", server.name)

    async def _relaunch(self, server: Server, port: int, failures: int) -> Child:
        while True:
            await asyncio.sleep(backoff_s(failures))
            failures += 1
            try:
                return await self._launch(server, port)
            except StartupError as error:
                logger.error("%s", error)
            except Exception:
                logger.exception("%s could not be started again", server.name)

    async def _ended(self, server: Server, child: Child) -> int:
        """The child's exit status, once it has ended; keeps its logs tidy until then."""
        while True:
            try:
                async with asyncio.timeout(_TIDY_EVERY_S):
                    return await child.wait()
            except TimeoutError:
                try:
                    await _to_its_end(asyncio.to_thread(server.tidy_logs))
                except OSError as error:
                    logger.warning("the logs of %s cannot be kept in bounds: %s", server.name, error)

    def _watch_ended(self, name: str, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled() and watch.exception():
            logger.error("%s is no longer watched", name, exc_info=watch.exception())
            self._set_state(name, "stopped")

    async def _spawn(self, name: str, command: Command, grace_s: float) -> Child:
        self._require_not_stopping()
        spawning = asyncio.ensure_future(self._spawn_recorded(name, command, grace_s))
        try:
            return await _to_its_end(spawning)
        except asyncio.CancelledError:
            # uvloop, when cancelled here, would leave the process running and unknown.
            if spawning.exception() is None:
                await self._end(spawning.result())
            raise

    async def _spawn_recorded(self, name: str, command: Command, grace_s: float) -> Child:
        child = await Child.spawn(name, command, grace_s)
        self._children[child.pid] = child
        self._data_dir.record_child(name, child.pid)
        return child

    async def _end(self, child: Child) -> None:
        await child.end()
        if self._children.pop(child.pid, None) is not None:
            self._data_dir.forget_child(child.name)

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _require_not_stopping(self) -> None:
        if self._stopping:
            raise StartupError("the service is stopping")

    def _set_state(self, name: str, state: str) -> None:
        if self._states.get(name) != state:
            self._states[name] = state
            if self._on_change is not None:
                self._on_change(name, state)


async def _until_it_answers(server: Server, port: int) -> None:
    pause_s = _POLL_S
    while not await server.answers(port):
        await asyncio.sleep(pause_s)
        # Asked all through a long recovery, Postgres would log each refusal.
        pause_s = min(pause_s * 1.1, _MAX_POLL_S)


async def _to_its_end(work: Awaitable[T]) -> T:
    """The work's result; cancelled meanwhile, it still waits until the work is done."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
