"""What the families of one run share: corpus, model, engine, and one loaded service; made when asked for."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from index_builder.models.build import ensure_model
from index_builder.models.manifest import ModelManifest
from loadtests import corpus
from loadtests.corpus import ATTRIBUTES, Package
from loadtests.engine import Engine, by_length
from loadtests.scoreboard import NO_NATIVE
from loadtests.service import Service, new_data_dir
from loadtests.timing import Load, median, processor_s
from ringfort import Client, __version__
from services.embedder.cpus import usable_cpus
from shard_router.hashing import digest

#: Packages kept out of the collection; their descriptions are the queries.
QUERIES, QUICK_QUERIES = 512, 64
QUICK_DOCUMENTS = 1_000
#: Of every ten documents, how many are written twice, and how many more are written and deleted again.
_REWRITTEN, _DELETED = 3, 1
#: How far the first vector of a document that is written twice lies from that of another one.
_STRANGENESS = np.float32(0.3)
_BATCH = 512
_SETTLED_S, _SETTLE_LIMIT_S = 1.5, 900.0


@dataclass(frozen=True, slots=True)
class Library:
    """The collection that searches are measured on, as it is after its churn."""

    collection: str
    packages: Sequence[Package]
    #: float32 [documents, dim], of length 1, in the order of `packages`.
    vectors: np.ndarray
    queries: Sequence[str]
    #: float32 [queries, dim].
    query_vectors: np.ndarray
    #: What its shards are made of: segments, rows of the memtable.
    shape: dict[str, int]

    @property
    def detail(self) -> dict[str, object]:
        """What every figure measured on it should say."""
        return {"documents": len(self.packages), **self.shape}


@dataclass(frozen=True, slots=True)
class Costed:
    """A load and its processor time a call, in microseconds: the service with its servers, and the client."""

    load: Load
    service_us: float
    client_us: float

    @property
    def call_us(self) -> float:
        """Of both."""
        return self.service_us + self.client_us

    @staticmethod
    def detail(costed: "Sequence[Costed]") -> dict[str, object]:
        """The middle of some rounds."""
        return {
            "per_s": median(each.load.per_s for each in costed),
            "p50_ms": median(each.load.quantile_ms(0.5) for each in costed),
            "p99_ms": median(each.load.quantile_ms(0.99) for each in costed),
            "service_cpu_us": median(each.service_us for each in costed),
            "client_cpu_us": median(each.client_us for each in costed),
        }


class Run:
    """One run of the benchmark; a context manager that stops and removes what it made."""

    def __init__(
        self,
        *,
        corpus_file: Path,
        documents: int | None,
        models: Path,
        directory: Path,
        rounds: int,
        quick: bool,
        judged: Path | None = None,
    ) -> None:
        self.rounds, self.quick = rounds, quick
        #: Where judged collections lie, if anywhere.
        self.judged = judged
        #: How long one side of one round is under load.
        self.seconds = 0.2 if quick else 1.0
        self.cpus = usable_cpus()
        #: Where the documents come from.
        self.corpus_file = corpus_file
        self._models, self._directory = models, directory
        self._queries = QUICK_QUERIES if quick else QUERIES
        self._documents = QUICK_DOCUMENTS if quick else documents
        directory.mkdir(parents=True, exist_ok=True)
        #: On the same disk as the repository: a folder in memory would flatter whatever is durable.
        self.scratch = Path(tempfile.mkdtemp(prefix="run-", dir=directory))
        self._service: Service | None = None
        self._native: Service | None = None

    def sized(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full

    @cached_property
    def _corpus(self) -> Sequence[Package]:
        rows = None if self._documents is None else self._documents + self._queries
        return corpus.read(self.corpus_file, rows)

    @property
    def packages(self) -> Sequence[Package]:
        """The documents."""
        return self._corpus[self._queries :]

    @property
    def vectors(self) -> np.ndarray:
        """Their vectors, float32 [documents, dim]."""
        return self._vectors[self._queries :]

    @property
    def query_vectors(self) -> np.ndarray:
        """Vectors of packages kept out, float32 [queries, dim]."""
        return self._vectors[: self._queries]

    def manifest(self, precision: str = "int8") -> ModelManifest:
        """The default model, built where it is not."""
        return ensure_model(self._models, precision=precision)

    @cached_property
    def engine(self) -> Engine:
        """The engine of the default install on all processors."""
        return Engine(self.manifest(), self.cpus)

    @property
    def service(self) -> Service:
        """A running service with the default configuration."""
        if self._service is None:
            self._service = self.start(self.new_data_dir("data"))
        return self._service

    @property
    def sides(self) -> Mapping[str, Service]:
        """That one and, where it can be had, one on the native gRPC server, by how their rows' names end."""
        if NO_NATIVE:
            return {"": self.service}
        if self._native is None:
            self._native = self.start(self.new_data_dir("native"), RINGFORT_GATEWAY__SERVER="native")
        return {"": self.service, ".native": self._native}

    def costed(self, work: Callable[[], Load], on: Service | None = None) -> Costed:
        """A load on a service, by default the shared one, and what it cost that service and this process."""
        loads: list[Load] = []
        service = on or self.service
        before = service.processor_s()
        client_s = processor_s(lambda: loads.append(work()))
        service_s = service.processor_s() - before
        [load] = loads
        return Costed(load, 1e6 * service_s / load.calls, 1e6 * client_s / load.calls)

    def new_data_dir(self, name: str) -> Path:
        """A data directory that needs no model built."""
        self.manifest()
        return new_data_dir(self.scratch / name, self._models, release=__version__)

    def start(self, data_dir: Path, **env: str) -> Service:
        """Another service; whoever starts it stops it."""
        return Service(data_dir, env=env)

    @cached_property
    def library(self) -> Library:
        """The corpus in the service, in a collection that has seen deletes and second versions."""
        return self._shelve(self.service)

    @cached_property
    def libraries(self) -> Mapping[str, Library]:
        """The same in every one of `sides`."""
        twins = {name: self._shelve(service) for name, service in self.sides.items() if name}
        return {"": self.library, **twins}

    def _shelve(self, service: Service) -> Library:
        packages, vectors, held_out = self.packages, self.vectors, self._corpus[: self._queries]
        with Client(service.grpc, timeout_s=120) as client:
            client.create_collection("packages", attributes=ATTRIBUTES)
            _load(client, "packages", packages, vectors)
            shape = settled(client, "packages")
        queries = [package.summary for package in held_out]
        return Library("packages", packages, vectors, queries, self._vectors[: self._queries], shape)

    @cached_property
    def _vectors(self) -> np.ndarray:
        """Vectors of the corpus; kept between runs, as they take minutes for a large one."""
        texts = [package.summary for package in self._corpus]
        name = digest(self.engine.manifest.variant.encode(), *(text.encode() for text in texts)).hex()
        kept = self._directory / f"vectors-{name}.npy"
        if kept.exists():
            found: np.ndarray = np.load(kept)
            return found
        vectors = self.engine.run(by_length(self.engine.tokenize(texts))).vectors
        part = self.scratch / kept.name
        np.save(part, vectors)
        part.rename(kept)
        return vectors

    def stop(self) -> Path:
        """Stop the shared service, for good; its data directory."""
        service = self.service
        service.stop()
        return service.data_dir

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)
            for service in (self._service, self._native):
                if service is not None:
                    stack.callback(service.stop)


