"""A service whose processes are killed one by one, and which is started again where it was."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from command_line import all_gone, eventually
from up import ROOT, Up, end

from ringfort import Client
from services.servers.child import free_port

#: Gone within this time, unless the kernel holds it in a call.
GONE_WITHIN_S = 10.0


class Killable:
    """One service at a time on a data directory, always at the same address `grpc`.

    A context manager: what is left at its end, orphans included, is killed. `env` is added to every
    service's environment.
    """

    def __init__(self, data_dir: Path, env: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self._env = env
        self.grpc = f"127.0.0.1:{free_port(random.Random())}"
        self._up: Up | None = None
        #: Every server that was seen running, to be ended whoever its parent is by then.
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "Killable":
        for last in (False, False, True):
            try:
                self.start()
                break
            except AssertionError as error:
                if last or "cannot listen on" not in str(error):
                    raise
                self.grpc = f"127.0.0.1:{free_port(random.Random())}"
        return self

    def __exit__(self, *_: object) -> None:
        self._see_children()
        if self._up is not None:
            end(self._up.process)
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        eventually(lambda: all_gone(list(self._seen)), GONE_WITHIN_S)

    def start(self) -> None:
        """A service that is ready."""
        self._up = Up.start(self.data_dir, "--grpc", self.grpc, env=self._env)
        self._see_children()

    def start_and_kill(self, after_s: float) -> None:
        """A start that is killed so many seconds after its beginning, wherever it is then."""
        command = [sys.executable, "-m", "services", "up", "--data-dir", str(self.data_dir)]
        with self.data_dir.with_name("cut-short.stderr").open("ab") as stderr:
            process = subprocess.Popen(
                [*command, "--grpc", self.grpc, "--http", "127.0.0.1:0"],
                cwd=ROOT,
                env={**os.environ, **(self._env or {})},
                stderr=stderr,
            )
        time.sleep(after_s)
        process.kill()
        process.wait()
        self._see_children()

    def stop(self) -> None:
        """The end in order, exit code 0."""
        assert self._up is not None
        assert self._up.stop() == 0

    def client(self) -> Client:
        """A client of the service, whichever runs at the address by then."""
        return Client(self.grpc)

    def server(self, name: str) -> psutil.Process:
        """The process of `postgres` or `valkey`, once there is one that runs."""

        process = eventually(lambda: self._running(name), 60)
        assert process is not None
        return process

    def kill_service(self) -> list[psutil.Process]:
        """SIGKILL to the service alone; the servers it leaves behind."""
        assert self._up is not None
        orphans = [self.server("postgres"), self.server("valkey")]
        self._up.kill()
        self._up = None
        return orphans

    def kill_server(self, name: str) -> psutil.Process:
        """SIGKILL to `postgres` or `valkey`; what was killed."""
        process = self.server(name)
        process.send_signal(signal.SIGKILL)
        eventually(lambda: all_gone([process]), GONE_WITHIN_S)
        return process

    def merges(self) -> dict[psutil.Process, set[Path]]:
        """The processes that merge segments at this moment, and what each has open or mapped."""
        assert self._up is not None
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._up.pid).children():
                with contextlib.suppress(psutil.Error):
                    if "index_builder.segments.merge" in child.cmdline():
                        open_files = [file.path for file in child.open_files()]
                        mapped = [file.path for file in child.memory_maps()]
                        found[child] = {Path(path) for path in open_files + mapped}
        return found

    def _running(self, name: str) -> psutil.Process | None:
        """The server's process; None where it is gone and perhaps a stranger has its number."""
        try:
            process = psutil.Process(self._pid(name))
            ours = Path(process.cwd()).is_relative_to(self.data_dir.resolve())
        except (psutil.Error, ValueError, OSError, KeyError):
            return None
        return process if ours else None

    def _pid(self, name: str) -> int:
        if name == "postgres":
            # As Postgres itself says it, whoever its parent is.
            lock = self.data_dir / "postgres" / "cluster" / "postmaster.pid"
            return int(lock.read_text().split("\n", 1)[0])
        children: dict[str, dict[str, int]] = json.loads((self.data_dir / "children.json").read_text())
        return children[name]["pid"]

    def _see_children(self) -> None:
        if self._up is not None and self._up.process.poll() is None:
            self._seen.update(psutil.Process(self._up.pid).children(recursive=True))
        self._seen.update(filter(None, map(self._running, ("postgres", "valkey"))))
