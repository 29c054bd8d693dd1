"""The demo against a service that only pretends: what it asks, what it tells, and that it cleans up."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client_fakes import PACKAGES, FakeService, Store, abort, search_answer

import ringfort
from protos.ringfort import v1 as pb

ROOT = Path(ringfort.__file__).parent.parent
ROWS = 14690

#: Stands where the demo finds `services` first: says it is ready, and writes down how it ended.
PRETENDER = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
(here / "argv.json").write_text(json.dumps(sys.argv[1:]))
def stop(number, frame):
    (here / "stopped").write_text(str(number))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
address = os.environ["PRETENDED_ADDRESS"]
if not address:
    print("ringfort: the disk is full", file=sys.stderr)
    sys.exit(1)
print(json.dumps({"ready": True, "grpc": address, "http": "127.0.0.1:1", "pid": os.getpid()}), flush=True)
while True:
    time.sleep(0.05)
"""


class Stage:
    """A directory to run the demo in, and how to run it."""

    def __init__(self, directory: Path, fake: FakeService) -> None:
        self.services = directory / "services"
        self.services.mkdir()
        (self.services / "__init__.py").touch()
        (self.services / "__main__.py").write_text(PRETENDER)
        self.directory, self.fake = directory, fake
        self.store = Store()
        self.served = 0
        fake.answers.update(
            {
                "CollectionService/Get": lambda request, context: PACKAGES,
                "DocumentService/Count": lambda request, context: pb.CountResponse(count=ROWS),
                "DocumentService/Get": lambda request, context: pb.GetResponse(
                    documents=[pb.Document(id=id) for id in request.ids]
                ),
                "DocumentService/UpsertStream": self.store,
                "SearchService/Search": lambda request, context: search_answer("ray", "faiss"),
                "SearchService/Recommend": lambda request, context: pb.RecommendResponse(
                    hits=[pb.Hit(id="httpx")], stages=[pb.Stage(name="retrieve", candidates=100)]
                ),
            }
        )

    def start(self, *options: str, address: str | None = None) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "ringfort", "demo", *options],
            cwd=self.directory,
            env={
                **os.environ,
                "PYTHONPATH": f"{self.directory}:{ROOT}",
                "PRETENDED_ADDRESS": self.fake.address if address is None else address,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def stopped_by(self) -> str:
        path = self.services / "stopped"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def stage(tmp_path: Path, fake: FakeService) -> Stage:
    return Stage(tmp_path, fake)


def test_the_whole_show(stage: Stage) -> None:
    demo = stage.start()
    out, err = demo.communicate(timeout=60)
    assert (demo.returncode, err) == (0, "")
    assert json.loads((stage.services / "argv.json").read_text()) == [
        "up",
        "--data-dir",
        "ringfort-data/demo",
        *("--grpc", "127.0.0.1:0"),
        *("--http", "127.0.0.1:0"),
        "--json",
    ]
    headlines = [line for line in out.splitlines() if line.startswith("▸ ")]
    assert len(headlines) == 8
    assert "already there" in out
    assert out.count("served from INDEX") == 13
    assert stage.stopped_by == str(int(signal.SIGTERM))
    searches = [request for request in stage.fake.requests if isinstance(request, pb.SearchRequest)]
    assert [request.filter.text for request in searches if request.filter.text] == ["downloads_rank < 500"]
    assert [request.max_staleness_ms for request in searches if request.HasField("max_staleness_ms")] == [
        60_000
    ]
    assert len(stage.store.batches) == 2


def test_the_first_time_it_loads_everything(stage: Stage) -> None:
    created: list[Any] = []

    def create(request: pb.CreateCollectionRequest, context: Any) -> pb.Collection:
        created.append(request)
        return PACKAGES

    stage.fake.answers["CollectionService/Create"] = create
    stage.fake.answers["CollectionService/Get"] = lambda request, context: abort(
        context, ringfort.NotFound.code, "no collection"
    )
    stage.fake.answers["DocumentService/Count"] = lambda request, context: pb.CountResponse()
    demo = stage.start()
    out, err = demo.communicate(timeout=60)
    assert (demo.returncode, err) == (0, "")
    assert f"{ROWS:,} embedded, committed and searchable" in out
    assert len(stage.store.documents) == ROWS
    assert stage.store.documents["packaging"].text == "Core utilities for Python packages"
    assert stage.store.documents["packaging"].attributes["downloads_rank"].int == 2
    assert dict(created[0].attributes)["downloads_rank"] == pb.INT


def test_json_prints_every_answer_on_a_line(stage: Stage) -> None:
    demo = stage.start("--json")
    out, err = demo.communicate(timeout=60)
    assert (demo.returncode, err) == (0, "")
    told = [json.loads(line) for line in out.splitlines()]
    assert [each["step"] for each in told] == ["search"] * 7 + ["recommend"] + ["exactness"] * 5
    assert told[0]["answer"]["served_from"] == "INDEX"
    assert told[0]["request"]["text"] == "fast json parser"


def test_a_kept_service_runs_on_and_how_to_reach_it_is_told(stage: Stage) -> None:
    demo = stage.start("--keep")
    out, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0
    pid = int(out.partition("stop it with: kill ")[2].split()[0])
    assert stage.stopped_by == ""
    os.kill(pid, signal.SIGTERM)
    assert f"export RINGFORT_SERVER={stage.fake.address}" in out


def test_a_service_that_does_not_start_is_one_sentence(stage: Stage) -> None:
    demo = stage.start(address="")
    _, err = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert err == (
        "ringfort: the service did not start: the disk is full (its log: ringfort-data/demo.log)\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_the_service(stage: Stage, number: signal.Signals) -> None:
    demo = stage.start("--keep")

    def interrupt(request: Any, context: Any) -> pb.SearchResponse:
        demo.send_signal(number)
        return search_answer("ray")

    stage.fake.answers["SearchService/Search"] = interrupt
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in err
    assert "stopping the service" in out
    assert stage.stopped_by == str(int(signal.SIGTERM))


def test_a_failure_in_the_middle_stops_the_service(stage: Stage) -> None:
    stage.fake.answers["SearchService/Search"] = lambda request, context: abort(
        context, ringfort.Internal.code, "something broke"
    )
    demo = stage.start("--keep")
    _, err = demo.communicate(timeout=60)
    assert (demo.returncode, err) == (1, "ringfort: something broke\n")
    assert stage.stopped_by == str(int(signal.SIGTERM))
