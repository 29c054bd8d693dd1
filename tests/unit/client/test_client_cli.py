"""The command line: what it prints, what it exits with, and that an error is one sentence."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from client_fakes import PACKAGES, FakeService, Store, abort, search_answer

from protos.ringfort import v1 as pb
from ringfort.cli import main
from ringfort.commands import load as load_command
from ringfort.load.checkpoint import state_directory
from ringfort.version import __version__

UPSERT = "DocumentService/UpsertStream"


@pytest.fixture(autouse=True)
def _surroundings(fake: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFORT_SERVER", fake.address)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        #: Lines without the blanks that fill a table's last column.
        self.lines = [line.rstrip() for line in out.splitlines()]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str) -> Outcome:
        code = main(argv)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def _answer(fake: FakeService, method: str, message: Any) -> None:
    fake.answers[method] = lambda request, context: message


def test_the_release_is_told_without_loading_grpc() -> None:
    program = (
        "import sys; from ringfort.cli import main; code = main(['--version']);"
        "print(sorted({'grpc', 'numpy', 'google.protobuf', 'rich'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"ringfort {__version__}\n[]\n"


def test_without_a_command_it_says_what_there_is(run: Any) -> None:
    outcome = run()
    assert outcome.code == 0
    assert set(re.findall(r"^│ (\w+)", outcome.out, re.MULTILINE)) == {
        *("up", "demo", "top", "profile", "cache", "cluster", "jobs", "models"),
        *("search", "recommend", "embed"),
        *("collections", "create", "reindex", "activate", "rollback"),
        *("load", "count", "get", "scan", "delete"),
    }


def test_search_shows_a_table_and_where_it_came_from(fake: FakeService, run: Any) -> None:
    _answer(fake, "SearchService/Search", search_answer("ray", "faiss-cpu", served_from=pb.L1))
    options = ("-k", "2", "--filter", "rank < 5", "--exact", "--recall", "0.75")
    outcome = run("search", "packages", "vectors", *options)
    assert outcome.code == 0
    assert outcome.lines[0].split() == ["#", "id", "score", "text", "attributes"]
    assert re.fullmatch(r" 1  ray +1\.0000  about ray +rank 0", outcome.lines[1])
    assert re.fullmatch(r" 2  faiss-cpu +0\.8750  about faiss-cpu +rank 1", outcome.lines[2])
    assert outcome.lines[3:] == ["3.2 ms · served from L1"]
    (request,) = fake.requests
    assert (request.k, request.filter.text, request.exact, request.recall) == (2, "rank < 5", True, 0.75)


def test_a_partial_answer_is_marked(fake: FakeService, run: Any) -> None:
    answer = search_answer()
    answer.coverage.shards_answered = 1
    _answer(fake, "SearchService/Search", answer)
    assert run("search", "c", "t").lines == [
        "no hits",
        "3.2 ms · served from INDEX · partial: 1 of 2 shards answered",
    ]


def test_search_explains_itself(fake: FakeService, run: Any) -> None:
    _answer(fake, "SearchService/Search", search_answer("ray"))
    facts = dict(line.split(maxsplit=1) for line in run("search", "c", "t", "--explain").lines[4:])
    assert facts == {
        "generation": "1",
        "space": "s1",
        "variant": "v1",
        "epoch": "3",
        "coverage": "2 of 2 shards",
        "total": "3.25 ms",
        "embed": "2.00 ms",
        "search": "1.00 ms",
    }


def test_a_text_is_never_taken_for_markup(fake: FakeService, run: Any) -> None:
    answer = search_answer("a[b]")
    answer.hits[0].text = "[bold]not markup[/nor this]"
    _answer(fake, "SearchService/Search", answer)
    outcome = run("search", "c", "t")
    assert "[bold]not markup[/nor this]" in outcome.out
    assert "a[b]" in outcome.out


def test_json_is_the_answer_with_numbers_and_defaults(fake: FakeService, run: Any) -> None:
    _answer(fake, "DocumentService/Count", pb.CountResponse())
    assert run("count", "c", "--json").out == '{"count": 0}\n'
    _answer(fake, "SearchService/Search", search_answer("ray"))
    answer = run("search", "c", "t", "--json").json
    assert answer["served_from"] == "INDEX"
    assert answer["epoch"] == 3
    assert answer["hits"][0]["version"] == {"term": 1, "seq": 1}
    assert answer["timings"]["rank_ms"] == 0


def test_count_is_a_bare_number(fake: FakeService, run: Any) -> None:
    _answer(fake, "DocumentService/Count", pb.CountResponse(count=14690))
    assert run("count", "c").out == "14690\n"


def test_collections(fake: FakeService, run: Any) -> None:
    _answer(fake, "CollectionService/List", pb.ListCollectionsResponse(collections=[PACKAGES]))
    outcome = run("collections")
    assert outcome.lines[1].split()[:7] == [
        "packages",
        "(pypi)",
        "all-minilm-l6-v2@1",
        "384",
        "cosine",
        "2",
        "1",
    ]
    assert "name:keyword rank:int" in outcome.lines[1]
    assert run("collections", "--json").json["collections"][0]["attributes"] == {
        "rank": "INT",
        "name": "KEYWORD",
    }


def test_create(fake: FakeService, run: Any) -> None:
    _answer(fake, "CollectionService/Create", PACKAGES)
    outcome = run("create", "packages", "--attr", "rank:int", "--attr", "name:keyword", "--metric", "l2")
    assert outcome.out == (
        "created packages: 384 dimensions, cosine, model all-minilm-l6-v2@1, 2 shards with 1 replica\n"
    )
    assert dict(fake.requests[0].attributes) == {"rank": pb.INT, "name": pb.KEYWORD}
    assert fake.requests[0].metric == pb.L2


def test_get_shows_documents_and_fails_for_missing_ones(fake: FakeService, run: Any) -> None:
    document = pb.Document(
        id="ray",
        text="scales",
        attributes={"n": pb.Value(float=0.5), "t": pb.Value(keywords=pb.KeywordList(values=["a", "b"]))},
        version=pb.Version(term=1, seq=9),
    )
    _answer(fake, "DocumentService/Get", pb.GetResponse(documents=[document], missing=["x"]))
    outcome = run("get", "c", "ray", "x")
    assert outcome.code == 1
    assert outcome.lines == ["ray  version 1.9", "  text  scales", "  n     0.5", "  t     a, b"]
    assert outcome.err == "ringfort: no document named 'x' in c\n"


def test_scan_prints_a_document_a_line_up_to_the_limit(fake: FakeService, run: Any) -> None:
    def scan(request: pb.ScanRequest, context: Any) -> pb.ScanResponse:
        start = int(request.page_token or 0)
        documents = [pb.Document(id=str(start + n)) for n in range(2)]
        return pb.ScanResponse(documents=documents, next_page_token=str(start + 2))

    fake.answers["DocumentService/Scan"] = scan
    lines = run("scan", "c", "--limit", "5", "--json").lines
    assert [json.loads(line)["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    table = run("scan", "c", "--limit", "3").lines
    assert [line.split()[0] for line in table] == ["id", "0", "1", "2"]


def test_delete(fake: FakeService, run: Any) -> None:
    _answer(fake, "DocumentService/Delete", pb.DeleteResponse(deleted=1))
    assert run("delete", "c", "a").out == "deleted 1 document\n"
    assert list(fake.requests[0].ids) == ["a"]
    _answer(fake, "CollectionService/Delete", pb.DeleteCollectionResponse())
    assert run("delete", "c", "--drop", "--yes").out == "deleted c\n"


def test_a_collection_is_not_dropped_unless_confirmed(
    fake: FakeService, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    outcome = run("delete", "c", "--drop")
    assert outcome.code == 1
    assert "nothing was done" in outcome.err
    assert fake.requests == []


def test_recommend(fake: FakeService, run: Any) -> None:
    answer = pb.RecommendResponse(
        hits=[pb.Hit(id="httpx", score=0.5, text="http", features={"similarity": 0.5, "rank": 1})],
        stages=[
            pb.Stage(name="retrieve", took_ms=2, candidates=100),
            pb.Stage(name="rank", took_ms=0.25, candidates=10),
            pb.Stage(name="diversify", skipped="not asked for"),
        ],
        ranker="shop@2",
    )
    _answer(fake, "SearchService/Recommend", answer)
    outcome = run(
        "recommend", "c", "--like", "a", "--unlike", "b", "--weight", "rank=-0.5", "--mmr", "0.5", "--explain"
    )
    assert outcome.code == 0
    assert (
        outcome.lines[2] == "retrieve 100 in 2.0 ms → rank 10 in 0.2 ms → diversify skipped (not asked for)"
    )
    assert outcome.lines[5].split() == ["id", "rank", "similarity"]
    assert outcome.lines[6].split() == ["httpx", "1.000", "0.500"]
    assert ["ranker", "shop@2"] in [line.split() for line in outcome.lines]
    (request,) = fake.requests
    assert (request.like[0].id, request.unlike[0].id) == ("a", "b")
    assert dict(request.rank.features) == {"rank": -0.5}
    assert not request.diversity.per_group


def test_embed(fake: FakeService, run: Any) -> None:
    vectors = np.array([[1, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0]], "<f4")
    answer = pb.EmbedResponse(
        vectors=pb.Matrix(data=vectors.tobytes(), rows=2, dim=5),
        rows=[pb.EmbedRow(tokens=3), pb.EmbedRow(tokens=256, truncated=True)],
        model="m@1",
        space="s",
        timings=pb.Timings(total_ms=1.5),
    )
    _answer(fake, "EmbeddingService/Embed", answer)
    lines = run("embed", "one", "two").lines
    assert re.fullmatch(
        r"one +3 +1\.0000  \[\+1\.0000, \+0\.0000, \+0\.0000, \+0\.0000, … 5 in all\]", lines[1]
    )
    assert lines[2].split()[:4] == ["two", "256", "(cut)", "0.6000"]
    assert lines[3] == "1.5 ms · m@1 · space s"


def test_a_change_of_shards_is_followed_until_it_has_ended(fake: FakeService, run: Any) -> None:
    job = pb.Job(id="j1", kind="add-shard", collection="packages", state=pb.Job.RUNNING, done=1, total=4)
    ended = pb.Job(id="j1", kind="add-shard", collection="packages", state=pb.Job.SUCCEEDED, done=4, total=4)
    _answer(fake, "ClusterService/AddShard", job)
    _answer(fake, "IndexService/GetJob", ended)
    lines = run("cluster", "add-shard", "packages").lines
    assert lines[1].split() == ["j1", "add-shard", "packages", "succeeded", "4/4"]
    told = [json.loads(line) for line in run("cluster", "add-shard", "packages", "--json").lines]
    assert [(each["state"], each["done"]) for each in told] == [("RUNNING", 1), ("SUCCEEDED", 4)]
    ended.state, ended.message = pb.Job.FAILED, "no room"
    _answer(fake, "IndexService/GetJob", ended)
    assert run("jobs", "watch", "j1").code == 1


def test_cluster_describe(fake: FakeService, run: Any) -> None:
    answer = pb.DescribeResponse(
        version="0.1.0",
        composition="embedded",
        uptime_s=3723,
        limits=pb.Limits(max_k=1000),
        components=[pb.Component(name="postgres", state="up", detail="18.6")],
        collections=[
            pb.CollectionStatus(
                name="packages",
                watermark=1200,
                replicas=[
                    pb.Replica(
                        shard=1, state="serving", position=1000, documents=14690, pending_rows=4096, slots=64
                    )
                ],
            )
        ],
    )
    _answer(fake, "ClusterService/Describe", answer)
    lines = run("cluster", "describe").lines
    assert lines[0] == "ringfort 0.1.0  embedded · up 1 h 2 min"
    assert lines[3].split() == ["postgres", "up", "18.6"]
    assert lines[6].split() == [
        "packages",
        "1",
        "0",
        "serving",
        *["64", "14,690", "0", "0", "4,096", "1,000", "200"],
    ]
    assert lines[-1] == "k ≤ 1,000"


def test_cluster_describe_names_the_databases_where_there_are_several(fake: FakeService, run: Any) -> None:
    logs = [pb.LogStatus(database="home", watermark=30), pb.LogStatus(database="east", watermark=7)]
    replicas = [
        pb.Replica(state="serving", database=log.database, position=log.watermark - 2, slots=8)
        for log in logs
    ]
    status = pb.CollectionStatus(name="packages", watermark=37, logs=logs, replicas=replicas)
    away = pb.Component(name="postgres east", state="away", detail="no server")
    _answer(fake, "ClusterService/Describe", pb.DescribeResponse(collections=[status], components=[away]))
    lines = run("cluster", "describe").lines
    assert lines[3].split() == ["postgres", "east", "away", "no", "server"]
    assert [line.split()[3:5] + line.split()[-2:] for line in lines[6:8]] == [
        ["home", "serving", "28", "2"],
        ["east", "serving", "5", "2"],
    ]


def test_cluster_describe_says_what_is_wrong_with_a_replica(fake: FakeService, run: Any) -> None:
    replica = pb.Replica(state="disk_full", detail="No space left on device")
    answer = pb.DescribeResponse(collections=[pb.CollectionStatus(name="packages", replicas=[replica])])
    _answer(fake, "ClusterService/Describe", answer)
    told = " ".join(run("cluster", "describe").lines)
    assert "disk_full" in told
    assert "No space left on device" in told


def test_cluster_cache(fake: FakeService, run: Any) -> None:
    answer = pb.CacheStatsResponse(
        tiers=[
            pb.TierStats(name="L1", hits=3, misses=1, entries=2, bytes=3 * 1024 * 1024, state="up"),
            pb.TierStats(name="REDIS", state="off", eviction_storms=1, removed=2_000, purges=3),
        ],
        superseded=4,
        refreshed_early=5,
    )
    _answer(fake, "ClusterService/CacheStats", answer)
    lines = run("cluster", "cache").lines
    assert lines[1].split() == ["L1", "up", "75.0%", "3", "1", "2", "3.0", "MiB", "0", "0"]
    assert lines[2].split() == ["REDIS", "off", "–", "0", "0", "0", "0", "B", "0", "0"]
    assert lines[3] == "4 superseded by writes · 0 stampedes avoided · 5 refreshed early"
    assert lines[4] == "REDIS: 1 eviction storms, 2,000 keys removed (3 purges)"


def test_hot_keys(fake: FakeService, run: Any) -> None:
    answer = pb.HotKeysResponse(
        keys=[
            pb.HotKey(key="ab12", kind="answer", collection="packages", share=0.125, count=1_234),
            pb.HotKey(key="cd34", kind="embedding", share=0.01, count=99),
        ]
    )
    _answer(fake, "ClusterService/HotKeys", answer)
    lines = run("cluster", "hot-keys", "-n", "2").lines
    assert fake.requests[0].limit == 2
    assert lines[1].split() == ["ab12", "answer", "packages", "12.5%", "1,234"]
    assert lines[2].split() == ["cd34", "embedding", "–", "1.0%", "99"]
    _answer(fake, "ClusterService/HotKeys", pb.HotKeysResponse())
    assert run("cluster", "hot-keys").lines == ["nothing is asked for often"]


def test_the_server_may_be_named_before_or_after_the_command(
    fake: FakeService, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer(fake, "DocumentService/Count", pb.CountResponse(count=1))
    monkeypatch.setenv("RINGFORT_SERVER", "127.0.0.1:1")
    assert run("count", "c", "--server", fake.address).out == "1\n"
    assert run("--server", fake.address, "count", "c").out == "1\n"


def test_no_service_is_one_sentence(fake: FakeService, run: Any) -> None:
    fake.stop()
    outcome = run("count", "c")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err == (
        f"ringfort: no service answers at {fake.address} (Connection refused); "
        "`ringfort up` starts a service\n"
    )


def test_an_error_of_the_service_is_one_sentence_or_json(fake: FakeService, run: Any) -> None:
    fake.answers["SearchService/Search"] = lambda request, context: abort(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        "filter: there is no attribute 'x'",
        field="filter",
        reason="INVALID_FILTER",
    )
    outcome = run("search", "c", "t", "--filter", "x = 1")
    assert (outcome.code, outcome.err) == (1, "ringfort: filter: there is no attribute 'x'\n")
    outcome = run("search", "c", "t", "--filter", "x = 1", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert json.loads(outcome.err) == {
        "error": {
            "code": "INVALID_ARGUMENT",
            "message": "filter: there is no attribute 'x'",
            "field": "filter",
            "reason": "INVALID_FILTER",
        }
    }


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["count"],
        ["count", "c", "--nonsense"],
        ["search", "c", "t", "-k", "0"],
        ["search", "c", "t", "--mode", "fuzzy"],
        ["create", "c", "--attr", "rank:money"],
        ["create", "c", "--attr", "rank"],
        ["recommend", "c", "--like", "a", "--weight", "rank"],
        ["recommend", "c"],
        ["delete", "c"],
        ["delete", "c", "a", "--drop"],
        ["load", "c", "f.tsv"],
        ["up", "--shards", "0"],
    ],
    ids=" ".join,
)
def test_a_misused_command_exits_2_with_a_sentence(run: Any, argv: list[str]) -> None:
    outcome = run(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"ringfort: [^\n]+ \(see ringfort[a-z ]* --help\)\n", outcome.err)
    error = json.loads(run(*argv, "--json").err)["error"]
    assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "USAGE")


def test_a_bug_is_one_sentence_too(fake: FakeService, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*args: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("ringfort.terminal.ask", break_down)
    outcome = run("count", "c")
    assert outcome.code == 1
    assert re.fullmatch(r"ringfort: unexpected KeyError at .*test_client_cli.py:\d+: 'oops'\n", outcome.err)


def test_ctrl_c_exits_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ringfort.terminal.ask", interrupt)
    assert run("count", "c").code == 130


def test_a_reader_that_leaves_is_no_error_to_talk_about(fake: FakeService) -> None:
    documents = [pb.Document(id=str(n), text="x" * 1000) for n in range(500)]
    _answer(fake, "DocumentService/Scan", pb.ScanResponse(documents=documents))
    scan = subprocess.Popen(
        [sys.executable, "-m", "ringfort", "scan", "c", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert scan.stdout is not None
    assert scan.stderr is not None
    with scan.stdout, scan.stderr:
        scan.stdout.readline()
        scan.stdout.close()
        assert scan.stderr.read() == b""
        assert scan.wait(10) == 1


def test_up_becomes_the_service_with_the_options_as_given(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("os.execv", lambda path, args: seen.append((path, args)))
    run("up")
    run("up", "--data-dir", "d", "--grpc", "127.0.0.1:0", "--shards", "2", "--insecure", "--json")
    up = [sys.executable, "-P", "-m", "services", "up"]
    assert seen == [
        (sys.executable, up),
        (
            sys.executable,
            [*up, "--data-dir", "d", "--grpc", "127.0.0.1:0", "--shards", "2", "--insecure", "--json"],
        ),
    ]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.tsv"
    path.write_text("id\ttext\trank\na\tone\t1\nb\ttwo\tx\nc\tthree\t3\n")
    return path


LOAD = ["--id", "id", "--text", "text", "--attr", "rank:int"]


def test_load_creates_and_tells_what_was_refused(fake: FakeService, run: Any, rows: Path) -> None:
    store = Store()
    fake.answers[UPSERT] = store
    fake.answers["CollectionService/Get"] = lambda request, context: abort(
        context, grpc.StatusCode.NOT_FOUND, "no collection named 'c'"
    )
    outcome = run("load", "c", str(rows), *LOAD)
    assert (outcome.code, outcome.err) == (1, "ringfort: no collection named 'c'; --create makes it\n")

    _answer(fake, "CollectionService/Create", PACKAGES)
    outcome = run("load", "c", str(rows), *LOAD, "--create")
    assert outcome.code == 1
    assert outcome.out.startswith("2 documents loaded into c, ")
    assert outcome.err == "ringfort: 1 row was refused, the first: row 2: rank: 'x' is no int\n"
    assert {id: document.attributes["rank"].int for id, document in store.documents.items()} == {
        "a": 1,
        "c": 3,
    }
    created = next(request for request in fake.requests if isinstance(request, pb.CreateCollectionRequest))
    assert dict(created.attributes) == {"rank": pb.INT}


@pytest.mark.parametrize(
    ("attr", "says"),
    [
        ("text:keyword", "text is undeclared in packages, not keyword"),
        ("rank:bool", "rank is int in packages"),
    ],
)
def test_load_refuses_attributes_the_collection_does_not_have(
    fake: FakeService, run: Any, rows: Path, attr: str, says: str
) -> None:
    _answer(fake, "CollectionService/Get", PACKAGES)
    outcome = run("load", "c", str(rows), "--id", "id", "--attr", attr)
    assert outcome.code == 1
    assert says in outcome.err


def test_load_tells_its_progress_in_json(
    fake: FakeService, run: Any, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfort.load.progress._TELL_EVERY_S", 0.05)
    wait = threading.Event()
    fake.answers[UPSERT] = Store(lambda number, request, context: wait.wait(0.3) and None)
    _answer(fake, "CollectionService/Get", PACKAGES)
    outcome = run("load", "c", str(rows), *LOAD, "--batch", "1", "--json")
    told = [json.loads(line) for line in outcome.lines]
    assert len(told) > 3
    assert all({"acknowledged", "failed", "rate", "total"} <= each.keys() for each in told)
    assert told[-1].pop("rate") > 0
    assert told[-1] == {
        "acknowledged": 2,
        "failed": 1,
        "total": 3,
        "done": True,
        "problems": ["row 2: rank: 'x' is no int"],
    }


def test_load_gives_up_on_a_service_that_stays_away(
    fake: FakeService, run: Any, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_command, "PATIENCE_S", 1.2)
    fake.stop()
    outcome = run("load", "c", str(rows), *LOAD)
    assert outcome.code == 1
    assert outcome.err.startswith(
        f"no service answers at {fake.address} yet, trying for 1 s\nringfort: no service"
    )
    outcome = run("load", "c", str(rows), *LOAD, "--json")
    assert outcome.code == 1
    assert len(outcome.lines) >= 2
    assert json.loads(outcome.lines[0]) == {"acknowledged": 0, "failed": 0, "rate": 0.0, "total": None}
    assert json.loads(outcome.err)["error"]["code"] == "UNAVAILABLE"


def test_an_interrupted_load_says_how_far_it_came_and_goes_on(fake: FakeService, tmp_path: Path) -> None:
    path = tmp_path / "many.tsv"
    path.write_text("id\ttext\n" + "".join(f"{n}\ttext {n}\n" for n in range(40)))
    reached, release = threading.Event(), threading.Event()

    def hold(number: int, request: pb.UpsertRequest, context: Any) -> None:
        if number == 3:
            reached.set()
            release.wait(10)

    _answer(fake, "CollectionService/Get", PACKAGES)
    fake.answers[UPSERT] = Store(hold)
    command = [sys.executable, "-m", "ringfort", "load", "c", str(path), "--id", "id", "--text", "text"]
    first = subprocess.Popen([*command, "--batch", "10"], stderr=subprocess.PIPE, text=True)
    assert reached.wait(20)
    deadline_s = time.monotonic() + 10
    while not any(state_directory().glob("*.json")) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=20)
    release.set()
    assert first.returncode == 130
    told = re.fullmatch(
        r"ringfort: interrupted; (\d+) of 40 rows are done, and the same command goes on from there\n", err
    )
    assert told
    # How many of the two acknowledgements were read is the first process's own affair.
    done = int(told[1])
    assert done in (0, 10, 20)

    rest = Store()
    fake.answers[UPSERT] = rest
    second = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert second.stderr == (f"going on after row {done}\n" if done else "")
    assert list(rest.documents) == [str(n) for n in range(done, 40)]
    assert list(state_directory().iterdir()) == []


def test_a_restarted_load_starts_over(fake: FakeService, run: Any, rows: Path) -> None:
    _answer(fake, "CollectionService/Get", PACKAGES)

    def stop_at_second(number: int, request: Any, context: grpc.ServicerContext) -> None:
        if number == 2:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "enough")

    for restart, expected in (([], ["c"]), (["--restart"], ["a", "c"])):
        fake.answers[UPSERT] = Store(stop_at_second)
        assert run("load", "c", str(rows), *LOAD, "--batch", "1", "--restart").code == 1
        rest = Store()
        fake.answers[UPSERT] = rest
        run("load", "c", str(rows), *LOAD, "--batch", "1", *restart)
        assert list(rest.documents) == expected


def test_a_state_directory_that_cannot_be_written_is_no_reason_to_stop(
    fake: FakeService, run: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    _answer(fake, "CollectionService/Get", PACKAGES)
    store = Store()
    fake.answers[UPSERT] = store
    outcome = run("load", "c", str(rows), "--id", "id", "--text", "text")
    assert outcome.code == 0
    assert outcome.err.startswith("ringfort: an interrupted load will start over: ")
    assert len(store.documents) == 3


def test_a_file_that_is_not_there(run: Any) -> None:
    outcome = run("load", "c", "nowhere.tsv", "--id", "id")
    assert (outcome.code, outcome.err) == (1, "ringfort: nowhere.tsv: No such file or directory\n")


class TestCacheWarm:
    """`cache warm`, from a log and from what is hot."""

    def test_a_query_log_is_asked_line_by_line(self, fake: FakeService, run: Any, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text('first text\n\n{"text": "second", "k": 3, "filter": {"text": "a < 1"}}\nthird\n')
        tiers = iter((pb.INDEX, pb.L1, pb.INDEX))
        fake.answers["SearchService/Search"] = lambda *_: pb.SearchResponse(served_from=next(tiers))
        told = run("cache", "warm", "packages", "--queries", str(log), "--rate", "1000", "--json")
        assert [(r.collection, r.text, r.k, r.filter.text) for r in fake.requests] == [
            ("packages", "first text", 0, ""),
            ("packages", "second", 3, "a < 1"),
            ("packages", "third", 0, ""),
        ]
        assert json.loads(told.lines[-1]) == {"computed": 2, "cached": 1, "failed": 0}
        assert told.code == 0

    def test_no_more_than_the_limit_is_asked(self, fake: FakeService, run: Any, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text("".join(f"{i}\n" for i in range(100)))
        _answer(fake, "SearchService/Search", pb.SearchResponse())
        told = run("cache", "warm", "c", "--queries", str(log), "--rate", "1000", "--limit", "7")
        assert told.lines == ["7 answers computed, 0 were in the cache, 0 failed"]
        assert len(fake.requests) == 7

    def test_a_line_that_is_no_request_is_named(self, fake: FakeService, run: Any, tmp_path: Path) -> None:
        log = tmp_path / "log"
        log.write_text('{"text": "fine"}\n{"texts": "?"}\n')
        _answer(fake, "SearchService/Search", pb.SearchResponse())
        told = run("cache", "warm", "c", "--queries", str(log), "--rate", "1000")
        assert told.code == 1
        assert "line 2" in told.err

    def test_hot_answers_are_computed_a_second_s_worth_at_a_time(self, fake: FakeService, run: Any) -> None:
        answers = iter(
            (
                pb.WarmCacheResponse(known=12, computed=5, left=5),
                pb.WarmCacheResponse(known=12, computed=4, failed=1, left=1),
            )
        )
        fake.answers["ClusterService/WarmCache"] = lambda *_: next(answers)
        told = run("cache", "warm", "c", "--hot-keys", "--rate", "5", "--json")
        assert [(r.limit, r.rate) for r in fake.requests] == [(5, 5.0), (5, 5.0)]
        assert json.loads(told.lines[-1]) == {"computed": 9, "cached": 2, "failed": 1}

    def test_where_nothing_could_be_computed_it_fails(self, fake: FakeService, run: Any) -> None:
        _answer(fake, "ClusterService/WarmCache", pb.WarmCacheResponse(known=3, failed=3, left=3))
        assert run("cache", "warm", "c").code == 1

    def test_one_source_at_a_time(self, run: Any) -> None:
        assert run("cache", "warm", "c", "--hot-keys", "--queries", "x").code == 2
