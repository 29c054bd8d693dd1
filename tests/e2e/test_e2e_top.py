"""`top` and `profile` on a running service."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from up import Up

from ringfort import Client
from ringfort.commands.observe import _py_spy
from ringfort.errors import FailedPrecondition
from services.embedder.profiling import MOST_RUNS

COMPOSITION = os.environ.get("COMPOSITION")


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


@pytest.mark.skipif(bool(COMPOSITION), reason="a model on processes of its own is not profiled")
def test_profile_tells_the_costliest_operators_of_a_model_at_work(
    service: Up, client: Client, tmp_path: Path
) -> None:
    out, done = tmp_path / "trace.json", threading.Event()

    def work() -> None:
        number = 0
        while not done.is_set():
            number += 1
            client.embed([f"text {number} {i}" for i in range(8)])

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            told = ringfort(
                *("profile", "--onnx", "--seconds", "30", "--server", service.grpc),
                *("--out", str(out), "--json"),
            )
        finally:
            done.set()
        working.result()
    assert told.returncode == 0, told.stderr
    answer = json.loads(told.stdout)
    assert answer["runs"] >= MOST_RUNS
    assert 3 < len(answer["operators"]) <= 10
    shares = [each["share"] for each in answer["operators"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.8 < sum(shares) <= 1.0001
    assert {event["cat"] for event in json.loads(out.read_text())} == {"Session", "Node"}


@pytest.mark.skipif(bool(COMPOSITION), reason="a model on processes of its own is not profiled")
def test_profile_of_a_model_at_rest_or_unknown_says_so(service: Up, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    asked = ("profile", "--onnx", "--seconds", "1", "--server", service.grpc, "--out", str(out))
    told = ringfort(*asked)
    assert told.returncode == 0, told.stderr
    assert "0 batches" in told.stdout
    assert "nothing was asked" in told.stderr
    assert "no-such" in ringfort(*asked, "--model", "no-such@1").stderr
    for seconds in ("61", "3600"):
        assert "between 1 and 60" in ringfort(*asked, "--seconds", seconds).stderr


def test_profile_without_py_spy_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FailedPrecondition, match="profile"):
        _py_spy()
