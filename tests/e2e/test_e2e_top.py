"""`top` and `profile` on a running service."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from up import Up

from ringfort import Client
from ringfort.commands.observe import _py_spy
from ringfort.errors import FailedPrecondition


def ringfort(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ringfort", *arguments], capture_output=True, text=True, timeout=120
    )


def test_top_shows_what_is_called(service: Up) -> None:
    command = [sys.executable, "-m", "ringfort", "top", "--http", service.http, "--every", "0.2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        try:
            for line in watching.stdout:
                told = json.loads(line)
                if any(each["method"] == "Embed" for each in told["methods"]):
                    break
                # By a connection of its own each time: of several gateways one is watched.
                with Client(service.grpc) as caller:
                    caller.embed(["watched"])
        finally:
            watching.kill()
    assert {each["stage"] for each in told["stages"]} >= {"queue", "tokenize", "inference"}


def test_top_prints_tables_where_there_is_no_terminal(service: Up) -> None:
    told = ringfort("top", "--http", service.http, "--every", "0.1", "-n", "2")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("method") == 2


def test_top_says_where_nobody_answers(free_port: int) -> None:
    told = ringfort("top", "--http", f"127.0.0.1:{free_port}")
    assert told.returncode == 1
    assert f"127.0.0.1:{free_port}" in told.stderr


def test_profile_draws_the_service_by_the_port_it_listens_at(service: Up, tmp_path: Path) -> None:
    out = tmp_path / "flames.svg"
    told = ringfort("profile", "--seconds", "1", "--server", service.grpc, "--out", str(out), "--json")
    if "Permission Denied" in told.stderr or "permission" in told.stderr.lower():
        pytest.skip(f"this machine lets no process look into another: {told.stderr.strip()}")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["pid"] == service.pid
    assert "<svg" in out.read_text()


def test_profile_without_py_spy_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FailedPrecondition, match="profile"):
        _py_spy()
