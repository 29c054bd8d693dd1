"""The directory that holds everything a service keeps: who owns it, what format it has, what lies where."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FORMAT = 1
POSTGRES_MAJOR = 18
MIN_FREE_BYTES = 256 * 1024 * 1024

#: What may lie in a directory that nobody has used yet: our own first files, a fresh volume's own, and the
#: demo's, which lives below the default data directory.
_UNUSED = {"lock", "format.json.new", "lost+found", "demo", "demo.log"}
#: Process start times are read off a clock that may be slewed between two readings.
_START_TOLERANCE_S = 1.0


class StartupError(RuntimeError):
    """The service cannot start; the message is one sentence that tells a person why and what to do."""


class DataDir:
    """A data directory that this process owns until `close()`; nobody else can open it meanwhile.

    `path`, `logs`, `postgres`, `valkey`, `models` and `segments` are directories, made when first asked
    for; `secrets` gives generated passwords.
    """

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.secrets = Secrets(path / "secrets.json")
        self._lock_fd: int | None = lock_fd
        #: Guards the two fields below and their file: orphans are ended in a thread.
        self._guard = threading.Lock()
        self._children: dict[str, dict[str, float]] = {}
        #: Children of an owner that went without ending them, as found at open.
        self._orphans: dict[str, dict[str, float]] = self._read_children()
        recorded = {int(child["pid"]) for child in self._orphans.values()}
        self._orphans |= {
            f"{process.name} {process.pid}": {"pid": process.pid, "created_s": process.created_s}
            for process in _servers_in(path.resolve())
            if process.pid not in recorded
        }

    @classmethod
    def open(cls, path: Path, *, release: str, min_free_bytes: int = MIN_FREE_BYTES) -> "DataDir":
        """The directory, locked and of a format this release reads; made with mode 0700 when absent.

        Raises StartupError when it is a file, cannot be written, belongs to something else, is in use,
        was written by a newer release or another Postgres, or lies on a disk that is nearly full.
        """
        path = path.expanduser().absolute()
        try:
            _make(path)
            lock_fd = _lock(path)
        except OSError as error:
            raise unusable(path, error) from error
        try:
            _check_format(path, release)
            free_bytes = shutil.disk_usage(path).free
            if free_bytes < min_free_bytes:
                raise StartupError(
                    f"disk full: {path} has {free_bytes >> 20} MiB left, and at least "
                    f"{min_free_bytes >> 20} MiB are needed to start"
                )
            return cls(path, lock_fd)
        except BaseException as error:
            os.close(lock_fd)
            if isinstance(error, OSError):
                raise unusable(path, error) from error
            raise

    @property
    def logs(self) -> Path:
        """Where the servers write their logs."""
        return self._directory("logs")

    @property
    def postgres(self) -> Path:
        """Where the Postgres cluster lies."""
        return self._directory("postgres")

    @property
    def valkey(self) -> Path:
        """Valkey's working directory."""
        return self._directory("valkey")

    @property
    def models(self) -> Path:
        """Where built models lie."""
        return self._directory("models")

    @property
    def segments(self) -> Path:
        """Where shard replicas keep their segments."""
        return self._directory("segments")

    def record_child(self, name: str, pid: int) -> None:
        """Remembers across a crash that process `pid` is ours, so that the next owner can end it."""
        with contextlib.suppress(psutil.NoSuchProcess), self._guard:
            self._children[name] = {"pid": pid, "created_s": psutil.Process(pid).create_time()}
            self._write_children()

    def forget_child(self, name: str) -> None:
        """Says that the child has ended; unknown names are fine."""
        with self._guard:
            if self._children.pop(name, None) is not None:
                self._write_children()

    def end_orphans(self, *, grace_s: float = 20.0) -> list[str]:
        """Ends what a previous owner left running and returns the names of what was still alive.

        A process is ended only if it started when the recorded one did: SIGINT first, which Postgres
        and Valkey both take as "finish now, cleanly"; after `grace_s` SIGKILL, to its descendants too.
        Blocks meanwhile.
        """
        alive = {
            name: process
            for name, child in self._orphans.items()
            if (process := _running(int(child["pid"]), child["created_s"]))
        }
        for process in alive.values():
            _signal(process, signal.SIGINT)
        wait_gone(list(alive.values()), grace_s)
        for process in filter(_is_alive, alive.values()):
            family = [process, *_descendants(process)]
            for member in family:
                _signal(member, signal.SIGKILL)
            wait_gone(family, grace_s)
        with self._guard:
            self._orphans = {}
            self._write_children()
        return sorted(alive)

    def close(self) -> None:
        """Gives the directory free for the next owner; calling it twice is fine."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _directory(self, name: str) -> Path:
        directory = self.path / name
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    def _read_children(self) -> dict[str, dict[str, float]]:
        try:
            children = json.loads((self.path / "children.json").read_bytes())
            return {
                name: {"pid": int(child["pid"]), "created_s": float(child["created_s"])}
                for name, child in children.items()
            }
        except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
            return {}

    def _write_children(self) -> None:
        _write_json(self.path / "children.json", {**self._orphans, **self._children})


class Secrets:
    """Passwords made once and kept in a file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def password(self, name: str) -> str:
        """The password called `name`: URL-safe text, 192 random bits, the same at every start."""
        try:
            passwords: dict[str, str] = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            passwords = {}
        except ValueError as error:
            raise StartupError(f"{self._path} is damaged; restore it from a backup") from error
        if name not in passwords:
            passwords[name] = secrets.token_urlsafe(24)
            _write_json(self._path, passwords)
        return passwords[name]


