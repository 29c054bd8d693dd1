"""A whole owning process, as users run it: killed, interrupted, as root, as another user, as both in turn."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from services.data_dir import DataDir, StartupError

ROOT = Path(__file__).parents[2]
NOBODY_UID = 65534

OWNER = """
import asyncio, json, signal, sys
from pathlib import Path
import psutil, uvloop
from services.data_dir import DataDir, StartupError
from services.supervisor import Supervisor

async def main():
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        data_dir = DataDir.open(Path(sys.argv[1]), release="test")
    except StartupError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    supervisor = Supervisor(data_dir)
    urls = await asyncio.gather(
        supervisor.start_postgres(), supervisor.start_valkey(maxmemory_bytes=1 << 24)
    )
    servers = [[child.pid, child.uids().real] for child in psutil.Process().children()]
    print(json.dumps({"postgres": urls[0], "valkey": urls[1], "servers": servers}), flush=True)
    await stop.wait()
    alive = all(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid, _ in servers)
    print(json.dumps({"alive_at_stop": alive}), flush=True)
    await supervisor.stop()
    data_dir.close()

uvloop.run(main())
"""


class Owner:
    """A running owner: its first line as `said`, its process group its own."""

    def __init__(self, path: Path, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-B", "-c", OWNER, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said = self.hears()

    def hears(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the owner ended with status {self.process.wait()}"
        said: dict[str, Any] = json.loads(line)
        return said

    @property
    def uids(self) -> set[int]:
        return {uid for _, uid in self.said["servers"]}

    def servers_alive(self) -> list[int]:
        return [pid for pid, _ in self.said["servers"] if psutil.pid_exists(pid)]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.hears() == {"alive_at_stop": True}
        assert self.process.wait(30) == 0
        assert self.servers_alive() == []

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.said["postgres"], autocommit=True) as connection:
            cursor = connection.execute(sql)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []


Own = Callable[..., Owner]


@pytest.fixture
def own() -> Iterator[Own]:
    """Starts owners; those a failed test leaves are stopped."""
    owners: list[Owner] = []

    def start(path: Path, prefix: Sequence[str] = ()) -> Owner:
        owners.append(Owner(path, prefix))
        return owners[-1]

    yield start
    for owner in owners:
        if owner.process.poll() is None:
            owner.process.terminate()
            owner.process.wait(30)
        assert owner.process.stdout is not None
        owner.process.stdout.close()


def test_after_a_kill_the_next_owner_ends_the_servers_and_has_every_row(data_path: Path, own: Own) -> None:
    killed = own(data_path)
    with pytest.raises(StartupError, match=f"in use by process {killed.process.pid};"):
        DataDir.open(data_path, release="test")
    killed.query("CREATE TABLE t AS SELECT generate_series(1, 500) AS n")
    killed.process.kill()
    killed.process.wait()
    assert len(killed.servers_alive()) == 2
    heir = own(data_path)
    assert heir.query("SELECT count(*) FROM t") == [(500,)]
    assert set(killed.servers_alive()).isdisjoint(pid for pid, _ in heir.said["servers"])
    assert all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in killed.servers_alive())
    heir.stop()


def test_after_a_kill_of_all_the_next_owner_has_every_row(data_path: Path, own: Own) -> None:
    killed = own(data_path)
    killed.query("CREATE TABLE t AS SELECT generate_series(1, 500) AS n")
    for pid in [killed.process.pid, *(pid for pid, _ in killed.said["servers"])]:
        os.kill(pid, signal.SIGKILL)
    killed.process.wait()
    heir = own(data_path)
    assert heir.query("SELECT count(*) FROM t") == [(500,)]
    heir.stop()


def test_ctrl_c_in_the_terminal_reaches_only_the_owner(data_path: Path, own: Own) -> None:
    owner = own(data_path)
    os.killpg(owner.process.pid, signal.SIGINT)
    assert owner.hears() == {"alive_at_stop": True}
    assert owner.process.wait(30) == 0
    assert owner.servers_alive() == []


root_only = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)

#: An account of every system that is neither root nor nobody.
DAEMON_UID = pwd.getpwnam("daemon").pw_uid

#: Not root, and no right of root's but to read: Python itself may lie in /root.
AS_DAEMON = [
    "setpriv",
    f"--reuid={DAEMON_UID}",
    f"--regid={DAEMON_UID}",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=+dac_read_search",
    "--securebits=+no_setuid_fixup",
]


@root_only
def test_root_runs_the_servers_as_nobody_below_a_directory_only_root_may_enter(
    tmp_path: Path, own: Own
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for _ in range(2):
        owner = own(closed / "data")
        assert owner.uids == {NOBODY_UID}
        assert owner.query("SELECT 1") == [(1,)]
        owner.stop()
    assert (closed / "data").stat().st_uid == 0
    assert (closed / "data" / "postgres" / "cluster").stat().st_uid == NOBODY_UID


@root_only
def test_another_user_needs_no_root_and_root_may_follow(tmp_path: Path, own: Own) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, DAEMON_UID, DAEMON_UID)
    owner = own(shared / "data", AS_DAEMON)
    assert owner.uids == {DAEMON_UID}
    owner.query("CREATE TABLE t AS SELECT 7 AS n")
    owner.stop()
    root = own(shared / "data")
    assert root.uids == {DAEMON_UID}
    assert root.query("SELECT n FROM t") == [(7,)]
    root.stop()


@root_only
def test_another_user_is_told_what_is_closed_to_them(tmp_path: Path, own: Own) -> None:
    assert own(tmp_path / "data", AS_DAEMON).said == {
        "error": f"{tmp_path}/data cannot be used as the data directory: permission denied"
    }
    DataDir.open(tmp_path / "roots", release="test").close()
    assert own(tmp_path / "roots", AS_DAEMON).said == {
        "error": f"{tmp_path}/roots cannot be used as the data directory: permission denied"
    }
