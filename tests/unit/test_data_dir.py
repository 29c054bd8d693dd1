"""The data directory: who may open it, what it refuses and how it says so, and whom it outlives."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.data_dir import DataDir, StartupError

HOLDER = """
import sys, time
from pathlib import Path
from services.data_dir import DataDir
data_dir = DataDir.open(Path(sys.argv[1]), release="0.9")
print("open", flush=True)
sys.stdin.read()
"""

SLEEPER = "import sys; print('up', flush=True); sys.stdin.read()"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "data"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python program and waits for its first line; it is ended after the test."""
    started: list[subprocess.Popen[str]] = []

    def run(program: str, *args: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", program, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_directory_is_private_and_says_its_format(path: Path) -> None:
    data_dir = DataDir.open(path, release="1.2.3")
    assert mode_of(path) == 0o700
    assert json.loads((path / "format.json").read_text()) == {
        "format": 1,
        "postgres_major": 18,
        "created_by": "1.2.3",
    }
    for directory in (data_dir.logs, data_dir.postgres, data_dir.valkey, data_dir.models, data_dir.segments):
        assert directory.parent == path
        assert mode_of(directory) == 0o700
    data_dir.close()
    data_dir.close()


def test_passwords_are_kept_private_and_differ_by_name(path: Path) -> None:
    first = DataDir.open(path, release="1")
    postgres, valkey = first.secrets.password("postgres"), first.secrets.password("valkey")
    assert postgres != valkey
    assert len(postgres) >= 32
    assert mode_of(path / "secrets.json") == 0o600
    first.close()
    second = DataDir.open(path, release="2")
    assert second.secrets.password("postgres") == postgres
    second.close()


def test_a_file_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(StartupError, match="is a file"):
        DataDir.open(path, release="1")


def test_a_path_through_a_file_is_refused(path: Path) -> None:
    path.parent.write_text("mine")
    with pytest.raises(StartupError, match="cannot be used as the data directory: not a directory"):
        DataDir.open(path, release="1")


def test_somebody_elses_directory_is_refused_and_left_as_it_was(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("words")
    with pytest.raises(StartupError, match=r"not Ringfort's \(such as 'thesis.tex'\)"):
        DataDir.open(path, release="1")
    assert [entry.name for entry in path.iterdir()] == ["thesis.tex"]


def test_a_fresh_volume_and_an_open_cut_short_are_taken(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "lost+found").mkdir()
    (path / "lock").write_text("12345\n")
    (path / "format.json.new").write_text("{")
    DataDir.open(path, release="1").close()
    assert json.loads((path / "format.json").read_text())["created_by"] == "1"


def test_it_opens_once_at_a_time(path: Path, start: Start) -> None:
    holder = start(HOLDER, str(path))
    with pytest.raises(StartupError, match=f"in use by process {holder.pid};"):
        DataDir.open(path, release="1")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    again = DataDir.open(path, release="1")
    with pytest.raises(StartupError, match=f"in use by process {os.getpid()};"):
        DataDir.open(path, release="1")
    again.close()


@pytest.mark.parametrize(
    ("stored", "problem"),
    [
        ({"format": 2, "postgres_major": 19, "created_by": "7.0"}, r"newer release \(7.0\)"),
        ({"format": 1, "postgres_major": 17, "created_by": "0.1"}, "Postgres 17 cluster"),
        ({"format": 1}, "damaged"),
        ("", "damaged"),
    ],
)
def test_another_format_is_refused_and_the_lock_given_back(path: Path, stored: object, problem: str) -> None:
    DataDir.open(path, release="1").close()
    good = (path / "format.json").read_text()
    (path / "format.json").write_text(json.dumps(stored) if stored else "")
    with pytest.raises(StartupError, match=problem):
        DataDir.open(path, release="1")
    (path / "format.json").write_text(good)
    DataDir.open(path, release="1").close()


def test_damaged_secrets_are_not_replaced(path: Path) -> None:
    data_dir = DataDir.open(path, release="1")
    (path / "secrets.json").write_text("{")
    with pytest.raises(StartupError, match="damaged; restore it"):
        data_dir.secrets.password("postgres")
    assert (path / "secrets.json").read_text() == "{"
    data_dir.close()


def test_a_nearly_full_disk_is_refused(path: Path) -> None:
    with pytest.raises(StartupError, match=r"disk full: .* has \d+ MiB left"):
        DataDir.open(path, release="1", min_free_bytes=1 << 60)
    DataDir.open(path, release="1").close()


def test_a_full_disk_is_said_in_words(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("services.data_dir.os.fsync", full)
    with pytest.raises(StartupError, match=f"disk full: {path} cannot be written"):
        DataDir.open(path, release="1")


def orphaned(path: Path, name: str, pid: int) -> DataDir:
    """The directory as its next owner finds it after the first was killed with a child running."""
    first = DataDir.open(path, release="1")
    first.record_child(name, pid)
    first.close()
    return DataDir.open(path, release="1")


def test_orphans_are_asked_to_finish(path: Path, start: Start) -> None:
    process = start(
        "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(7));" + SLEEPER,
    )
    data_dir = orphaned(path, "postgres", process.pid)
    assert data_dir.end_orphans() == ["postgres"]
    assert process.wait() == 7
    assert data_dir.end_orphans() == []
    data_dir.close()


def test_stubborn_orphans_are_killed_with_their_descendants(path: Path, start: Start) -> None:
    process = start(
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" + SLEEPER
    )
    family = psutil.Process(process.pid).children()
    assert len(family) == 1
    data_dir = orphaned(path, "postgres", process.pid)
    assert data_dir.end_orphans(grace_s=0.1) == ["postgres"]
    assert process.wait() == -signal.SIGKILL
    assert psutil.wait_procs(family, timeout=5)[1] == []
    data_dir.close()


def test_a_stranger_with_an_orphans_number_is_spared(path: Path, start: Start) -> None:
    process = start(SLEEPER)
    orphaned(path, "postgres", process.pid).close()
    children = json.loads((path / "children.json").read_text())
    children["postgres"]["created_s"] -= 60
    (path / "children.json").write_text(json.dumps(children))
    data_dir = DataDir.open(path, release="1")
    assert data_dir.end_orphans() == []
    assert process.poll() is None
    data_dir.close()


def test_our_own_children_are_spared(path: Path, start: Start) -> None:
    orphan, ours = start(SLEEPER), start(SLEEPER)
    data_dir = orphaned(path, "valkey", orphan.pid)
    data_dir.record_child("postgres", ours.pid)
    assert data_dir.end_orphans() == ["valkey"]
    assert ours.poll() is None
    data_dir.close()


def test_children_that_ended_are_nobodys_orphans(path: Path, start: Start) -> None:
    process = start(SLEEPER)
    data_dir = DataDir.open(path, release="1")
    data_dir.record_child("postgres", process.pid)
    data_dir.forget_child("postgres")
    data_dir.forget_child("never heard of")
    data_dir.close()
    data_dir = DataDir.open(path, release="1")
    assert data_dir.end_orphans() == []
    assert process.poll() is None
    data_dir.close()


def test_a_damaged_list_of_children_does_not_stop_a_start(path: Path) -> None:
    DataDir.open(path, release="1").close()
    for content in ("", "[]", '{"postgres": {}}', '{"postgres": {"pid": "x", "created_s": 1}}'):
        (path / "children.json").write_text(content)
        data_dir = DataDir.open(path, release="1")
        assert data_dir.end_orphans() == []
        data_dir.close()