def _make(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StartupError(f"{path} is a file; the data directory has to be a directory")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    strangers = {entry.name for entry in path.iterdir()} - _UNUSED
    if strangers and "format.json" not in strangers:
        raise StartupError(
            f"{path} holds files that are not Ringfort's (such as {min(strangers)!r}); "
            "choose an empty or a new directory"
        )


def _lock(path: Path) -> int:
    """An open file descriptor that holds the directory's lock; the file's text is our process id."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise StartupError(
            f"{path} is in use by process {holder or 'unknown'}; stop it, or choose another data directory"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_format(path: Path, release: str) -> None:
    file = path / "format.json"
    if not file.exists():
        _write_json(file, {"format": FORMAT, "postgres_major": POSTGRES_MAJOR, "created_by": release})
        return
    try:
        stored = json.loads(file.read_bytes())
        written, major = int(stored["format"]), int(stored["postgres_major"])
    except (ValueError, KeyError, TypeError) as error:
        raise StartupError(f"{file} is damaged; restore it from a backup") from error
    if written > FORMAT:
        raise StartupError(
            f"{path} was written by a newer release ({stored.get('created_by', 'unknown')}); "
            f"start that release, as {release} cannot read it"
        )
    if major != POSTGRES_MAJOR:
        raise StartupError(
            f"{path} holds a Postgres {major} cluster and this release runs Postgres {POSTGRES_MAJOR}; "
            "start the release that made it and move the data with pg_dump"
        )


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Replaces the file's content at once and durably; readable by its owner only."""
    new = file.with_name(file.name + ".new")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
        json.dump(value, out)
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)
    directory_fd = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def unusable(path: Path, error: OSError) -> StartupError:
    """The sentence that tells a person why the data directory at `path` cannot be worked in."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StartupError(f"disk full: {path} cannot be written")
    reason = (error.strerror or str(error)).lower()
    return StartupError(f"{path} cannot be used as the data directory: {reason}")


def _running(pid: int, created_s: float) -> psutil.Process | None:
    """The process, if it is alive and is the one that started at `created_s`."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created_s) < _START_TOLERANCE_S
    except psutil.Error:
        return None
    return process if same and _is_alive(process) else None


@dataclass(frozen=True)
class _Found:
    name: str
    pid: int
    parent: int
    created_s: float


def _servers_in(path: Path) -> list[_Found]:
    """Servers at work in the directory, told by their names and by where they are, without their children.

    An owner may be killed after it has started one and before it could write that down.
    """
    homes = {"postgres": path / "postgres" / "cluster", "valkey-server": path / "valkey"}
    found: dict[int, _Found] = {}
    for process in psutil.process_iter(["name"]):
        name = process.info["name"]
        with contextlib.suppress(psutil.Error):
            if name in homes and Path(process.cwd()) == homes[name]:
                found[process.pid] = _Found(name, process.pid, process.ppid(), process.create_time())
    return [server for server in found.values() if server.parent not in found]


def wait_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Returns once none of the processes runs any more, or after so many seconds."""
    until_s = time.monotonic() + seconds
    while any(map(_is_alive, processes)) and time.monotonic() < until_s:
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        # A zombie has ended; whether its parent has noticed is not our business.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
