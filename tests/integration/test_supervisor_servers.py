"""The supervisor and both servers: started, killed, in each other's way, and stopped at any moment."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.data_dir import DataDir, StartupError
from services.servers.postgres import PostgresServer
from services.servers.valkey import ValkeyServer
from services.supervisor import Supervisor, backoff_s

MIB = 1024 * 1024
NAMES = ["postgres", "valkey"]
SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
print("up", flush=True)
time.sleep(60)
"""


class House:
    """A supervisor with what it reported, and how its servers are started and asked."""

    def __init__(self, path: Path) -> None:
        self.data_dir = DataDir.open(path, release="test")
        self.changes: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            self.data_dir, on_change=lambda name, state: self.changes.append((name, state))
        )

    async def start(self, name: str) -> str:
        if name == "postgres":
            return await self.supervisor.start_postgres()
        return await self.supervisor.start_valkey(maxmemory_bytes=32 * MIB)

    async def close(self) -> None:
        await self.supervisor.stop()
        self.data_dir.close()

    def process(self, name: str) -> psutil.Process:
        (found,) = [p for p in psutil.Process().children() if Path(p.cwd()).is_relative_to(self.home(name))]
        return found

    def home(self, name: str) -> Path:
        return self.data_dir.path / name


@pytest.fixture
async def house(data_path: Path) -> AsyncIterator[House]:
    house = House(data_path)
    yield house
    await house.close()
    assert working_below(data_path) == []


#: Children of the session's own when the test began: servers that other tests share.
_before: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def _children_before() -> None:
    _before.clear()
    _before.update(psutil.Process().children())


def new_children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in _before]


