"""The benchmark runs and reports in the agreed form; what it measures is nobody's business here."""

import json
from pathlib import Path

import pytest

from loadtests import bench
from loadtests.scoreboard import ROWS


def test_bench_reports_every_row_of_its_families(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--quick", "--only", "e2e", "--models", str(model_dir), "--out", str(out)]
    assert bench.main(arguments) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["quick"] is True
    assert report["machine"]["cpus"] >= 1
    rows = {row.name: row for row in ROWS if row.family == "e2e"}
    assert set(report["ratios"]) == set(rows)
    for name, found in report["ratios"].items():
        assert found["mark"] == rows[name].mark
        assert found["goal"] == rows[name].goal
        assert isinstance(found["detail"], dict)
        if rows[name].absent:
            assert found["value"] is None
            assert found["why"] == rows[name].absent
        else:
            assert found["value"] > 0, name
            assert found["detail"].get("documents") == 1_000 or "trace" in found["detail"]
            assert "why" not in found
    table = capsys.readouterr().out
    assert all(name in table for name in rows)


def test_bench_refuses_an_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.main(["--only", "cache,teleport"])
    assert refused.value.code == 2
    assert "teleport" in capsys.readouterr().err