def _load(client: Client, collection: str, packages: Sequence[Package], vectors: np.ndarray) -> None:
    """Write the packages, and churn what was indexed: in the end they are what there is, and nothing else."""
    rewritten = {i for i in range(len(packages)) if i % 10 < _REWRITTEN}
    doomed = [f"deleted-{i}" for i in range(len(packages) * _DELETED // 10)]

    # A rewritten document was near somebody else before; the very same vectors would spoil the graph.
    formerly = np.roll(vectors, -1, axis=0) + _STRANGENESS * np.roll(vectors, -2, axis=0)
    formerly /= np.linalg.norm(formerly, axis=1, keepdims=True)

    def first() -> Iterator[dict[str, object]]:
        for i, package in enumerate(packages):
            if i in rewritten:
                other = packages[(i + 1) % len(packages)]
                yield package._replace(summary=other.summary).document(formerly[i])
            else:
                yield package.document(vectors[i])
        for id, package, vector in zip(doomed, packages, formerly, strict=False):
            yield package.document(vector) | {"id": id}

    def second() -> Iterator[dict[str, object]]:
        for i in sorted(rewritten):
            yield packages[i].document(vectors[i])

    for documents in (first(), second()):
        _require_all(client.upsert(collection, documents, batch=_BATCH).failures)
        # What dies then lies in segments that were merged and indexed.
        settled(client, collection)
    for start in range(0, len(doomed), _BATCH):
        client.delete(collection, ids=doomed[start : start + _BATCH])
    found = client.count(collection)
    if found != len(packages):
        raise RuntimeError(f"{found} documents after loading {len(packages)}")


def _require_all(failures: Sequence[object]) -> None:
    if failures:
        raise RuntimeError(f"{len(failures)} documents were refused, first {failures[0]}")


def settled(client: Client, collection: str) -> dict[str, int]:
    """Wait until nothing is left to seal, merge or index; what the collection's shards are made of.

    What is still pending after a long wait shows in it.
    """
    limit_s = time.monotonic() + _SETTLE_LIMIT_S
    shape, since_s = shape_of(client, collection), time.monotonic()
    while (now_s := time.monotonic()) < min(limit_s, since_s + _SETTLED_S):
        time.sleep(0.1)
        latest = shape_of(client, collection)
        if latest != shape or latest["pending_rows"]:
            shape, since_s = latest, now_s
    return shape


def shape_of(client: Client, collection: str) -> dict[str, int]:
    """What the collection's shards are made of at this moment."""
    [status] = [each for each in client.cluster().collections if each.name == collection]
    return {
        "segments": sum(replica.segments for replica in status.replicas),
        "memtable_rows": sum(replica.memtable_rows for replica in status.replicas),
        "pending_rows": sum(replica.pending_rows for replica in status.replicas),
    }
