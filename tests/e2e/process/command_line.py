"""The installed `ringfort` command, run as its users run it: in a directory of their own."""

import json
import os
import subprocess
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
from up import end
from waiting import eventually

T = TypeVar("T")

RINGFORT = Path(sysconfig.get_path("scripts")) / "ringfort"
FREE_PORTS = ("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")

#: A start from nothing makes a database and a model, on machines that have other things to do as well.
READY_WITHIN_S = 120.0


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what configures a service, and more."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RINGFORT_")}
    return {**inherited, **more}


def run(
    *args: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
    program: Sequence[object] = (RINGFORT,),
) -> "subprocess.CompletedProcess[str]":
    """One command to its end; nothing it started is left, whatever happens."""
    with Running(*args, cwd=cwd, env=env, program=program) as running:
        code = running.wait(timeout_s)
        return subprocess.CompletedProcess(running.process.args, code, running.out, running.err)


class Running:
    """A command under way, in a session of its own; what it says is read as it comes.

    A context manager: what is left of it at the end, children included, is killed.
    """

    def __init__(
        self,
        *args: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        program: Sequence[object] = (RINGFORT,),
    ) -> None:
        self.process = subprocess.Popen(
            [str(part) for part in (*program, *args)],
            cwd=cwd,
            env=environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._said: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self._readers = [
            threading.Thread(target=self._read, args=(name,), daemon=True) for name in self._said
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        for reader in self._readers:
            reader.join(5)
        for name in self._said:
            getattr(self.process, name).close()

    @property
    def out(self) -> str:
        """What it wrote to stdout so far."""
        return b"".join(self._said["stdout"]).decode()

    @property
    def err(self) -> str:
        """What it wrote to stderr so far."""
        return b"".join(self._said["stderr"]).decode()

    def lines(self) -> list[Any]:
        """Its whole lines of JSON so far."""
        return [json.loads(line) for line in self.out.split("\n")[:-1]]

    def first_line(self, within_s: float = READY_WITHIN_S) -> Any:
        """Its first line of JSON; AssertionError with its stderr where it ends without one."""

        def line() -> Any:
            ended = self.process.poll() is not None
            if lines := self.lines():
                return lines[0]
            assert not ended, f"ended with {self.process.returncode}: {self.err}"
            return None

        return eventually(line, within_s)

    def wait(self, within_s: float) -> int:
        """Its exit code; AssertionError with what it said where it does not end in time."""
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done in {within_s:g} s; it said: {self.out}{self.err}") from None
        for reader in self._readers:
            reader.join(5)
        return code

    def family(self) -> list[psutil.Process]:
        """It and everything it has started."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _read(self, name: str) -> None:
        stream = getattr(self.process, name)
        while piece := os.read(stream.fileno(), 65536):
            self._said[name].append(piece)


def all_gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether none of them runs any more; one that nobody waited for has ended too."""
    return not any(map(_runs, processes))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
