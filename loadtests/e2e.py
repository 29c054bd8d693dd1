"""From text to ranked answers, as one caller sees it."""

from collections.abc import Iterator, Sequence

from loadtests.corpus import new_texts
from loadtests.run import Run
from loadtests.scoreboard import Measured
from loadtests.timing import Load, alone, median, take_turns
from ringfort import Client, SearchResult

_K = 10
_STAGES = (
    "total_ms",
    "cache_ms",
    "embed_ms",
    "queue_ms",
    "tokenize_ms",
    "inference_ms",
    "search_ms",
    "merge_ms",
)


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    library = run.library
    question = library.queries[0]
    with Client(run.service.grpc) as client:
        client.search(library.collection, text=question, k=_K)
        answers: list[SearchResult] = []
        new = new_texts(run.packages)

        def cached(_: int) -> None:
            if (answer := client.search(library.collection, text=question, k=_K)).served_from != "L1":
                raise RuntimeError(f"an answer came from {answer.served_from}, not L1")

        def uncached(_: int) -> None:
            answers.append(client.search(library.collection, text=next(new), k=_K))

        cached_loads, text_loads = take_turns(
            run.rounds, lambda: alone(run.seconds, cached), lambda: alone(run.seconds, uncached)
        )
    yield Measured("e2e.cached_search_ms.c1", _p50(cached_loads), _spread(cached_loads) | library.detail)
    stages = {
        stage: median(getattr(answer.timings, stage) for answer in answers) for stage in _STAGES
    }  # fmt: skip
    detail = _spread(text_loads) | {"service_p50_by_stage": stages} | library.detail
    yield Measured("e2e.text_search_ms.c1", _p50(text_loads), detail)


def _p50(loads: Sequence[Load]) -> float:
    return median(load.quantile_ms(0.5) for load in loads)


def _spread(loads: Sequence[Load]) -> dict[str, object]:
    return {
        "p50_ms_by_round": [load.quantile_ms(0.5) for load in loads],
        "p99_ms": median(load.quantile_ms(0.99) for load in loads),
    }
