"""The answer cache: what a cached answer costs beside an empty call of the same server."""

from collections.abc import Iterator

from loadtests.callers import Callers
from loadtests.run import Costed, Run
from loadtests.scoreboard import Measured
from loadtests.timing import median, ratio, repeat, take_turns
from protos.ringfort import v1 as pb
from ringfort import Client

_CALLERS, _BATCH_CALLERS = 16, 4
_BATCH_ROWS = 256
_K = 10
#: Different questions, all of them cached.
_QUESTIONS = 64


def measure(run: Run) -> Iterator[Measured]:
    """The rows of this family."""
    with Callers(run.service.grpc) as callers:
        yield _against_empty(run, callers)
        yield _batches(run, callers)


def _against_empty(run: Run, callers: Callers) -> Measured:
    library = run.library
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
        lambda: run.costed(lambda: callers.load(_CALLERS, run.seconds, cached)),
        lambda: run.costed(lambda: callers.load(_CALLERS, run.seconds, callers.nothing)),
    )
    detail = {
        "unit": "calls a second",
        "callers": _CALLERS,
        "cached": Costed.detail(ours),
        "empty": Costed.detail(bare),
        "answer_bytes": callers.run(_answer_bytes(callers, questions[0])),
    }
    value = ratio([each.load.per_s for each in ours], [each.load.per_s for each in bare])
    return Measured("cache.vs_empty_rpc.aio", value, detail | library.detail)


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
    rates = repeat(run.rounds, lambda: callers.load(_BATCH_CALLERS, run.seconds, call).per_s)
    detail = {"unit": "rows a second", "rows_a_batch": _BATCH_ROWS, "callers": _BATCH_CALLERS, "k": _K}
    return Measured("cache.batch_lookups_per_s", _BATCH_ROWS * median(rates), detail | library.detail)
