"""One server process of ours, from its start to its reaping."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

import psutil

from services.data_dir import StartupError, wait_gone

#: Under root the servers run as this account, which every distribution has.
NOBODY_UID = 65534

# Below the ranges that Linux and macOS take for outgoing connections, so that while a server is being
# restarted no client's own connection can sit on its port.
_PORTS = range(20_000, 30_000)
_TAIL_BYTES = 16 * 1024
#: A killed process is gone within this time, unless the kernel holds it in a call.
_GONE_S = 5.0


@dataclass(frozen=True, slots=True)
class Command:
    """What to run: `argv` with `stdin` as its input, output appended to `log`, as user `uid`."""

    argv: Sequence[str]
    cwd: Path
    log: Path
    uid: int
    stdin: bytes = b""


class Server(Protocol):
    """A kind of server: says how it is run and whether it answers; the supervisor does the running."""

    name: str
    grace_s: float

    def setup(self) -> Command | None:
        """What has to be run to completion before the first start, or None."""

    def setup_done(self) -> None:
        """Takes over what the set-up made."""

    def command(self, port: int) -> Command:
        """How to run the server on a port."""

    async def answers(self, port: int) -> bool:
        """Whether the server takes requests now; StartupError when it never will."""

    def last_words(self) -> str:
        """Why the server could not go on, by its log; empty when the log does not say."""

    def tidy_logs(self) -> None:
        """Keeps the logs within their bounds."""

    def url(self, port: int) -> str:
        """Where clients connect, with the password in it."""


class Child:
    """A running process that leads its own session, so that Ctrl-C in our terminal does not reach it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, grace_s: float) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._grace_s = grace_s

    @classmethod
    async def spawn(cls, name: str, command: Command, grace_s: float) -> "Child":
        """Starts the process; OSError when it cannot be run."""
        # A user's own PGPORT, PGOPTIONS and the like are not meant for this server.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        with tempfile.TemporaryFile() as stdin, command.log.open("ab") as log:
            stdin.write(command.stdin)
            stdin.seek(0)
            process = await asyncio.create_subprocess_exec(
                *as_user(command.uid),
                *command.argv,
                cwd=command.cwd,
                env=environment | {"LC_ALL": "C", "TZ": "UTC"},
                stdin=stdin,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return cls(name, process, grace_s)

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal's number; None while the process runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """The exit status, once the process has ended and is reaped."""
        return await self._process.wait()

    async def end(self) -> None:
        """Asks the process to finish (SIGINT), kills it after the grace, reaps it.

        Nothing that it started stays either.
        """
        descendants = self._descendants()
        self._signal(signal.SIGINT)
        ended = asyncio.ensure_future(self.wait())
        # Not asyncio.timeout: in a task cancelled before, that of Python 3.11.2 raises no TimeoutError.
        if not (await asyncio.wait({ended}, timeout=self._grace_s))[0]:
            descendants += self._descendants()
            self._signal(signal.SIGKILL)
        await ended
        for descendant in descendants:
            with contextlib.suppress(psutil.Error):
                descendant.kill()
        await asyncio.to_thread(wait_gone, descendants, _GONE_S)

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True) if self.status is None else []
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        if self.status is None:
            # The group, as a set-up program has helpers of its own; Postgres' backends lead their own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def tail(log: Path) -> list[str]:
    """The last lines of a log, oldest first; none when there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def server_uid(owned: Path) -> int:
    """Who runs a server that keeps its files in `owned`: we do, or under root the owner, else nobody."""
    if os.geteuid() != 0:
        return os.geteuid()
    owner = owned.stat().st_uid if owned.exists() else 0
    return owner or NOBODY_UID


def free_port(random: Random) -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    for _ in range(200):
        port = random.choice(_PORTS)
        if is_free(port):
            return port
    raise StartupError(f"no port between {_PORTS.start} and {_PORTS.stop - 1} is free on 127.0.0.1")


def is_free(port: int) -> bool:
    """Whether a server could listen on the port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def as_user(uid: int) -> list[str]:
    """The words to put before a command so that it runs as `uid`; none when that is who we are."""
    if uid == os.geteuid():
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise StartupError("as root the servers are started through `setpriv` (util-linux); install it")
    # The one capability lets the server pass through directories that only root may enter, such as /root;
    # without the securebit access(2) would ignore it, and Postgres would not find its own programs there.
    return [
        setpriv,
        f"--reuid={uid}",
        f"--regid={uid}",
        "--clear-groups",
        "--bounding-set=-all,+dac_override",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=+dac_override",
        "--securebits=+no_setuid_fixup",
    ]
