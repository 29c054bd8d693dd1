"""The service spread over processes: what that costs, and what searches notice while slots move."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from loadtests.callers import Callers
from loadtests.corpus import ATTRIBUTES
from loadtests.run import Costed, Run, settled
from loadtests.scoreboard import Measured
from loadtests.service import Service
from loadtests.timing import Load, alone, median, ratio, take_turns
from loadtests.writer import Writer
from protos.ringfort import v1 as pb
from ringfort import Client

_CALLERS, _K, _BATCH = 64, 10, 512
#: Most documents; what is measured is the way between processes, not the index.
_DOCUMENTS = 20_000
_SPREAD, _MOVED = "spread", "moved"
_SHARDS = 2
#: Documents a second that are written while slots move, and before.
_WRITES_PER_S = 200.0
#: How often a job is looked at, and how long one may take.
_LOOK_S, _JOB_S = 0.25, 120.0
#: Scores are float32 and summed in different orders.
_TIE = 1e-5


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    launcher = "ray" if importlib.util.find_spec("ray") else "processes"
    count = min(_DOCUMENTS, len(run.packages))
    with ExitStack() as stack:
        here = stack.enter_context(run.start(run.new_data_dir("together")))
        spread = Service(
            run.new_data_dir("apart"), ["--cluster"], env={"RINGFORT_CLUSTER__LAUNCHER": launcher}
        )
        stack.enter_context(spread)
        for service in (here, spread):
            _load(run, service, _SPREAD, count, 1)
        told = {"documents": count, "launcher": launcher}
        yield _beside_one_process(run, here, spread, told)
        _load(run, spread, _MOVED, count, _SHARDS)
        yield _while_slots_move(run, spread, count, told)


def _load(run: Run, service: Service, collection: str, count: int, shards: int) -> None:
    with Client(service.grpc, timeout_s=120) as client:
        client.create_collection(collection, attributes=ATTRIBUTES, shards=shards)
        rows = zip(run.packages[:count], run.vectors[:count], strict=True)
        result = client.upsert(
            collection, (package.document(vector) for package, vector in rows), batch=_BATCH
        )
        if result.failures:
            raise RuntimeError(f"{len(result.failures)} documents were refused, first {result.failures[0]}")
        settled(client, collection)


def _beside_one_process(run: Run, here: Service, spread: Service, told: dict[str, object]) -> Measured:
    """Text searches past the caches, in turns."""
    texts = [package.summary for package in run.packages[:1_000]]
    with Callers(here.grpc) as near, Callers(spread.grpc) as far:

        def searches(service: Service, callers: Callers, count: int) -> Costed:
            async def call(number: int) -> object:
                text = texts[number % len(texts)]
                return await callers.client.search(_SPREAD, text=text, k=_K, include=(), cache=False)

            return run.costed(lambda: callers.load(count, run.seconds, call), service)

        ours, theirs = take_turns(
            run.rounds, lambda: searches(spread, far, _CALLERS), lambda: searches(here, near, _CALLERS)
        )
        one_far, one_near = take_turns(
            run.rounds, lambda: searches(spread, far, 1), lambda: searches(here, near, 1)
        )
    p50_ms = [[each.load.quantile_ms(0.5) for each in side] for side in (one_far, one_near)]
    detail = {
        "unit": "text searches a second, not cached",
        "callers": _CALLERS,
        "cluster": Costed.detail(ours),
        "embedded": Costed.detail(theirs),
        "more_cpu_us": median(a.call_us - b.call_us for a, b in zip(ours, theirs, strict=True)),
        "one_caller": {
            "p50_ms": median(p50_ms[0]),
            "embedded_p50_ms": median(p50_ms[1]),
            "p50_ratio": ratio(*p50_ms),
        },
    }
    value = ratio([each.load.per_s for each in ours], [each.load.per_s for each in theirs])
    return Measured("cluster.vs_embedded.c64", value, detail | told)


def _while_slots_move(run: Run, service: Service, count: int, told: dict[str, object]) -> Measured:
    """One caller's vector searches while another writes: before, while a shard comes, while it goes."""
    vectors, queries = run.vectors[:count], run.query_vectors
    with (
        Client(service.grpc, timeout_s=120) as client,
        # Opposite to what is there, so that what is near a query stays what it was.
        Writer(service.grpc, _MOVED, run.packages[:2_000], -vectors[:2_000], batch=20) as writer,
    ):
        asked = _Asked(client, queries, vectors)
        writer.start(_WRITES_PER_S)
        try:
            alone(run.seconds, asked.search)
            before = asked.until(_passed(5 * run.seconds))
            during = [
                stretch
                for _ in range(run.rounds)
                for stretch in (
                    asked.until(_ended(client, client.add_shard(_MOVED))),
                    # The new one has the number after the others', each time.
                    asked.until(_ended(client, client.drain_shard(_MOVED, _SHARDS))),
                )
            ]
        finally:
            written_per_s = writer.stop()
    detail = {
        "unit": "p99 ms of one caller's vector searches",
        "shards": _SHARDS,
        "written_per_s": written_per_s,
        "before": before.detail(),
        "during": _Stretch.of(during).detail(),
        "shards_added_and_drained": run.rounds,
    }
    value = _Stretch.of(during).load.quantile_ms(0.99) / before.load.quantile_ms(0.99)
    return Measured("cluster.p99_during_reshard", value, detail | told)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Searches in a row, and what they found."""

    load: Load
    recall: float
    #: Answers in which some of the collection was missing.
    incomplete: int

    @classmethod
    def of(cls, parts: "Sequence[_Stretch]") -> "_Stretch":
        """Several as one; the least recall of any."""
        seconds = sum(part.load.seconds for part in parts)
        load = Load(seconds, [ms for part in parts for ms in part.load.latencies_ms])
        return cls(load, min(part.recall for part in parts), sum(part.incomplete for part in parts))

    def detail(self) -> dict[str, float]:
        return {
            "seconds": self.load.seconds,
            "searches": self.load.calls,
            "p50_ms": self.load.quantile_ms(0.5),
            "p99_ms": self.load.quantile_ms(0.99),
            "recall": self.recall,
            "incomplete": self.incomplete,
        }


class _Asked:
    """One caller whose answers are held to an exact search."""

    def __init__(self, client: Client, queries: np.ndarray, vectors: np.ndarray) -> None:
        """Both float32 [n, dim], of length 1."""
        self._client, self._queries = client, queries
        best = np.partition(queries @ vectors.T, -_K, axis=1)
        #: By query, the score of the last that should be found.
        self._least: list[float] = (best[:, -_K] - _TIE).tolist()
        self._found = self._wanted = self._incomplete = 0

    def search(self, number: int) -> None:
        """The number-th search."""
        at = number % len(self._queries)
        answer = self._client.search(_MOVED, vector=self._queries[at], k=_K, include=(), cache=False)
        self._found += sum(hit.score >= self._least[at] for hit in answer)
        self._wanted += _K
        self._incomplete += not answer.coverage.complete

    def until(self, over: Callable[[], bool]) -> _Stretch:
        """Search again and again until it is over, which is asked now and then between two searches."""
        self._found = self._wanted = self._incomplete = 0
        loads: list[Load] = []
        while True:
            loads.append(alone(_LOOK_S, self.search))
            if over():
                break
        seconds = sum(load.seconds for load in loads)
        load = Load(seconds, [ms for each in loads for ms in each.latencies_ms])
        return _Stretch(load, self._found / self._wanted, self._incomplete)


def _passed(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds from now have passed."""
    until_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= until_s


def _ended(client: Client, job: pb.Job) -> Callable[[], bool]:
    """Whether a job has succeeded; RuntimeError where it has failed, or takes too long."""
    until_s = time.monotonic() + _JOB_S

    def ended() -> bool:
        now = client.job(job.id)
        if now.state in (pb.Job.PENDING, pb.Job.RUNNING) and time.monotonic() < until_s:
            return False
        if now.state != pb.Job.SUCCEEDED:
            raise RuntimeError(
                f"{now.kind} of {now.collection}: {pb.Job.State.Name(now.state)} {now.message}"
            )
        return True

    return ended
