"""The cache: what a cached answer costs, how often there is one, and what L1 takes off Redis."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np

from loadtests.callers import Callers
from loadtests.run import Costed, Run
from loadtests.scoreboard import Measured
from loadtests.timing import median, ratio, repeat, take_turns
from loadtests.traces import FirstTier, recovery, zipf
from protos.ringfort import v1 as pb
from ringfort import Client

_CALLERS, _BATCH_CALLERS = 16, 4
_BATCH_ROWS = 256
_K = 10
#: Different questions, all of them cached.
_QUESTIONS = 64
#: A collection of their own for writes, so many documents and questions; the latter are asked by Zipf's law.
_WRITTEN, _WRITTEN_DOCUMENTS, _WRITTEN_QUESTIONS = "written", 1_000, 256
#: Reads a second over all callers: an open loop, so that the ratio does not hang on how fast a miss is.
_READS_PER_S = 400
_WRITES_PER_S = (0, 20, 200)
_STALENESS_MS = 1_000


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    for side, service in run.sides.items():
        with Callers(service.grpc) as callers:
            yield _against_empty(run, side, callers)
    with Callers(run.service.grpc) as callers:
        yield _batches(run, callers)
        yield from _hit_ratios(run, callers)
    yield from _relief(run)


def _against_empty(run: Run, side: str, callers: Callers) -> Measured:
    service, library = run.sides[side], run.libraries[side]
    search = callers.channel.unary_unary(
        "/ringfort.v1.SearchService/Search",
        request_serializer=pb.SearchRequest.SerializeToString,
        response_deserializer=pb.SearchResponse.FromString,
    )
    questions = [
        pb.SearchRequest(collection=library.collection, text=text, k=_K)
        for text in library.queries[:_QUESTIONS]
    ]

    async def cached(number: int) -> None:
        answer = await search(questions[number % len(questions)])
        if answer.served_from != pb.L1:
            raise RuntimeError(f"an answer came from {pb.ServedFrom.Name(answer.served_from)}, not L1")

    async def fill() -> None:
        for question in questions:
            await search(question)

    callers.run(fill())
    ours, bare = take_turns(
        run.rounds,
        lambda: run.costed(lambda: callers.load(_CALLERS, run.seconds, cached), service),
        lambda: run.costed(lambda: callers.load(_CALLERS, run.seconds, callers.nothing), service),
    )
    detail = {
        "unit": "calls a second",
        "callers": _CALLERS,
        "cached": Costed.detail(ours),
        "empty": Costed.detail(bare),
        "answer_bytes": callers.run(_answer_bytes(callers, questions[0])),
    }
    value = ratio([each.load.per_s for each in ours], [each.load.per_s for each in bare])
    return Measured(f"cache.vs_empty_rpc{side or '.aio'}", value, detail | library.detail)


async def _answer_bytes(callers: Callers, question: pb.SearchRequest) -> int:
    search = callers.channel.unary_unary(
        "/ringfort.v1.SearchService/Search",
        request_serializer=pb.SearchRequest.SerializeToString,
        response_deserializer=len,
    )
    size: int = await search(question)
    return size


def _batches(run: Run, callers: Callers) -> Measured:
    library = run.library
    texts = [package.summary for package in library.packages[:_BATCH_ROWS]]

    async def call(_: int) -> None:
        answer = await callers.client.batch_search(library.collection, texts=texts, k=_K)
        if answer.served_from != "L1":
            raise RuntimeError(f"a batch came from {answer.served_from}, not L1")

    with Client(run.service.grpc) as client:
        client.batch_search(library.collection, texts=texts, k=_K)
    loads = repeat(run.rounds, lambda: run.costed(lambda: callers.load(_BATCH_CALLERS, run.seconds, call)))
    detail = {
        "unit": "rows a second",
        "rows_a_batch": _BATCH_ROWS,
        "callers": _BATCH_CALLERS,
        "k": _K,
        "service_cpu_us_a_row": median(each.service_us for each in loads) / _BATCH_ROWS,
        "client_cpu_us_a_row": median(each.client_us for each in loads) / _BATCH_ROWS,
    }
    value = _BATCH_ROWS * median(each.load.per_s for each in loads)
    return Measured("cache.batch_lookups_per_s", value, detail | library.detail)


def _hit_ratios(run: Run, callers: Callers) -> Iterator[Measured]:
    """Vector searches of a small collection while it is written to."""
    vectors = run.library.query_vectors
    documents = [{"id": str(i), "vector": vectors[i % len(vectors)]} for i in range(_WRITTEN_DOCUMENTS)]
    rng = np.random.default_rng(7)
    questions = rng.normal(size=(_WRITTEN_QUESTIONS, vectors.shape[1])).astype(np.float32)
    order = zipf(_WRITTEN_QUESTIONS, 100_000, rng).tolist()
    with Client(run.service.grpc) as client:
        client.create_collection(_WRITTEN, dim=vectors.shape[1])
        client.upsert(_WRITTEN, documents)
        try:
            for per_s in _WRITES_PER_S:
                (exact, written), (stale, _) = (
                    _hit_ratio(run, callers, questions, order, per_s, staleness_ms)
                    for staleness_ms in (0, _STALENESS_MS)
                )
                detail = {
                    "unit": "share of searches",
                    "reads_per_s": _READS_PER_S,
                    "questions": _WRITTEN_QUESTIONS,
                    "documents": _WRITTEN_DOCUMENTS,
                    "allowing_1s": stale,
                    "written_per_s": written,
                }
                yield Measured(f"cache.hit_ratio.w{per_s}", exact, detail)
        finally:
            client.delete_collection(_WRITTEN)


def _hit_ratio(
    run: Run, callers: Callers, questions: np.ndarray, order: list[int], writes_per_s: int, staleness_ms: int
) -> tuple[float, float]:
    """The share of searches out of the cache, and the writes a second that there really were."""
    hits: list[bool] = []
    began = time.perf_counter()

    async def ask(number: int) -> None:
        await asyncio.sleep(max(0.0, began + number / _READS_PER_S - time.perf_counter()))
        found = await callers.client.search(
            _WRITTEN, vector=questions[order[number % len(order)]], k=_K, max_staleness_ms=staleness_ms
        )
        hits.append(found.served_from != "INDEX")

    with _writing(run, questions, writes_per_s) as writes:
        load = callers.load(_CALLERS, run.rounds * run.seconds, ask)
    return sum(hits) / len(hits), len(writes) / load.seconds


@contextlib.contextmanager
def _writing(run: Run, vectors: np.ndarray, per_s: int) -> Iterator[list[int]]:
    """One document after another is written again, as many a second; their numbers."""
    over = threading.Event()
    written: list[int] = []

    def write() -> None:
        with Client(run.service.grpc) as client:
            for number in itertools.count():
                if over.wait(max(0.0, began + number / per_s - time.perf_counter())):
                    return
                vector = vectors[number % len(vectors)]
                client.upsert(_WRITTEN, [{"id": str(number % 100), "vector": vector}], wait="DURABLE")
                written.append(number)

    began = time.perf_counter()
    writer = threading.Thread(target=write)
    if per_s:
        writer.start()
    try:
        yield written
    finally:
        over.set()
        if per_s:
            writer.join()


def _relief(run: Run) -> Iterator[Measured]:
    """Simulated: what L1 keeps is decided by the policy alone."""
    rng = np.random.default_rng(11)
    keys, reads = run.sized(100_000, 10_000), run.sized(500_000, 50_000)
    detail: dict[str, object]
    before, after = recovery(keys, reads, rng)
    detail = {"unit": "share of reads", "trace": "90/10", "keys": keys, "after_the_hot_set_moved": after}
    yield Measured("cache.redis_relief.9010", before, detail)
    tier = FirstTier(keys // 100)
    first, then = np.array_split(zipf(keys, 2 * reads, rng), 2)
    tier.relief(first)
    weights = 1 / np.arange(1, keys + 1)
    best = float(weights[: keys // 100].sum() / weights.sum())
    detail = {"unit": "share of reads", "trace": "Zipf 1.0", "keys": keys, "best_possible": best}
    yield Measured("cache.redis_relief.zipf", tier.relief(then), detail)
