"""What tests share: real servers and a real model for the session, and a check that nothing outlives it."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import psutil
import pytest
from made_databases import made_databases
from valkeys import ValkeyCluster

from services.data_dir import DataDir
from services.servers.child import free_port as choose_port
from services.supervisor import Supervisor

T = TypeVar("T")

MODEL_DIRECTORY = Path(__file__).parent.parent / "build" / "test-model"

#: Inherited by every process a test starts, however far down; the session-end check looks for it.
MARK = f"TEST_SESSION_{uuid4().hex}"

# Supervisors are tested in a process that has gRPC clients too, and gRPC would crash a child now and then.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# A shell's background job is born deaf to Ctrl-C, and so would be everything that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fails the session when a process that a test started outlives it, and ends that process.

    Set up before every other session fixture, so it looks after they are all torn down.
    """
    os.environ[MARK] = "1"
    yield
    del os.environ[MARK]
    left = [process for process in psutil.process_iter() if _started_by_a_test(process)]
    _, alive = psutil.wait_procs(left, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive, f"processes left behind: {alive}"


def _started_by_a_test(process: psutil.Process) -> bool:
    try:
        # A child that ended but was never waited for has no environment left to look at.
        mine = process.ppid() == os.getpid() or MARK in process.environ()
        return mine and process.pid != os.getpid()
    except psutil.Error:
        return False


class SessionServers:
    """A supervisor on an event loop of its own, as tests come and go with theirs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data_dir = DataDir.open(path, release="test")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="session-servers", daemon=True)
        self._thread.start()
        self.supervisor = Supervisor(self._data_dir)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=150)

    def close(self) -> None:
        self.run(self.supervisor.stop())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._data_dir.close()


@pytest.fixture(scope="session")
def session_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionServers]:
    servers = SessionServers(tmp_path_factory.mktemp("servers") / "data")
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def postgres_url(session_servers: SessionServers) -> str:
    """A Postgres for the session; make a schema or database of your own in it."""
    return session_servers.run(session_servers.supervisor.start_postgres())


@pytest.fixture
def make_database(postgres_url: str) -> Iterator[Callable[..., str]]:
    """Makes databases in it, gone after the test; gives their URLs."""
    with made_databases(postgres_url) as make:
        yield make


@pytest.fixture(scope="session")
def valkey_url(session_servers: SessionServers) -> str:
    """A Valkey for the session, 64 MiB."""
    return session_servers.run(session_servers.supervisor.start_valkey(maxmemory_bytes=64 * 1024 * 1024))


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Cluster of three Valkeys for the session."""
    cluster = ValkeyCluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster.url
    finally:
        cluster.kill()


@pytest.fixture(params=["standalone", "cluster"])
def redis_url(request: pytest.FixtureRequest) -> str:
    """Either kind of second tier, as a setting names it."""
    url: str = request.getfixturevalue("valkey_url" if request.param == "standalone" else "cluster_url")
    return url


@pytest.fixture(scope="session")
def made_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed data directory in which Postgres has been made; to be copied, as making one takes seconds."""
    servers = SessionServers(tmp_path_factory.mktemp("made") / "data")
    try:
        servers.run(servers.supervisor.start_postgres())
    finally:
        servers.close()
    return servers.path


@pytest.fixture
def data_path(made_data_dir: Path, tmp_path: Path) -> Path:
    """A test's own data directory, in which Postgres has been made."""
    # cp keeps owners, who under root are not root.
    subprocess.run(["cp", "-a", made_data_dir, tmp_path / "data"], check=True)
    return tmp_path / "data"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The directory in which the default model is built; kept between sessions, as building takes a while."""
    from index_builder.models.build import ensure_model

    ensure_model(MODEL_DIRECTORY)
    return MODEL_DIRECTORY


@pytest.fixture
def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    return choose_port(random.Random())
