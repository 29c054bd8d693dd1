"""The driver against a real service: a pause of a second is paid for by a share of the calls, and is told."""

import json
from pathlib import Path

import pytest
import redis

from loadtests.drive.__main__ import main

SCENARIO = """
name: paused
about: A service that stands still for a second.
rate: 40
seconds: 5
warm_up_s: 1
arrival: constant
population: 50
processes: 2
operations:
  - {kind: search_vector, cache: false, weight: 3}
  - {kind: upsert}
faults:
  - {at_s: 2, kind: pause, target: service, for_s: 1}
  - {at_s: 3.2, kind: delay, target: redis, delay_ms: 30, for_s: 0.2}
  - {at_s: 3.5, kind: kill, target: redis}
"""


def test_a_pause_shows_in_proportion(
    model_dir: Path, tmp_path: Path, valkey_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Another server of the kind runs beside, and is none of the house's.
    with redis.Redis.from_url(valkey_url) as beside:
        began = beside.info("server")["run_id"]
    scenario, out = tmp_path / "paused.yaml", tmp_path / "paused.json"
    scenario.write_text(SCENARIO)
    options = ["--documents", "100", "--models", str(model_dir), "--out", str(out), "--report", "--json"]
    assert main(["run", str(scenario), *options]) == 0
    with redis.Redis.from_url(valkey_url) as beside:
        assert beside.info("server")["run_id"] == began
    printed = capsys.readouterr()
    assert json.loads(printed.out)["result"] == str(out)
    lines = [json.loads(line) for line in printed.err.splitlines()]
    assert [line["answered"] for line in lines if "answered" in line][-1] > 0
    assert any("valkey was killed" in line["event"] for line in lines if "event" in line)
    told = json.loads(out.read_text())
    [run] = told["runs"]
    assert run["all"]["due"] == 200
    assert run["all"]["failed_share"] == 0
    assert {fault["kind"] for fault in run["faults"]} == {"pause", "delay", "kill"}
    [paused] = [fault["calls"] for fault in run["faults"] if fault["kind"] == "pause"]
    assert paused["failed"] == 0
    assert paused["max"] >= 900
    # A fifth of the calls were due while it stood still, for half a second each in the middle.
    latency_ms = run["all"]["latency_ms"]
    assert latency_ms["p99"] >= 900
    assert latency_ms["p90"] >= 450
    assert {"faiss", "postgres", "fanout"} <= run["stages"].keys()
    assert set(run["operations"]) == {"search_vector_uncached", "upsert"}
    assert out.with_suffix("").joinpath("time.png").exists()
