"""Vector search: how much is found, and how fast beside FAISS in this process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from index_builder.segments import manifest
from index_builder.segments.row_set import RowSet
from index_builder.segments.segment import Segment
from loadtests.callers import Callers
from loadtests.corpus import ATTRIBUTES, BUCKETS
from loadtests.run import Costed, Library, Run
from loadtests.scoreboard import Measured
from loadtests.timing import Spent, alone, excess, in_threads, median, ratio, spent, take_turns
from ringfort import Client, SearchResult
from shard_router.model import AttributeType

# FAISS makes its classes at run time, and this one is not in its stubs.
_Parameters: Any = getattr(faiss, "SearchParametersHNSW")  # noqa: B009

_K = 10
_CALLERS, _BATCH_CALLERS, _BATCH_ROWS = 16, 4, 32
#: Queries that each filtered recall is taken over.
_FILTERED_QUERIES = 128
#: Shares of the documents that filters pass.
_SHARES = (0.5, 0.1, 0.05, 0.01, 0.001)
#: Different filters of one share, so that no side keeps one filter's rows at hand alone.
_FILTERS = 16
_LINKS, _EF_CONSTRUCTION = 32, 200
#: Recall beyond which FAISS is not asked for more.
_ENOUGH = 0.99
_EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
#: Scores are float32 and summed in different orders.
_TIE = 1e-5
_SCHEMA = {name: AttributeType(kind) for name, kind in ATTRIBUTES.items()}


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    library = run.library
    truth = Truth(library)
    with Client(run.service.grpc, timeout_s=120) as client, Callers(run.service.grpc) as callers:
        recall = _recall(client, library, truth, None)
        yield Measured(
            "search.recall.default", recall, {"k": _K, "queries": len(library.queries), **library.detail}
        )
        high = _recall(client, library, truth, 1.0)
        yield Measured("search.recall.high", high, {"effort": 1.0, **library.detail})
        yield _filtered_recall(client, library, truth)
        ceiling = Ceiling.build(run, library, truth, recall)
        yield _batches(run, library, callers, ceiling)
        yield _filter_one_percent(run, library, callers)
    for side, service in run.sides.items():
        library = run.libraries[side]
        with Client(service.grpc, timeout_s=120) as client, Callers(service.grpc) as callers:
            yield _one_at_a_time(run, side, library, callers, ceiling)
            yield _added_ms(run, side, library, client, ceiling)


class Truth:
    """What a search should find, by comparing with every document."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._row_of = {package.name: row for row, package in enumerate(library.packages)}

    def recall(self, answers: Sequence[Sequence[int]], passing: np.ndarray | None = None) -> float:
        """Share of the k best (of those passing, bool [documents]) that the rows found hold, by query.

        A row counts if it is as good as the k-th best, so which of equals was found does not matter.
        """
        found = wanted = 0
        for query, rows in zip(self._library.query_vectors, answers, strict=False):
            scores = self._library.vectors @ query
            if passing is not None:
                scores = np.where(passing, scores, -np.inf)
            k = min(_K, len(scores) if passing is None else int(passing.sum()))
            least = np.partition(scores, -k)[-k] - _TIE if k else np.inf
            found += sum(scores[row] >= least for row in set(rows))
            wanted += k
        return float(found / wanted) if wanted else 1.0

    def rows(self, ids: Sequence[str]) -> list[int]:
        """Documents by row; one that is not in the collection is an error."""
        return [self._row_of[id] for id in ids]


@dataclass(frozen=True)
class Effort:
    """How hard FAISS searches its graph, and the recall it has then."""

    ef: int
    recall: float


