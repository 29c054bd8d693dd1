"""From `ringfort up` to its end: what it says and leaves, and that it may be stopped at any moment."""

import json
import os
import re
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command_line import FREE_PORTS, Running, all_gone, environment, eventually

from ringfort import Client

CORPUS = Path(__file__).parents[3] / "ringfort" / "data" / "pypi-top.tsv"


def up(data_dir: Path, *more: object) -> Running:
    return Running("up", "--data-dir", data_dir, *FREE_PORTS, *more, cwd=data_dir.parent)


def ended_in_order(service: Running, number: signal.Signals, code: int, within_s: float = 10.0) -> None:
    """The signal ends the service with this exit code, and everything it started with it."""
    family = service.family()
    service.process.send_signal(number)
    assert service.wait(within_s) == code, service.err
    assert all_gone(family), family
    assert "Traceback" not in service.err


def test_json_says_once_where_it_listens_and_sigterm_ends_it_all(data_dir: Path) -> None:
    with up(data_dir, "--json") as service:
        ready = service.first_line()
        assert set(ready) == {"ready", "grpc", "http", "pid"}
        assert ready["ready"] is True
        assert ready["pid"] == service.process.pid
        with Client(ready["grpc"]) as client:
            assert client.collections() == []
        assert {process.name() for process in service.family()} >= {"postgres", "valkey-server"}
        ended_in_order(service, signal.SIGTERM, 0)
        assert service.lines() == [ready]
        assert json.loads((data_dir / "children.json").read_text()) == {}


def test_what_a_library_prints_is_not_taken_for_the_line(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As C++ in Ray does: to the descriptor, whatever Python's stdout is.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def noise():\n"
        "    while not os.path.sameopenfile(1, 2):\n"
        "        time.sleep(0.01)\n"
        "    while True:\n"
        "        os.write(1, b'noise\\n')\n"
        "        time.sleep(0.1)\n"
        "if 'services' in sys.orig_argv:\n"
        "    threading.Thread(target=noise, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with up(data_dir, "--json") as service:
        ready = service.first_line()
        assert ready["ready"] is True
        assert eventually(lambda: "noise" in service.err, 10)
        ended_in_order(service, signal.SIGTERM, 0)
        assert service.lines() == [ready]


def test_people_are_told_where_it_listens_and_a_closed_terminal_ends_it(data_dir: Path) -> None:
    with up(data_dir) as service:
        said = re.compile(r"ringfort: ready: gRPC on (\S+), HTTP on (\S+); Ctrl-C stops it\n")
        assert eventually(lambda: said.search(service.err), 60)
        ended_in_order(service, signal.SIGHUP, 0)
        assert service.out == ""


def test_a_warm_start_takes_seconds_and_ctrl_c_ends_it(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    took_s = []
    for _ in range(2):
        began_s = time.monotonic()
        with up(data_dir, "--json") as service:
            service.first_line()
            took_s.append(time.monotonic() - began_s)
            # As a terminal does it, to the whole group.
            family = service.family()
            os.killpg(service.process.pid, signal.SIGINT)
            assert service.wait(10) == 130
            assert all_gone(family)
            assert service.err == ""
    with capsys.disabled():
        print(f"\n[ready in {', '.join(f'{took:.2f}' for took in took_s)} s on a warm data directory]")
    assert min(took_s) < 5


def test_what_it_keeps_is_private_and_passwords_stay_out_of_sight(data_dir: Path) -> None:
    with up(data_dir, "--json") as service:
        service.first_line()
        passwords = json.loads((data_dir / "secrets.json").read_text()).values()
        assert len(set(passwords)) == 2
        for process in service.family():
            seen = " ".join(process.cmdline())
            assert not any(password in seen for password in passwords), process
        ended_in_order(service, signal.SIGTERM, 0)
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((data_dir / "secrets.json").stat().st_mode) == 0o600
    logs = {log.name: log.read_text() for log in (data_dir / "logs").iterdir()}
    assert {"ringfort.log", "valkey.log"} <= set(logs)
    assert any(re.fullmatch(r"postgres-\d+-\d+\.log", name) for name in logs)
    assert not any(password in text for password in passwords for text in logs.values())
    # Nothing beside the data directory, wherever the command was run.
    assert list(data_dir.parent.iterdir()) == [data_dir]


def _imports(service: Running, data_dir: Path) -> bool:
    # The command line has become the service, and has opened its first library.
    maps = Path(f"/proc/{service.process.pid}/maps")
    return "services" in psutil.Process(service.process.pid).cmdline() and "uvloop" in maps.read_text()


def _makes_the_cluster_and_builds_the_model(service: Running, data_dir: Path) -> bool:
    cluster = (data_dir / "postgres" / "cluster.new" / "global").exists()
    return cluster and any((data_dir / "models").glob("*/.building-*"))


def _starts_postgres(service: Running, data_dir: Path) -> bool:
    return (data_dir / "postgres" / "cluster" / "postmaster.pid").exists()


def test_a_start_may_be_interrupted_at_any_point_and_the_next_one_goes_on(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    points: tuple[Callable[[Running, Path], bool], ...] = (
        _imports,
        _makes_the_cluster_and_builds_the_model,
        _starts_postgres,
    )
    for reached in points:
        with up(data_dir, "--json") as service:
            eventually(lambda: reached(service, data_dir), 60, every_s=0.002)  # noqa: B023
            ended_in_order(service, signal.SIGINT, 130)
            assert service.out == "", reached
    with up(data_dir, "--json") as service:
        with Client(service.first_line()["grpc"]) as client:
            assert client.embed(["a text"]).shape == (1, 384)
        ended_in_order(service, signal.SIGTERM, 0)


def test_ctrl_c_ends_a_service_under_load_and_a_load_says_how_far_it_is(data_dir: Path) -> None:
    env = environment(XDG_STATE_HOME=str(data_dir.parent))
    with up(data_dir, "--json") as service:
        args = ("--id", "name", "--text", "summary", "--create", "--json")
        address = service.first_line()["grpc"]
        with Running(
            "load", "packages", CORPUS, *args, "--server", address, cwd=data_dir.parent, env=env
        ) as load:
            eventually(lambda: any(line["acknowledged"] for line in load.lines()), 30)
            ended_in_order(service, signal.SIGINT, 130)
            assert load.process.poll() is None
            load.process.send_signal(signal.SIGINT)
            assert load.wait(10) == 130
            last, error = load.lines()[-1], json.loads(load.err)["error"]
            assert last["done"] is False
            assert 0 < last["acknowledged"] < last["total"]
            done = f"{last['acknowledged']:,} of {last['total']:,} rows are done"
            assert error["message"].startswith(f"interrupted; {done}")
