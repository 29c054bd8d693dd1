"""A Postgres of a test's own, on a port that stays: killed, and started again where it was."""

import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import psycopg

from services.data_dir import DataDir
from services.servers.child import as_user, free_port
from services.servers.postgres import PostgresServer

READY_WITHIN_S = 60.0


class SecondPostgres:
    """Runs on a data directory in which a Postgres has been made. A context manager: killed at its end."""

    def __init__(self, path: Path) -> None:
        self._data_dir = DataDir.open(path, release="test")
        self._server = PostgresServer(self._data_dir)
        self._port = free_port(random.Random())
        self._process: subprocess.Popen[bytes] | None = None
        self.url = self._server.url(self._port)

    def __enter__(self) -> "SecondPostgres":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._data_dir.close()

    def start(self) -> None:
        """It answers when this returns."""
        command = self._server.command(self._port)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        with command.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*as_user(command.uid), *command.argv],
                cwd=command.cwd,
                env=environment | {"LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until_s = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < until_s, self._server.last_words()
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all of it."""
        if self._process is None:
            return
        family = [self._process, *psutil.Process(self._process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        self._process.wait()
        psutil.wait_procs(family[1:], timeout=10)
        self._process = None
