"""Ingest: what is left of the engine's rate, and of COPY's, when documents go through the service."""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import LiteralString, NamedTuple

import grpc
import numpy as np
import psycopg
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from psycopg.types.json import Jsonb

from loadtests.corpus import ATTRIBUTES, Package
from loadtests.engine import by_length
from loadtests.run import Run, settled
from loadtests.scoreboard import Measured
from loadtests.service import Service
from loadtests.timing import alone, median, ratio, take_turns, wall_s
from loadtests.writer import Writer
from ringfort import Client, __version__
from services.data_dir import DataDir
from services.supervisor import Supervisor

#: Most documents of one round.
_DOCUMENTS, _QUICK_DOCUMENTS = 20_000, 400
_VECTOR_BATCH = 512
#: Documents a second that are written beside searches, where it is not as many as can be.
_PACED_PER_S = 5_000.0
#: Searches beside ingest last so many times as long as one side of a round.
_SEARCHED_ROUNDS = 5
#: Turns of searches alone and beside ingest, at most.
_SEARCHED_TURNS = 3
_K = 10
_CREATE: LiteralString = """
CREATE TABLE copied (
    id         text COLLATE "C" PRIMARY KEY,
    text       text,
    attributes jsonb NOT NULL,
    vector     bytea STORAGE EXTERNAL NOT NULL
)
"""
_COPY: LiteralString = "COPY copied (id, text, attributes, vector) FROM STDIN (FORMAT BINARY)"


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    packages = run.packages[: run.sized(_DOCUMENTS, _QUICK_DOCUMENTS)]
    vectors = run.vectors[: len(packages)]
    with _servers(run) as (service, postgres_url), Client(service.grpc, timeout_s=120) as client:
        yield _texts(run, client, packages)
        yield _vectors(run, client, packages, vectors, postgres_url)


@contextmanager
def _servers(run: Run) -> Iterator[tuple[Service, str]]:
    """A service of its own on a Postgres that COPY can reach too, and that Postgres's URL."""
    data_dir = DataDir.open(run.scratch / "postgres", release=__version__)
    supervisor = Supervisor(data_dir)
    try:
        with asyncio.Runner() as runner:
            try:
                url = runner.run(supervisor.start_postgres())
                with run.start(run.new_data_dir("ingest"), RINGFORT_METADATA__POSTGRES_URL=url) as service:
                    yield service, url
            finally:
                runner.run(supervisor.stop())
    finally:
        data_dir.close()


class _P99(NamedTuple):
    """The slowest hundredth of searches, and of empty calls to an idle service."""

    search_ms: float
    idle_ms: float