def working_below(path: Path) -> list[psutil.Process]:
    """Every process whose working directory is below the path: servers and what they started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(path):
                found.append(process)
    return found


async def answers(url: str) -> bool:
    try:
        if url.startswith("postgresql:"):
            async with await psycopg.AsyncConnection.connect(url, connect_timeout=5):
                return True
        async with Redis.from_url(url) as client:
            return bool(await client.ping())
    except (psycopg.OperationalError, RedisError, OSError):
        return False


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


@pytest.mark.parametrize("name", NAMES)
async def test_a_server_answers_at_its_url_until_stopped(house: House, name: str) -> None:
    assert house.supervisor.state() == {}
    url = await house.start(name)
    assert await answers(url)
    assert house.supervisor.state() == {name: "running"}
    assert house.supervisor.stats() == {f"{name}_up": 1.0, f"{name}_restarts_total": 0.0}
    await house.supervisor.stop()
    assert not await answers(url)
    assert house.supervisor.state() == {name: "stopped"}
    assert house.changes == [(name, "running"), (name, "stopped")]
    await house.supervisor.stop()
    with pytest.raises(StartupError, match="the service is stopping"):
        await house.start(name)


@pytest.mark.parametrize("name", NAMES)
async def test_a_killed_server_comes_back_on_its_port(
    house: House, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = await house.start(name)
    for times in (1, 2):
        house.process(name).kill()
        await until(partial(running_again, house, name, times))
        assert await answers(url)
    assert house.changes == [(name, "running")] + [(name, "restarting"), (name, "running")] * 2
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"{name} was killed by signal 9; starting it again", f"{name} is running again"] * 2


async def test_a_server_that_keeps_dying_is_started_less_and_less_eagerly(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []
    monkeypatch.setattr("services.supervisor.backoff_s", lambda n: failures.append(n) or 0.0)
    await house.start("valkey")
    for times in (1, 2, 3):
        house.process("valkey").kill()
        await until(partial(running_again, house, "valkey", times))
    assert failures == [0, 1, 2]


async def running_again(house: House, name: str, times: int) -> bool:
    return house.supervisor.stats() == {f"{name}_up": 1.0, f"{name}_restarts_total": float(times)}


@pytest.mark.parametrize("name", NAMES)
async def test_a_server_whose_port_was_taken_meanwhile_waits_for_it(house: House, name: str) -> None:
    url = await house.start(name)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        house.process(name).terminate()
        await until(lambda: bound(stranger, port_of(url)))
        stranger.listen()
        await until(lambda: state_is(house, name, "restarting"))
        await asyncio.sleep(0.3)
        assert house.supervisor.state() == {name: "restarting"}
    await until(lambda: state_is(house, name, "running"))
    assert await answers(url)


async def bound(listener: socket.socket, port: int) -> bool:
    with contextlib.suppress(OSError):
        listener.bind(("127.0.0.1", port))
        return True
    return False


async def state_is(house: House, name: str, state: str) -> bool:
    return house.supervisor.state() == {name: state}


@pytest.mark.parametrize("name", NAMES)
async def test_a_port_that_is_taken_at_the_start_is_given_up(
    house: House, name: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        ports = iter([taken, free_port])
        monkeypatch.setattr("services.supervisor.free_port", lambda random: next(ports))
        url = await house.start(name)
        assert port_of(url) != taken
        assert await answers(url)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state", ["running", "restarting"])
async def test_a_server_that_will_not_end_is_killed(
    house: House, name: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresServer, "grace_s", 0.2)
    monkeypatch.setattr(ValkeyServer, "grace_s", 0.2)
    await house.start(name)
    if state == "restarting":
        house.process(name).kill()
        await until(lambda: state_is(house, name, "restarting"))
        await until(lambda: there_is_one(house, name))
    house.process(name).suspend()
    async with asyncio.timeout(10):
        await house.supervisor.stop()
    assert new_children() == []
    assert house.supervisor.state() == {name: "stopped"}


@pytest.mark.parametrize("name", NAMES)
async def test_a_cancelled_wait_for_a_slow_server_ends_it(
    house: House, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresServer, "grace_s", 0.2)
    monkeypatch.setattr(ValkeyServer, "grace_s", 0.2)
    start = asyncio.create_task(house.start(name))
    await until(partial(there_is_one, house, name))
    house.process(name).suspend()
    assert await asyncio.wait({start}, timeout=0.3) == (set(), {start})
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert new_children() == []


async def there_is_one(house: House, name: str) -> bool:
    with contextlib.suppress(ValueError, psutil.Error):
        return house.process(name).is_running()
    return False


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_start_cut_short_at_any_moment_leaves_nothing(
    runner: asyncio.Runner, tmp_path: Path, how: str
) -> None:
    async def cut_short(path: Path, after_s: float) -> None:
        house = House(path)
        starts = [asyncio.create_task(house.start(name)) for name in NAMES]
        await asyncio.sleep(after_s)
        if how == "cancel":
            for start in starts:
                start.cancel()
        else:
            await house.supervisor.stop()
        outcomes = await asyncio.gather(*starts, return_exceptions=True)
        for outcome in outcomes:
            assert isinstance(outcome, str | (StartupError if how == "stop" else asyncio.CancelledError))
        if how == "cancel":
            started = [outcome for outcome in outcomes if isinstance(outcome, str)]
            assert len(new_children()) == len(started)
        await house.close()

    for after_ms in (0, 10, 40, 120, 300):
        runner.run(cut_short(tmp_path / "data", after_ms / 1000))
        assert new_children() == []
        assert working_below(tmp_path) == []

    async def whole() -> None:
        house = House(tmp_path / "data")
        assert all([await answers(await house.start(name)) for name in NAMES])
        await house.close()

    runner.run(whole())


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_library_that_loses_a_cancellation_keeps_no_start_from_ending(
    house: House, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    lost: list[asyncio.CancelledError] = []

    async def answers_like_python_3_11(server: ValkeyServer, port: int) -> bool:
        asked.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as cancellation:
            lost.append(cancellation)
            if len(lost) > 2:
                raise
        return False

    monkeypatch.setattr(ValkeyServer, "answers", answers_like_python_3_11)
    starting = asyncio.create_task(house.start("valkey"))
    await asked.wait()
    async with asyncio.timeout(30):
        if how == "cancel":
            starting.cancel()
        else:
            await house.supervisor.stop()
        with pytest.raises(StartupError if how == "stop" else asyncio.CancelledError):
            await starting
    assert new_children() == []


async def test_servers_are_out_of_reach_of_the_terminal_and_of_other_machines(house: House) -> None:
    urls = [await house.start(name) for name in NAMES]
    listening = set()
    for name in NAMES:
        process = house.process(name)
        assert os.getsid(process.pid) == process.pid
        listening |= {
            connection.laddr for connection in process.net_connections() if connection.status == "LISTEN"
        }
    assert listening == {("127.0.0.1", port_of(url)) for url in urls}


async def test_passwords_are_on_no_command_line_and_in_no_environment(house: House) -> None:
    for name in NAMES:
        await house.start(name)
    for name in NAMES:
        password = house.data_dir.secrets.password(name)
        for process in working_below(house.data_dir.path):
            assert password not in " ".join(process.cmdline())
            assert password not in str(process.environ())


async def test_a_wrong_password_is_refused(house: House) -> None:
    for name in NAMES:
        url = await house.start(name)
        assert not await answers(url.replace(house.data_dir.secrets.password(name), "guess"))


def test_backoff_doubles_to_its_bound() -> None:
    assert [backoff_s(failures) for failures in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff_s(10_000) == 5.0


async def test_orphans_of_a_killed_owner_are_ended_once_for_both(house: House) -> None:
    sleeper = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SLEEPER, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert sleeper.stdout is not None
    await sleeper.stdout.readline()
    house.data_dir.record_child("valkey", sleeper.pid)
    house.data_dir.close()
    house.data_dir = DataDir.open(house.data_dir.path, release="test")
    house.supervisor = Supervisor(house.data_dir)
    urls = await asyncio.gather(*(house.start(name) for name in NAMES))
    assert await sleeper.wait() == 7
    assert all([await answers(url) for url in urls])
