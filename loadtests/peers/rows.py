"""The rows `search.vs_peer.*`: this service over each peer, at the recall the service has by default.

A peer and its callers run in `.venv-bench`; whatever is not installed there says so and has no value.
"""

import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import numpy as np
import psutil

from index_builder.models.source import packaged_model
from loadtests.callers import Callers
from loadtests.corpus import BUCKETS, new_texts
from loadtests.peers.process import BATCH_ROWS, K
from loadtests.rivals import PYTHON, ROOT
from loadtests.run import Run, settled
from loadtests.scoreboard import PEERS, Measured
from loadtests.timing import median, ratio, take_turns
from ringfort import Client, __version__
from ringfort.results import SearchResult
from services.data_dir import DataDir
from services.supervisor import Supervisor

ABSENT = "needs .venv-bench with the peers: make bench RIVALS=1"
LOADS = ("c1", "c16", "batch32", "filter1")
_COLLECTION, _TEXTS = "peers", "peers-texts"
_TEXT_CALLERS = 16
#: torch takes its time to be imported, and a graph to be built.
_START_LIMIT_S = 300.0
#: Of the vectors, and how far below it a peer that cannot reach it is still compared.
_ENOUGH, _SHORT = 0.99, 0.03
_BELOW = BUCKETS // 100


class PeerFailed(RuntimeError):
    """A peer could not do what was asked; one sentence."""


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    names = [f"search.vs_peer.{peer}.{load}" for peer in PEERS for load in (*LOADS, "ingest")]
    if not PYTHON.exists():
        names.append("e2e.text_search_vs_stack")
        yield from (Measured(name, None, why=ABSENT) for name in names)
        return
    ours = _Ours(run)
    with ExitStack() as stack:
        url = stack.enter_context(_Postgres(run.scratch / "peer-servers")).url
        material = run.scratch / "peers.npz"
        np.savez(material, vectors=ours.vectors, buckets=ours.buckets, queries=ours.queries)
        ours.load()
        stack.callback(ours.close)
        recall = ours.recall()
        for peer in PEERS:
            try:
                yield from _against(run, ours, peer, material, url, recall)
            except PeerFailed as error:
                for load in (*LOADS, "ingest"):
                    yield Measured(f"search.vs_peer.{peer}.{load}", None, why=str(error))
        yield _against_a_stack(run, ours, material)


def _against(
    run: Run, ours: "_Ours", name: str, material: Path, url: str, recall: float
) -> Iterator[Measured]:
    directory = run.scratch / f"peer-{name}"
    directory.mkdir()
    with _Peer(name, directory, material, url) as peer:
        before = peer.resident_bytes()
        ingest = peer.ask(do="load")["per_s"]
        tuned = peer.ask(do="tune", recall=min(recall, _ENOUGH), below=_BELOW)
        detail = {
            **tuned,
            "service_recall": recall,
            "documents": len(ours.vectors),
            "bytes_per_vector": (peer.resident_bytes() - before) / len(ours.vectors),
        }
        if tuned["recall"] < min(recall, _ENOUGH) - _SHORT:
            raise PeerFailed(
                f"{name} reaches a recall of {tuned['recall']:.3f} at most, {recall:.3f} is asked"
            )
        told = {
            "unit": "vectors a second until indexed",
            "service": ours.ingest,
            "service_until_searchable": ours.visible,
            "peer": ingest,
        }
        yield Measured(f"search.vs_peer.{name}.ingest", ours.ingest / ingest, told | detail)
        for load in LOADS:

            def theirs(load: str = load) -> float:
                return float(peer.ask(do=load, seconds=run.seconds, below=_BELOW)["per_s"])

            mine, their = take_turns(run.rounds, lambda load=load: ours.per_s(load), theirs)  # type: ignore[misc]
            told = {"unit": "queries a second", "service": median(mine), "peer": median(their)}
            yield Measured(f"search.vs_peer.{name}.{load}", ratio(mine, their), told | detail)


def _against_a_stack(run: Run, ours: "_Ours", material: Path) -> Measured:
    texts = new_texts(run.packages)
    with _Stack(material, run.scratch / "stack.stderr") as stack:
        mine, theirs = take_turns(
            run.rounds, lambda: ours.texts_per_s(texts), lambda: stack.per_s(texts, run.seconds)
        )
    detail = {
        "unit": "text searches a second, none of them cached",
        "callers": _TEXT_CALLERS,
        "service": median(mine),
        "stack": median(theirs),
        "documents": len(ours.vectors),
    }
    return Measured("e2e.text_search_vs_stack", ratio(mine, theirs), detail)


