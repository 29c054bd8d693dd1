"""A real service for tests: `python -m services up` in a process of its own."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from services.data_dir import DataDir

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Up:
    """A running service: where it answers, its process, and the data directory it owns.

    What it writes to stderr lies in `stderr`, a file beside the data directory.
    """

    grpc: str
    http: str
    pid: int
    data_dir: Path
    process: "subprocess.Popen[bytes]"

    @classmethod
    def start(
        cls, data_dir: Path, *args: str, env: Mapping[str, str] | None = None, ready_within_s: float = 90.0
    ) -> "Up":
        """The service, once it has said that it is ready; AssertionError with its stderr if it does not.

        It listens on free ports unless `args` (more of `up`'s options) say otherwise. `env` is added to
        this process's environment, of which no RINGFORT_ variable is passed on.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RINGFORT_")}
        command = [sys.executable, "-m", "services", "up", "--json", "--data-dir", str(data_dir)]
        for port in ("--grpc", "--http"):
            if port not in args:
                command += [port, "127.0.0.1:0"]
        with _stderr_of(data_dir).open("ab") as stderr:
            process = subprocess.Popen(
                [*command, *args],
                cwd=ROOT,
                env={**inherited, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        try:
            ready = json.loads(_first_line(process, ready_within_s))
        except ValueError:
            end(process)
            told = _stderr_of(data_dir).read_text(errors="replace")
            raise AssertionError(
                f"not ready within {ready_within_s:g} s, exit code {process.returncode}: {told}"
            ) from None
        assert ready["ready"] is True
        assert ready["pid"] == process.pid
        return cls(ready["grpc"], ready["http"], ready["pid"], data_dir, process)

    @property
    def stderr(self) -> Path:
        """What the service, and earlier ones on the same data directory, wrote to stderr."""
        return _stderr_of(self.data_dir)

    def errors(self) -> list[str]:
        """What its log calls an error."""
        events = map(json.loads, (self.data_dir / "logs" / "ringfort.log").read_text().splitlines())
        return [f"{e['message']} {e.get('error', '')}" for e in events if e["level"] == "error"]

    def stop(self, within_s: float = 30.0) -> int:
        """SIGTERM and wait; the exit code. AssertionError if it does not end in time; it is killed then."""
        self.process.terminate()
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {within_s:g} s after SIGTERM") from None
        finally:
            end(self.process)
        return code

    def kill(self) -> None:
        """SIGKILL to the service alone: what it started is left as a crash would leave it."""
        self.process.kill()
        self.process.wait()
        _close(self.process)


def lend_model(model_dir: Path, data_dir: Path) -> None:
    """Put a built model where a service on this data directory looks for it, so that it builds none."""
    opened = DataDir.open(data_dir, release="test")
    try:
        shutil.copytree(model_dir, opened.models, dirs_exist_ok=True)
    finally:
        opened.close()


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and whatever it started, if any of it still runs."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    _close(process)


def _first_line(process: "subprocess.Popen[bytes]", within_s: float) -> bytes:
    """The first line of stdout; what there is of it when the process ends or the time is up."""
    assert process.stdout is not None
    line, until_s = b"", time.monotonic() + within_s
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, until_s - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 4096) if readable else b""
        if not piece:
            break
        line += piece
    return line


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdout is not None:
        process.stdout.close()


def _stderr_of(data_dir: Path) -> Path:
    return data_dir.with_name(f"{data_dir.name}.stderr")