class _Loads:
    """One load after another, each into a new collection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._numbers = itertools.count()
        #: Of the last load, at its end: positions committed but not yet searchable, rows that await upkeep.
        self.debt: dict[str, int] = {}

    def seconds(self, documents: Iterable[dict[str, object]], *, wait: str, batch: int) -> float:
        """How long the documents take; one that is refused is an error."""
        name = f"load-{next(self._numbers)}"
        self._client.create_collection(name, attributes=ATTRIBUTES)
        try:
            return wall_s(lambda: self._load(name, documents, wait, batch))
        finally:
            self._client.delete_collection(name)

    def _load(self, name: str, documents: Iterable[dict[str, object]], wait: str, batch: int) -> None:
        result = self._client.upsert(name, documents, wait=wait, batch=batch)
        if result.failures:
            raise RuntimeError(f"{len(result.failures)} documents were refused, first {result.failures[0]}")
        [status] = [each for each in self._client.cluster().collections if each.name == name]
        [replica] = status.replicas
        self.debt = {
            "positions_behind": status.watermark - replica.position,
            "memtable_rows": replica.memtable_rows,
            "pending_rows": replica.pending_rows,
            "segments": replica.segments,
        }


def _texts(run: Run, client: Client, packages: Sequence[Package]) -> Measured:
    loads = _Loads(client)
    ids: list[np.ndarray] = []
    tokenize_s = wall_s(lambda: ids.extend(run.engine.tokenize([package.summary for package in packages])))
    batches = by_length(ids)
    # A load is long; a short one warms both sides up.
    loads.seconds((package.document() for package in packages[:256]), wait="VISIBLE", batch=256)
    run.engine.run(by_length(ids[:256]))
    ours, engines = take_turns(
        run.rounds,
        lambda: loads.seconds((package.document() for package in packages), wait="VISIBLE", batch=256),
        lambda: run.engine.run(batches).seconds,
        warm_up=False,
    )
    detail = {
        "unit": "texts a second, visible; the engine's texts were tokenized before",
        "documents": len(packages),
        "threads": run.engine.threads,
        "service": len(packages) / median(ours),
        "engine": len(packages) / median(engines),
        "tokenizing_s": tokenize_s,
        "tokens_per_text": sum(map(len, ids)) / len(ids),
        "debt": loads.debt,
    }
    return Measured("ingest.text_vs_engine", ratio(engines, ours), detail)


def _vectors(
    run: Run, client: Client, packages: Sequence[Package], vectors: np.ndarray, postgres_url: str
) -> Measured:
    loads = _Loads(client)
    rows = [
        (package.name, package.summary, Jsonb(package.attributes), vector.tobytes())
        for package, vector in zip(packages, vectors, strict=True)
    ]

    def ours() -> float:
        documents = (package.document(vector) for package, vector in zip(packages, vectors, strict=True))
        return loads.seconds(documents, wait="DURABLE", batch=_VECTOR_BATCH)

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA copies")
        connection.execute("SET search_path TO copies")

        def copy() -> float:
            connection.execute(_CREATE)
            try:
                return wall_s(lambda: _copy(connection, rows))
            finally:
                connection.execute("DROP TABLE copied")

        ours_s, copy_s = take_turns(run.rounds, ours, copy)
    detail = {
        "unit": "documents a second with text, attributes and vector, durable",
        "documents": len(rows),
        "batch": _VECTOR_BATCH,
        "service": len(rows) / median(ours_s),
        "copy": len(rows) / median(copy_s),
        "debt": loads.debt,
        **_searched_meanwhile(run, client, packages, vectors),
    }
    return Measured("ingest.vectors_vs_copy", ratio(copy_s, ours_s), detail)


def _searched_meanwhile(
    run: Run, client: Client, packages: Sequence[Package], vectors: np.ndarray
) -> dict[str, float]:
    """What one caller's searches take while nothing is written, some ready vectors, and as many as go.

    And what an empty call to another, idle service takes meanwhile: with that the processors alone, which all
    share, have to do.
    """
    client.create_collection("searched", attributes=ATTRIBUTES)
    first = (package.document(vector) for package, vector in zip(packages, vectors, strict=True))
    client.upsert("searched", first, batch=_VECTOR_BATCH)
    settled(client, "searched")

    def search(number: int) -> object:
        return client.search("searched", vector=vectors[number % len(vectors)], k=_K, cache=False)

    def searched() -> float:
        return alone(_SEARCHED_ROUNDS * run.seconds, search).quantile_ms(0.99)

    def while_writing(writer: Writer, most_per_s: float, measured: Callable[[], _P99]) -> tuple[_P99, float]:
        """What is measured, and the documents a second that were written meanwhile."""
        writer.start(most_per_s)
        try:
            p99 = measured()
        finally:
            per_s = writer.stop()
        return p99, per_s

    with (
        run.start(run.new_data_dir("idle")) as idle,
        grpc.insecure_channel(idle.grpc) as channel,
        Writer(client.server, "searched", packages, vectors, batch=_VECTOR_BATCH) as writer,
    ):
        check, nothing = HealthStub(channel).Check, HealthCheckRequest()

        def both() -> _P99:
            idle_ms = alone(_SEARCHED_ROUNDS * run.seconds, lambda _: check(nothing, timeout=60))
            return _P99(searched(), idle_ms.quantile_ms(0.99))

        def quiet() -> _P99:
            settled(client, "searched")
            return both()

        quiet_p99, paced = take_turns(
            min(run.rounds, _SEARCHED_TURNS),
            quiet,
            lambda: while_writing(writer, _PACED_PER_S, both),
            warm_up=False,
        )
        flat_out, flat_out_per_s = while_writing(writer, math.inf, both)
    client.delete_collection("searched")
    quiet_ms = [p99.search_ms for p99 in quiet_p99]
    paced_ms = [p99.search_ms for p99, _ in paced]
    return {
        "search_p99_ms_quiet": median(quiet_ms),
        "search_p99_ms_paced": median(paced_ms),
        "search_p99_paced_over_quiet": ratio(paced_ms, quiet_ms),
        "empty_call_elsewhere_p99_paced_over_quiet": ratio(
            [p99.idle_ms for p99, _ in paced], [p99.idle_ms for p99 in quiet_p99]
        ),
        "written_paced_per_s": median(per_s for _, per_s in paced),
        "search_p99_ms_flat_out": flat_out.search_ms,
        "search_p99_flat_out_over_quiet": flat_out.search_ms / median(quiet_ms),
        "written_flat_out_per_s": flat_out_per_s,
    }


def _copy(connection: "psycopg.Connection[tuple[object, ...]]", rows: Iterable[Sequence[object]]) -> None:
    with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(["text", "text", "jsonb", "bytea"])
        for row in rows:
            copy.write_row(row)