@dataclass(frozen=True)
class Ceiling:
    """FAISS in this process: HNSW over float32, a thread a core.

    It searches as hard as the service's recall asks, but never for more than `_ENOUGH`: on collections so
    small that the service compares with every document, a graph would be no ceiling.
    """

    index: faiss.Index
    effort: Effort
    #: For the very recall of the service, where that is more.
    matched: Effort

    @classmethod
    def build(cls, run: Run, library: Library, truth: Truth, recall: float) -> "Ceiling":
        """The graph over the library, with the least efforts that find enough."""
        faiss.omp_set_num_threads(run.cpus)
        index = faiss.IndexHNSWFlat(library.vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        index.add(library.vectors)
        tried: list[Effort] = []
        for ef in _EFFORTS:
            _, rows = index.search(library.query_vectors, _K, params=_parameters(ef))
            tried.append(Effort(ef, truth.recall(rows.tolist())))
            if tried[-1].recall >= recall:
                break
        enough = next((each for each in tried if each.recall >= min(recall, _ENOUGH)), tried[-1])
        return cls(index, enough, tried[-1])

    def search(self, effort: Effort, queries: np.ndarray) -> object:
        """The nearest of each query, float32 [n, dim]."""
        return self.index.search(queries, _K, params=_parameters(effort.ef))

    @property
    def detail(self) -> dict[str, object]:
        """What a figure measured against it should say."""
        return {"faiss_ef": self.effort.ef, "faiss_recall": self.effort.recall}

    @property
    def matched_detail(self) -> dict[str, object]:
        """The same where it searches for the service's recall."""
        return {"ef": self.matched.ef, "recall": self.matched.recall}


class Direct:
    """The service's own segments, searched in this process: what is left when nothing is served.

    Of the newest manifest, so without what lies in memtables.
    """

    def __init__(self, run: Run) -> None:
        """Map the segments of the largest shard on disk."""
        shards: list[list[tuple[Segment, RowSet]]] = []
        for directory in (run.service.data_dir / "segments").glob("*/shard-*"):
            names = manifest.newest_first([path.name for path in directory.glob("manifest-*")])
            entries = manifest.decode((directory / names[0]).read_bytes()).segments if names else []
            shards.append([
                (Segment.open(directory / entry.name, _SCHEMA, verify=False), RowSet(~entry.dead_rows()))
                for entry in entries
            ])  # fmt: skip
        self._parts = max(shards, key=lambda parts: sum(segment.rows for segment, _ in parts), default=[])

    def search(self, queries: np.ndarray) -> object:
        """The nearest of each query, float32 [n, dim], at the default effort."""
        found = [
            segment.search(queries, _K, allowed=None if live.count == segment.rows else live, exact=False)[0]
            for segment, live in self._parts
        ]
        return np.sort(np.concatenate(found, axis=1), axis=1)[:, -_K:] if found else None

    def detail(self, run: Run, queries: Callable[[int], np.ndarray], ours_per_s: float) -> dict[str, float]:
        """Calls a second with a thread a core, and the service's over that."""
        per_s = in_threads(run.cpus, run.seconds, lambda number: self.search(queries(number))).per_s
        return {"calls_per_s": per_s, "service_over_it": ours_per_s / per_s}


def _parameters(ef: int) -> Any:
    return _Parameters(efSearch=ef)


def _recall(client: Client, library: Library, truth: Truth, effort: float | None) -> float:
    answers = [
        truth.rows([hit.id for hit in client.search(
            library.collection, vector=query, k=_K, effort=effort, include=(), cache=False
        )])
        for query in library.query_vectors
    ]  # fmt: skip
    return truth.recall(answers)


def _filtered_recall(client: Client, library: Library, truth: Truth) -> Measured:
    buckets = np.array([package.bucket for package in library.packages])
    by_share: dict[str, float] = {}
    for share in _SHARES:
        most = round(share * BUCKETS)
        answers = [
            truth.rows([hit.id for hit in client.search(
                library.collection, vector=query, k=_K, filter=f"bucket < {most}", include=(), cache=False
            )])
            for query in library.query_vectors[:_FILTERED_QUERIES]
        ]  # fmt: skip
        by_share[f"{share:.1%}"] = truth.recall(answers, buckets < most)
    return Measured(
        "search.recall.filtered", min(by_share.values()), {"by_share": by_share, **library.detail}
    )


def _one_at_a_time(run: Run, side: str, library: Library, callers: Callers, ceiling: Ceiling) -> Measured:
    service = run.sides[side]

    def searches(include: tuple[str, ...] | None) -> Costed:
        async def call(number: int) -> object:
            answer = await callers.client.search(
                library.collection, vector=_query(library, number)[0], k=_K, include=include, cache=False
            )
            # An answer is read when it is asked: an application would ask.
            if include is None:
                return [(hit.id, hit.score, hit.text, hit.attributes) for hit in answer]
            return _read(answer)

        return run.costed(lambda: callers.load(_CALLERS, run.seconds, call), service)

    def graph(effort: Effort) -> Spent:
        return spent(
            lambda: in_threads(
                run.cpus, run.seconds, lambda number: ceiling.search(effort, _query(library, number))
            )
        )

    empty: list[Costed] = []

    def beside() -> Spent:
        empty.append(run.costed(lambda: callers.load(_CALLERS, run.seconds, callers.nothing), service))
        return graph(ceiling.effort)

    ours, theirs = take_turns(run.rounds, lambda: searches(()), beside)
    whole, matched = [searches(None)], graph(ceiling.matched)
    detail = {
        "unit": "queries a second, ids and scores",
        "callers": _CALLERS,
        "service": Costed.detail(ours),
        "service_with_text_and_attributes": Costed.detail(whole),
        "empty_rpc": Costed.detail(empty),
        "faiss": {
            "per_s": median(each.load.per_s for each in theirs),
            "cpu_us": median(each.call_us for each in theirs),
        },
        "faiss_share_of_cpu": median(each.call_us for each in theirs) / median(each.call_us for each in ours),
        "faiss_at_the_services_recall": {"per_s": matched.load.per_s, **ceiling.matched_detail},
        "own_segments_in_process": Direct(run).detail(
            run, lambda number: _query(library, number), median(each.load.per_s for each in ours)
        ),
    }
    value = ratio([each.load.per_s for each in ours], [each.load.per_s for each in theirs])
    return Measured(f"search.vs_faiss.c16{side}", value, detail | ceiling.detail | library.detail)


def _batches(run: Run, library: Library, callers: Callers, ceiling: Ceiling) -> Measured:
    count = len(library.query_vectors) // _BATCH_ROWS

    def queries(number: int) -> np.ndarray:
        start = number % count * _BATCH_ROWS
        return library.query_vectors[start : start + _BATCH_ROWS]

    async def call(number: int) -> object:
        answer = await callers.client.batch_search(
            library.collection, vectors=queries(number), k=_K, cache=False
        )
        return answer.ids, answer.scores

    def graph(effort: Effort) -> float:
        return in_threads(run.cpus, run.seconds, lambda number: ceiling.search(effort, queries(number))).per_s

    ours, theirs = take_turns(
        run.rounds,
        lambda: run.costed(lambda: callers.load(_BATCH_CALLERS, run.seconds, call)),
        lambda: graph(ceiling.effort),
    )
    matched = graph(ceiling.matched)
    detail = {
        "unit": "queries a second",
        "callers": _BATCH_CALLERS,
        "service": _BATCH_ROWS * median(each.load.per_s for each in ours),
        "service_batches": Costed.detail(ours),
        "faiss": _BATCH_ROWS * median(theirs),
        "faiss_at_the_services_recall": {"per_s": _BATCH_ROWS * matched, **ceiling.matched_detail},
        "own_segments_in_process": Direct(run).detail(run, queries, median(each.load.per_s for each in ours)),
    }
    value = ratio([each.load.per_s for each in ours], theirs)
    return Measured("search.vs_faiss.batch32", value, detail | ceiling.detail | library.detail)


def _added_ms(run: Run, side: str, library: Library, client: Client, ceiling: Ceiling) -> Measured:
    def search(number: int) -> object:
        query = _query(library, number)[0]
        return _read(client.search(library.collection, vector=query, k=_K, include=(), cache=False))

    ours, theirs = take_turns(
        run.rounds,
        lambda: alone(run.seconds, search).quantile_ms(0.5),
        lambda: in_threads(
            1, run.seconds, lambda number: ceiling.search(ceiling.effort, _query(library, number))
        ).quantile_ms(0.5),
    )
    detail = {"unit": "p50 ms, one caller, blocking client", "service": median(ours), "faiss": median(theirs)}
    return Measured(
        f"search.added_ms.c1{side}", excess(ours, theirs), detail | ceiling.detail | library.detail
    )


def _filter_one_percent(run: Run, library: Library, callers: Callers) -> Measured:
    width = BUCKETS // 100
    buckets = np.array([package.bucket for package in library.packages])
    spans = [(i * width, (i + 1) * width) for i in range(_FILTERS)]
    filters = [f"bucket >= {first} and bucket < {end}" for first, end in spans]
    rows = [np.flatnonzero((buckets >= first) & (buckets < end)) for first, end in spans]

    async def call(number: int) -> object:
        answer = await callers.client.search(
            library.collection,
            vector=_query(library, number)[0],
            k=_K,
            filter=filters[number % _FILTERS],
            include=(),
            cache=False,
        )
        return _read(answer)

    def gather(number: int) -> object:
        allowed = rows[number % _FILTERS]
        scores = library.vectors[allowed] @ _query(library, number)[0]
        best = np.argpartition(-scores, min(_K, len(scores)) - 1)[:_K]
        return allowed[best[np.argsort(-scores[best])]]

    ours, theirs = take_turns(
        run.rounds,
        lambda: run.costed(lambda: callers.load(_CALLERS, run.seconds, call)),
        lambda: spent(lambda: in_threads(run.cpus, run.seconds, gather)),
    )
    detail = {
        "unit": "queries a second",
        "callers": _CALLERS,
        "service": Costed.detail(ours),
        "gather": {
            "per_s": median(each.load.per_s for each in theirs),
            "cpu_us": median(each.call_us for each in theirs),
        },
        "filters": _FILTERS,
        "rows_passing": float(np.mean([len(each) for each in rows])),
    }
    value = ratio([each.load.per_s for each in ours], [each.load.per_s for each in theirs])
    return Measured("search.filter1_vs_gather", value, detail | library.detail)


def _read(answer: SearchResult) -> list[tuple[str, float]]:
    """What everybody wants of an answer; it is read when it is asked."""
    return [(hit.id, hit.score) for hit in answer]


def _query(library: Library, number: int) -> np.ndarray:
    """One query, float32 [1, dim]."""
    start = number % len(library.query_vectors)
    return library.query_vectors[start : start + 1]
