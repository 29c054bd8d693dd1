"""What it costs to be watched: the same searches on a service that counts and on one that does not."""

from collections.abc import Iterator

from loadtests.callers import Callers
from loadtests.corpus import ATTRIBUTES
from loadtests.run import Run
from loadtests.scoreboard import Measured
from loadtests.timing import median, ratio, take_turns
from ringfort import Client

_CALLERS, _DOCUMENTS, _K = 16, 5_000, 10
_COLLECTION = "watched"


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

            def searches(callers: Callers) -> float:
                async def call(number: int) -> object:
                    vector = run.vectors[number % count]
                    return await callers.client.search(
                        _COLLECTION, vector=vector, k=_K, include=(), cache=False
                    )

                return callers.load(_CALLERS, run.seconds, call).per_s

            # Short turns and many of them: the difference is small and the machine restless.
            ours, theirs = take_turns(2 * run.rounds, lambda: searches(watched), lambda: searches(unwatched))
    detail = {
        "unit": "vector searches a second",
        "callers": _CALLERS,
        "documents": count,
        "with_metrics": median(ours),
        "without": median(theirs),
    }
    yield Measured("observe.cost", ratio(ours, theirs), detail)
