"""A service of its own process, as users start it."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from services.data_dir import DataDir

_ROOT = Path(__file__).parents[1]


class ServiceFailed(RuntimeError):
    """The service did not come up or go down as it should; one sentence and its last words."""


class Service:
    """`python -m services up` on a data directory and free ports, from its ready line to `stop`."""

    def __init__(
        self,
        data_dir: Path,
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        within_s: float = 120.0,
    ) -> None:
        """Start it with these further arguments of `up` and wait until it serves; ServiceFailed otherwise.

        `env` goes on top of ours.
        """
        self.data_dir = data_dir
        self._told = data_dir.with_name(f"{data_dir.name}.stderr")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RINGFORT_")}
        told = ["--data-dir", str(data_dir), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *arguments]
        began = time.perf_counter()
        with self._told.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services", "up", "--json", *told],
                cwd=_ROOT,
                env={**inherited, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is ours; we stop it
            )
        try:
            ready = json.loads(self._first_line(within_s))
            #: Seconds from its start to its ready line.
            self.ready_s = time.perf_counter() - began
            #: HOST:PORT of gRPC.
            self.grpc = str(ready["grpc"])
            #: HOST:PORT of HTTP.
            self.http = str(ready["http"])
        except (ValueError, KeyError) as error:
            self._end()
            raise ServiceFailed(f"not ready within {within_s:g} s: {self._last_words()}") from error
        except BaseException:
            self._end()
            raise

    @property
    def pid(self) -> int:
        """Its own process; its servers are children of that."""
        return self._process.pid

    def processor_s(self) -> float:
        """Processor seconds so far of the service and the servers it started."""
        process = psutil.Process(self._process.pid)
        return sum(
            each.cpu_times().user + each.cpu_times().system
            for each in (process, *process.children(recursive=True))
        )

    def resident(self) -> dict[str, int]:
        """Bytes of the service's own process in memory (Pss): all, anonymous, of files."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        return {name: kib[name] * 1024 for name in ("Pss", "Pss_Anon", "Pss_File")}

    def stop(self, within_s: float = 60.0) -> None:
        """SIGTERM and wait; ServiceFailed if it does not end well. Safe to call twice."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self._end()
                raise ServiceFailed(f"still running {within_s:g} s after SIGTERM") from None
            if self._process.returncode:
                raise ServiceFailed(f"ended with {self._process.returncode}: {self._last_words()}")
        self._end()

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _first_line(self, within_s: float) -> bytes:
        assert self._process.stdout is not None
        line, until_s = b"", time.monotonic() + within_s
        while not line.endswith(b"\n"):
            left_s = max(0.0, until_s - time.monotonic())
            readable, _, _ = select.select([self._process.stdout], [], [], left_s)
            piece = os.read(self._process.stdout.fileno(), 4096) if readable else b""
            if not piece:
                break
            line += piece
        return line

    def _last_words(self) -> str:
        return self._told.read_text(errors="replace").strip()[-500:] or "it said nothing"

    def _end(self) -> None:
        """Kill whatever still runs of it."""
        try:
            process = psutil.Process(self._process.pid)
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def new_data_dir(path: Path, models: Path, *, release: str) -> Path:
    """A data directory with the built models already in it, so that no start has to build one."""
    data_dir = DataDir.open(path, release=release)
    try:
        shutil.copytree(models, data_dir.models, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    finally:
        data_dir.close()
    return path