class _Stack:
    """The stack of stack.py in a process of its own, and its callers; a context manager."""

    def __init__(self, material: Path, told: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url, self._told = f"http://127.0.0.1:{port}", told
        with told.open("wb") as stderr:
            self._process = subprocess.Popen(
                [PYTHON, "-m", "loadtests.peers.stack", packaged_model(), material, str(port)],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip

    def per_s(self, texts: Iterator[str], seconds: float) -> float:
        """Answered searches a second, over connections that are kept."""

        async def load() -> float:
            answered = 0
            limits = httpx.Limits(max_connections=_TEXT_CALLERS)
            async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as client:
                began_s = time.perf_counter()

                async def caller() -> None:
                    nonlocal answered
                    while time.perf_counter() < began_s + seconds:
                        answer = await client.post("/search", json={"text": next(texts), "k": K})
                        answer.raise_for_status()
                        answered += len(answer.json()["hits"]) > 0

                async with asyncio.TaskGroup() as group:
                    for _ in range(_TEXT_CALLERS):
                        group.create_task(caller())
                return answered / (time.perf_counter() - began_s)

        return asyncio.run(load())

    def __enter__(self) -> "_Stack":
        until_s = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                httpx.get(f"{self._url}/ready", timeout=5).raise_for_status()
                return self
            except httpx.HTTPError:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    self._end()
                    last = (self._told.read_text(errors="replace").strip().splitlines() or ["silence"])[-1]
                    raise PeerFailed(f"the stack did not start: {last}") from None
                time.sleep(0.2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


class _Ours:
    """This service with the same vectors, and its callers."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.vectors, self.queries = run.vectors, run.query_vectors
        self.buckets = np.array([package.bucket for package in run.packages], np.int32)
        #: Vectors a second until all are searchable, and until nothing of them waits to be indexed.
        self.visible = self.ingest = 0.0

    def load(self) -> None:
        """Take all in, and wait until they are indexed."""
        server = self._run.service.grpc
        self._callers = Callers(server).__enter__()
        with Client(server, timeout_s=120) as client:
            client.create_collection(_COLLECTION, dim=self.vectors.shape[1], attributes={"bucket": "int"})
            rows = zip(self.vectors, self.buckets.tolist(), strict=True)
            began_s = time.perf_counter()
            client.upsert(
                _COLLECTION,
                (
                    {"id": str(i), "vector": vector, "attributes": {"bucket": bucket}}
                    for i, (vector, bucket) in enumerate(rows)
                ),
            )
            self.visible = len(self.vectors) / (time.perf_counter() - began_s)
            # Until then everything is compared with in full: slower, and more is found than later.
            settled(client, _COLLECTION)
            self.ingest = len(self.vectors) / (time.perf_counter() - began_s)
            # The same vectors in a collection whose texts can be embedded.
            client.create_collection(_TEXTS)
            client.upsert(_TEXTS, ({"id": str(i), "vector": vector} for i, vector in enumerate(self.vectors)))
            settled(client, _TEXTS)
        self._calls: dict[str, Callable[[int], Any]] = {
            "c1": lambda i: self._search(i, None),
            "c16": lambda i: self._search(i, None),
            "filter1": lambda i: self._search(i, f"bucket < {_BELOW}"),
            "batch32": self._batch,
        }

    def recall(self) -> float:
        """recall@10 by default."""
        found = 0
        with Client(self._run.service.grpc) as client:
            for query in self.queries:
                hits = client.search(_COLLECTION, vector=query, k=K, include=(), cache=False)
                scores = self.vectors @ query
                least = np.partition(scores, -K)[-K] - 1e-5
                found += sum(scores[int(hit.id)] >= least for hit in hits)
        return found / (K * len(self.queries))

    def per_s(self, load: str) -> float:
        """Queries a second, in a closed loop like the peer's."""
        callers = {"c1": 1, "batch32": 4}.get(load, 16)
        rows = BATCH_ROWS if load == "batch32" else 1
        return rows * self._callers.load(callers, self._run.seconds, self._calls[load]).per_s

    def texts_per_s(self, texts: Iterator[str]) -> float:
        """Text searches a second, 16 callers, past every cache."""

        async def call(_: int) -> object:
            return await self._callers.client.search(_TEXTS, text=next(texts), k=K, include=(), cache=False)

        return self._callers.load(_TEXT_CALLERS, self._run.seconds, call).per_s

    def close(self) -> None:
        """Leave the service."""
        self._callers.__exit__(None, None, None)

    async def _search(self, number: int, filter: str | None) -> object:
        query = self.queries[number % len(self.queries)]
        found: SearchResult = await self._callers.client.search(
            _COLLECTION, vector=query, k=K, filter=filter, include=(), cache=False
        )
        return [hit.id for hit in found]

    async def _batch(self, number: int) -> object:
        start = number * BATCH_ROWS % max(1, len(self.queries) - BATCH_ROWS + 1)
        rows = self.queries[start : start + BATCH_ROWS]
        return (await self._callers.client.batch_search(_COLLECTION, vectors=rows, k=K, cache=False)).ids


class _Peer:
    """A peer's process; a context manager that ends it."""

    def __init__(self, name: str, directory: Path, material: Path, url: str) -> None:
        self._name = name
        self._told = directory / "stderr"
        with self._told.open("wb") as told:
            self._process = subprocess.Popen(
                [PYTHON, "-m", "loadtests.peers.process", name, directory, material, url],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True,
                start_new_session=True,  # Ctrl-C is ours; we end it
            )  # fmt: skip

    def ask(self, **question: object) -> dict[str, Any]:
        """Its answer; PeerFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and its last words say why
        line = self._process.stdout.readline()
        if not line:
            last = (self._told.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise PeerFailed(f"{self._name} ended: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self._name}: {answer['error']}")
        return answer

    def resident_bytes(self) -> int:
        """Of its process and what that started, its callers included."""
        process = psutil.Process(self._process.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))

    def __enter__(self) -> "_Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = psutil.Process(self._process.pid).children(recursive=True)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in family:
            if process.is_running():
                process.kill()


class _Postgres:
    """A Postgres of its own, as the service would start it; a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> "_Postgres":
        self._thread = threading.Thread(target=self._loop.run_forever, name="peer-servers", daemon=True)
        self._thread.start()
        self._data_dir = DataDir.open(self._directory, release=__version__)
        self._supervisor = Supervisor(self._data_dir)
        starting = asyncio.run_coroutine_threadsafe(self._supervisor.start_postgres(), self._loop)
        #: Where it answers.
        self.url = starting.result(120)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._supervisor.stop(), self._loop).result(120)
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._data_dir.close()
