"""Scenarios are read or refused by name; results come back, are told on a page, and are compared."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtests import machine
from loadtests.drive import __main__ as command
from loadtests.drive import comparison, report, result
from loadtests.drive.result import Measured
from loadtests.drive.scenario import SHIPPED, Scenario, ScenarioRefused, read
from loadtests.drive.tally import Tallies


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_scenarios_are_what_they_are_called(name: str) -> None:
    scenario = read(name)
    assert scenario.name == name
    assert scenario.about
    assert sum(piece.seconds for piece in scenario.rates) == pytest.approx(
        scenario.seconds + scenario.warm_up_s
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: x\noperations: [{kind: search_text}]\nspeed: 3", "speed"),
        ("name: x\noperations: []", "operations"),
        ("name: x\noperations: [{kind: teleport}]", r"operations\[0\].kind"),
        ("name: x\nrate: 0\noperations: [{kind: embed}]", "rate"),
        ("name: x\noperations: [{kind: embed}, {kind: embed}]", "twice"),
        ("name: x\noperations: [{kind: embed}]\nkeys: {kind: hot, calls: 2}", "keys.calls"),
        ("name: x\noperations: [{kind: embed}]\nfaults: [{kind: kill, target: service, at_s: 1}]", "paused"),
        ("name: [", "not YAML"),
    ],
)
def test_a_bad_scenario_is_refused_by_the_name_of_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ScenarioRefused, match=told):
        read(str(tmp_path / "bad.yaml"))


def test_a_scenario_that_is_not_there_is_a_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "nowhere"]) == 2
    assert "mixed" in capsys.readouterr().err


def measured(slower: float = 1.0, label: str = "run") -> dict[str, Any]:
    tallies = Tallies()
    for number in range(200):
        seconds = slower * (number + 1) / 1_000
        tallies.of("search_text").answered("OK" if number else "UNAVAILABLE", seconds, seconds)
        tallies.second(number / 50).latency.add(seconds)
        tallies.second(number / 50).failed += not number
        tallies.lateness.add(1e-4)
    scenario = msgspec.structs.replace(read("mixed"), seconds=4.0, rate=50.0)
    fault = {"kind": "delay", "target": "redis", "began_s": 1.0, "ended_s": 2.0}
    run = Measured(label, scenario, tallies, 4.0, [fault], {"redis": {"count": 3, "p50_ms": 1, "p99_ms": 2}})
    return result.result(
        "run", scenario, [run], machine=machine.described(), made_at="2026-11-25T12:00:00+00:00",
        service={"version": "1", "composition": "embedded", "documents": 10},
    )  # fmt: skip


def test_a_result_comes_back_with_machine_versions_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    result.write(path, measured())
    told = result.read(path)
    assert told["machine"]["cpus"] >= 1
    assert told["machine"]["libraries"]["grpcio"]
    assert msgspec.convert(told["scenario"], Scenario) == msgspec.structs.replace(
        read("mixed"), seconds=4.0, rate=50.0
    )
    [run] = told["runs"]
    assert run["all"]["answered_per_s"] == pytest.approx(199 / 4)
    assert run["all"]["codes"] == {"OK": 199, "UNAVAILABLE": 1}
    assert run["operations"]["search_text"]["latency_ms"]["p50"] == pytest.approx(100, rel=0.01)
    assert [each["answered"] for each in run["series"]] == [50, 50, 50, 50]
    # From the second it began in until three after its end: the last three quarters of the calls.
    [fault] = run["faults"]
    assert (fault["target"], fault["calls"]["due"], fault["calls"]["failed"]) == ("redis", 150, 0)
    assert fault["calls"]["p50"] == pytest.approx(125, rel=0.02)


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"format": 99}')
    for name in ("b.json", "missing.json"):
        with pytest.raises(result.ResultRefused, match=name):
            result.read(tmp_path / name)


def test_a_report_is_a_page_with_tables_and_plots(tmp_path: Path) -> None:
    page = report.write(measured(), tmp_path)
    text = page.read_text()
    assert "| search_text |" in text
    assert "| delay | redis | 1.0 | 2.0 | 150 | 0 | 125" in text
    assert "| redis | 3 | 1.00 | 2.00 |" in text
    assert "Little can be said" not in text
    for name in ("latency.png", "time.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_driver_that_was_late_itself_is_told(tmp_path: Path) -> None:
    told = measured()
    told["runs"][0]["lateness_ms"]["p99"] = 50.0
    assert "50.0 ms late" in result.doubt(told["runs"][0])
    assert "Little can be said of the service" in report.write(told, tmp_path).read_text()


def test_compared_results_tell_ratios_and_what_differed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = measured(), measured(slower=2.0)
    b["machine"]["cpu"] = "another"
    ratios = {(c.operation, c.figure): c.ratio for c in comparison.compare(a, b)}
    assert ratios["search_text", "p99"] == pytest.approx(2, rel=0.01)
    assert ratios["all", "answered_per_s"] == 1
    assert [line.partition(":")[0] for line in comparison.differences(a, b)] == ["machine.cpu"]
    for name, told in (("a", a), ("b", b)):
        result.write(tmp_path / f"{name}.json", told)
    assert command.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert "machine.cpu" in printed
    assert "2.00" in printed
    assert not comparison.compare(a, measured(label="another"))
