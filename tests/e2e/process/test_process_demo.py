"""`ringfort demo`: from nothing to sensible answers, and everything stopped again."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import FREE_PORTS, Running, all_gone, eventually, run
from first_demo import FirstDemo

from ringfort import Client
from ringfort.demo import HITS, QUERIES

#: What a person would expect among the answers.
SENSIBLE = {
    "fast json parser": {"jiter", "orjson", "ujson", "simplejson", "pysimdjson", "jsonc-parser"},
    "async web framework": {"aiohttp", "sanic", "starlette", "fastapi", "blacksheep", "quart"},
    "plot charts in the terminal": {"plotext", "termplotlib", "termcharts", "plotille"},
    "scrape and parse html": {"beautifulsoup4", "parsel", "html-text", "requests-html", "scrapy", "lxml"},
    "train neural networks on a gpu": {"torch", "keras", "tensorflow", "pytorch-lightning", "cuml-cu12"},
    "http client": {"httpx", "httpcore", "requests", "urllib3", "aiohttp"},
}  # fmt: skip


def of_the_data_directory(data_dir: Path) -> list[psutil.Process]:
    """Processes that work in the directory or were told of it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(data_dir)) or str(data_dir) in process.cmdline():
                found.append(process)
        except psutil.Error:
            pass
    return found


def steps(result: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_first_demo_gives_sensible_answers_and_stops_everything(first_demo: FirstDemo) -> None:
    assert first_demo.result.returncode == 0, first_demo.result.stderr
    assert first_demo.result.stderr == ""
    assert all_gone(of_the_data_directory(first_demo.data_dir))
    told = steps(first_demo.result)
    searches = [step for step in told if step["step"] == "search"]
    for step in searches:
        query, hits = step["request"]["text"], [hit["id"] for hit in step["answer"]["hits"]]
        assert SENSIBLE[query] & set(hits), (query, hits)
        assert len(hits) == HITS
    assert [step["request"]["text"] for step in searches] == [*QUERIES, QUERIES[0], "http client"]
    assert [step["answer"]["served_from"] for step in searches] == ["INDEX"] * 5 + ["L1", "INDEX"]
    assert all(hit["attributes"]["downloads_rank"]["int"] < 500 for hit in searches[-1]["answer"]["hits"])
    recommended = next(step["answer"] for step in told if step["step"] == "recommend")
    ids = {hit["id"] for hit in recommended["hits"]}
    assert ids & {"httpcore", "httplib2", "urllib3", "aiohttp", "requests-toolbelt", "h11"}
    assert not ids & {"requests", "httpx", "boto3"}
    assert [stage["name"] for stage in recommended["stages"]] == ["retrieve", "rank", "diversify"]
    exactness = [step["answer"]["served_from"] for step in told if step["step"] == "exactness"]
    assert exactness == ["INDEX", "L1", "INDEX", "L1", "L1"]


def test_a_second_demo_is_fast_and_speaks_to_people(
    first_demo: FirstDemo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert first_demo.result.returncode == 0
    result = run("demo", "--data-dir", first_demo.data_dir, cwd=first_demo.data_dir.parent, timeout_s=30)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "already there, from an earlier run" in result.stdout
    assert "jiter" in result.stdout
    assert "served from INDEX" in result.stdout
    assert "served from L1" in result.stdout
    assert "everything is stopped again" in result.stdout
    assert "Traceback" not in result.stdout
    assert all_gone(of_the_data_directory(first_demo.data_dir))
    with capsys.disabled():
        print(f"\n[first demo, from nothing: {first_demo.took_s:.1f} s]")


def test_a_kept_demo_answers_until_it_is_stopped(first_demo: FirstDemo) -> None:
    assert first_demo.result.returncode == 0
    data_dir = first_demo.data_dir
    result = run("demo", "--keep", "--json", "--data-dir", data_dir, cwd=data_dir.parent)
    kept = steps(result)[-1]
    service = psutil.Process(kept["pid"])
    family = [service, *service.children(recursive=True)]
    try:
        assert result.returncode == 0
        assert kept["step"] == "kept"
        with Client(kept["grpc"]) as client:
            assert client.count("packages") > 14_000
        again = run("up", "--data-dir", data_dir, *FREE_PORTS, cwd=data_dir.parent)
        assert again.returncode == 1
        assert f"in use by process {kept['pid']};" in again.stderr
        service.send_signal(signal.SIGTERM)
        eventually(lambda: all_gone(family), 15)
    finally:
        for process in family:
            if not all_gone([process]):
                process.kill()


def test_ctrl_c_ends_a_demo_and_its_service(first_demo: FirstDemo) -> None:
    assert first_demo.result.returncode == 0
    data_dir = first_demo.data_dir
    with Running("demo", "--json", "--data-dir", data_dir, cwd=data_dir.parent) as demo:
        eventually(lambda: any(process.name() == "valkey-server" for process in demo.family()), 30)
        family = demo.family()
        demo.process.send_signal(signal.SIGINT)
        assert demo.wait(20) == 130
        assert json.loads(demo.err)["error"]["message"] == "interrupted"
        assert all_gone(family)
    assert all_gone(of_the_data_directory(data_dir))
