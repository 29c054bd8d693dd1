"""SIGKILL in the middle of a load: what was acknowledged is there, and the same command completes."""

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from command_line import Running, all_gone, environment, eventually
from killable import Killable

from ringfort import Client

CORPUS = Path(__file__).parents[3] / "ringfort" / "data" / "pypi-top.tsv"
ROWS = 2_000
PACKAGES = "packages"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The first ROWS packages."""
    path = tmp_path / "packages.tsv"
    with CORPUS.open(encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, ROWS + 1)), encoding="utf-8")
    return path


@pytest.fixture
def service(data_dir: Path) -> Iterator[Killable]:
    with Killable(data_dir) as service:
        yield service


@dataclass(frozen=True)
class Package:
    """A row of the corpus, as far as it is loaded."""

    id: str
    downloads_rank: int
    summary: str


def packages(corpus: Path) -> list[Package]:
    rows = [line.split("\t") for line in corpus.read_text(encoding="utf-8").splitlines()[1:]]
    return [Package(name, int(rank), summary) for name, _, _, rank, summary in rows]


def load(service: Killable, corpus: Path) -> Running:
    columns = ("--id", "name", "--text", "summary", "--attr", "downloads_rank:int")
    return Running(
        "load", PACKAGES, corpus, *columns, "--create", "--json", "--server", service.grpc,
        cwd=corpus.parent,
        env=environment(XDG_STATE_HOME=str(corpus.parent)),
    )  # fmt: skip


def acknowledged(load: Running) -> int:
    """How many rows, in the file's order, the load has said to be written."""
    return max((int(line["acknowledged"]) for line in load.lines()), default=0)


def under_way(load: Running) -> None:
    """Returns in the middle of the load."""
    eventually(lambda: acknowledged(load), 60)


def completes(load: Running) -> None:
    assert load.wait(90) == 0, load.err
    last = load.lines()[-1]
    assert last["done"] is True
    assert (last["acknowledged"], last["failed"]) == (ROWS, 0)


def there(client: Client, written: list[Package]) -> None:
    """Every one of the packages is there, as it was written."""
    for start in range(0, len(written), 1_000):
        page = written[start : start + 1_000]
        documents = client.get(PACKAGES, [package.id for package in page])
        assert [
            document and Package(document.id, document.attributes["downloads_rank"], document.text or "")
            for document in documents
        ] == page


def whole(client: Client, corpus: Path) -> None:
    """The collection is the file: no document is missing or one too many, and searches find the last."""
    written = packages(corpus)
    there(client, written)
    assert client.count(PACKAGES) == ROWS
    hits = client.search(PACKAGES, text=written[-1].summary, k=20, exact=True)
    assert written[-1].id in [hit.id for hit in hits]


def test_a_killed_service_and_a_killed_load_lose_nothing_that_was_acknowledged(
    service: Killable, corpus: Path
) -> None:
    with load(service, corpus) as first:
        under_way(first)
        orphans = service.kill_service()
        first.process.kill()
        first.wait(10)
        written = acknowledged(first)
    assert not any(all_gone([orphan]) for orphan in orphans)
    service.start()
    assert all_gone(orphans)
    with service.client() as client:
        there(client, packages(corpus)[:written])
        assert client.count(PACKAGES) >= written
        with load(service, corpus) as again:
            completes(again)
        whole(client, corpus)
    service.stop()


def test_a_load_rides_out_a_killed_service_and_what_was_deleted_stays_deleted(
    service: Killable, corpus: Path
) -> None:
    vectors = np.eye(64, dtype=np.float32)
    kept, deleted = [f"kept-{n}" for n in range(32)], [f"deleted-{n}" for n in range(32)]
    documents = [{"id": id, "vector": vector} for id, vector in zip(kept + deleted, vectors, strict=True)]

    def only_the_kept_are_there() -> None:
        assert [document.id for document in client.get("notes", kept + deleted) if document] == kept
        assert client.count("notes") == len(kept)
        assert {document.id for document in client.scan("notes")} == set(kept)
        hits = client.search("notes", vector=vectors[-1], k=64, exact=True)
        assert {hit.id for hit in hits} == set(kept)

    with service.client() as client, load(service, corpus) as riding:
        client.create_collection("notes", dim=64)
        assert client.upsert("notes", documents).written == 64
        under_way(riding)
        assert client.delete("notes", ids=deleted).deleted == len(deleted)
        service.kill_service()
        service.start()
        only_the_kept_are_there()
        completes(riding)
        whole(client, corpus)
    # The view from nothing but the log.
    service.kill_service()
    shutil.rmtree(service.data_dir / "segments")
    service.start()
    with service.client() as client:
        only_the_kept_are_there()
        whole(client, corpus)


def test_a_load_rides_out_a_killed_postgres_and_searches_go_on(service: Killable, corpus: Path) -> None:
    with service.client() as client, load(service, corpus) as riding:
        under_way(riding)
        killed = service.kill_server("postgres")
        for n in range(20):
            assert len(client.search(PACKAGES, text=f"question {n}", k=3, cache=False)) == 3
        again = service.server("postgres")
        assert again.pid != killed.pid
        completes(riding)
        whole(client, corpus)
        assert service.server("postgres") == again
    service.stop()


def test_searches_are_answered_right_while_valkey_is_dead_or_hangs(service: Killable, corpus: Path) -> None:
    def answers(texts: range, *, cache: bool = True) -> list[list[str]]:
        # No two alike, so that each has to ask Valkey and cannot have it from memory.
        found = (client.search(PACKAGES, text=f"parser {n}", k=3, cache=cache) for n in texts)
        return [[hit.id for hit in hits] for hits in found]

    with service.client() as client, load(service, corpus) as loading:
        under_way(loading)
        service.kill_server("valkey")
        completes(loading)
        whole(client, corpus)
        right = answers(range(60), cache=False)
        service.kill_server("valkey")
        assert answers(range(20)) == right[:20]
        hanging = service.server("valkey")
        hanging.send_signal(signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            assert answers(range(20, 60)) == right[20:]
            assert time.monotonic() - began_s < 10
        finally:
            hanging.send_signal(signal.SIGCONT)
        assert answers(range(60)) == right
    service.stop()


def test_a_server_that_the_killed_service_had_not_written_down_yet_is_ended_too(service: Killable) -> None:
    orphans = service.kill_service()
    # As a kill between the start of a server and the line about it leaves it.
    (service.data_dir / "children.json").write_text("{}")
    service.start()
    assert all_gone(orphans)
    service.stop()
