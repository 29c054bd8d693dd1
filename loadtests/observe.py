"""What it costs to be watched: the same searches on a service that counts and on one that does not."""

from collections.abc import Iterator
from typing import NamedTuple

from loadtests.callers import Callers
from loadtests.corpus import ATTRIBUTES
from loadtests.run import Run
from loadtests.scoreboard import Measured
from loadtests.service import Service
from loadtests.timing import median, ratio, spent, take_turns
from ringfort import Client

_CALLERS, _DOCUMENTS, _K = 16, 5_000, 10
_COLLECTION = "watched"


class _Turn(NamedTuple):
    """Searches a second, and processor time of each, service and client, in microseconds."""

    per_s: float
    cpu_us: float


def measure(run: Run) -> Iterator[Measured]:
    """The row of this family."""
    count = min(_DOCUMENTS, len(run.packages))
    with (
        run.start(run.new_data_dir("counting")) as counting,
        run.start(run.new_data_dir("blind"), RINGFORT_TELEMETRY__METRICS="false") as blind,
    ):
        for service in (counting, blind):
            with Client(service.grpc, timeout_s=120) as client:
                client.create_collection(_COLLECTION, attributes=ATTRIBUTES)
                rows = zip(run.packages[:count], run.vectors[:count], strict=True)
                client.upsert(_COLLECTION, (package.document(vector) for package, vector in rows))
        with Callers(counting.grpc) as watched, Callers(blind.grpc) as unwatched:

            def searches(service: Service, callers: Callers) -> _Turn:
                async def call(number: int) -> object:
                    vector = run.vectors[number % count]
                    return await callers.client.search(
                        _COLLECTION, vector=vector, k=_K, include=(), cache=False
                    )

                before_s = service.processor_s()
                load = spent(lambda: callers.load(_CALLERS, run.seconds, call))
                service_us = 1e6 * (service.processor_s() - before_s) / load.load.calls
                return _Turn(load.load.per_s, service_us + load.call_us)

            # Many turns: the difference is small and the machine restless.
            ours, theirs = take_turns(
                2 * run.rounds, lambda: searches(counting, watched), lambda: searches(blind, unwatched)
            )
    detail = {
        "unit": "vector searches per processor second, client included",
        "callers": _CALLERS,
        "documents": count,
        "with_metrics_us": median(turn.cpu_us for turn in ours),
        "without_us": median(turn.cpu_us for turn in theirs),
        "by_the_clock": ratio([turn.per_s for turn in ours], [turn.per_s for turn in theirs]),
    }
    value = ratio([turn.cpu_us for turn in theirs], [turn.cpu_us for turn in ours])
    yield Measured("observe.cost", value, detail)
