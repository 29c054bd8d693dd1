"""Upserts over a real stream: order, back-pressure, failures, a service that goes away and comes back."""

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from client_fakes import FakeService, Store, abort, written

import ringfort
from protos.ringfort import v1 as pb
from ringfort import AsyncClient, Client, Document, Version, WriteToken

UPSERT = "DocumentService/UpsertStream"


def _documents(count: int) -> Iterator[Document]:
    return (Document(str(n), f"text {n}") for n in range(count))


def test_everything_is_written_in_order(fake: FakeService, client: Any) -> None:
    store = Store()
    fake.answers[UPSERT] = store
    result = client.upsert("c", _documents(1000), batch=64)
    assert list(store.documents) == [str(n) for n in range(1000)]
    assert (result.written, result.failures, result.visible) == (1000, (), True)
    assert result.token == WriteToken({"log": 1000})
    assert {request.wait for request in store.batches} == {pb.VISIBLE}


def test_nothing_to_write_asks_nothing(fake: FakeService, client: Any) -> None:
    assert client.upsert("c", []).written == 0
    assert fake.requests == []


def test_each_batch_has_its_result_in_order(fake: FakeService, client: Any) -> None:
    fake.answers[UPSERT] = Store()
    results = client.upsert_stream("c", _documents(5), batch=2, wait="DURABLE")
    assert [(result.written, result.token.positions["log"]) for result in results] == [(2, 2), (2, 4), (1, 5)]


def test_refused_documents_are_told_and_stop_nothing(fake: FakeService, client: Any) -> None:
    def refuse_odd(requests: Iterator[pb.UpsertRequest], context: Any) -> Iterator[pb.UpsertResponse]:
        for request in requests:
            answer = written(request)
            for status in answer.statuses:
                if int(status.id) % 2:
                    status.code, status.message, status.field = 3, "odd", "attributes.n"
            yield answer

    fake.answers[UPSERT] = refuse_odd
    result = client.upsert("c", _documents(4), batch=2)
    assert result.written == 2
    assert [(f.id, f.code, f.message, f.field) for f in result.failures] == [
        ("1", grpc.StatusCode.INVALID_ARGUMENT, "odd", "attributes.n"),
        ("3", grpc.StatusCode.INVALID_ARGUMENT, "odd", "attributes.n"),
    ]


def test_documents_are_taken_only_as_fast_as_they_are_acknowledged(fake: FakeService) -> None:
    taken: list[int] = []
    received = threading.Semaphore(0)
    answer = threading.Event()

    def hold(requests: Iterator[pb.UpsertRequest], context: Any) -> Iterator[pb.UpsertResponse]:
        for request in requests:
            received.release()
            answer.wait(10)
            yield written(request)

    def source() -> Iterator[Document]:
        for n in range(100):
            taken.append(n)
            yield Document(str(n), "t")

    fake.answers[UPSERT] = hold
    with Client(fake.address, timeout_s=10) as client:
        writer = threading.Thread(target=client.upsert, args=("c", source()), kwargs={"batch": 1})
        writer.start()
        assert received.acquire(timeout=10)
        writer.join(0.3)
        assert len(taken) == 4
        answer.set()
        writer.join(10)
    assert not writer.is_alive()
    assert len(taken) == 100


def test_a_stream_that_breaks_is_taken_up_again(fake: FakeService, client: Any) -> None:
    def break_twice(number: int, request: pb.UpsertRequest, context: grpc.ServicerContext) -> None:
        if number in (3, 5):
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    store = Store(break_twice)
    fake.answers[UPSERT] = store
    result = client.upsert("c", _documents(40), batch=4)
    assert result.written == 40
    assert list(store.documents) == [str(n) for n in range(40)]


def test_a_service_that_restarts_gets_the_rest(fake: FakeService) -> None:
    first = threading.Event()
    store = Store(lambda number, request, context: first.set())
    fake.answers[UPSERT] = store

    def source() -> Iterator[Document]:
        for n in range(60):
            if n == 30:
                first.wait(10)
                fake.stop()
                reborn.append(FakeService(fake.port))
                reborn[0].answers[UPSERT] = store
            yield Document(str(n), "t")

    reborn: list[FakeService] = []
    with Client(fake.address, timeout_s=10) as client:
        result = client.upsert("c", source(), batch=3)
    reborn[0].stop()
    assert result.written == 60
    assert set(store.documents) == {str(n) for n in range(60)}


def test_a_conditional_write_is_not_repeated_when_its_outcome_is_unknown(
    fake: FakeService, client: Any
) -> None:
    store = Store(lambda number, request, context: context.abort(grpc.StatusCode.UNAVAILABLE, "gone"))
    fake.answers[UPSERT] = store
    with pytest.raises(ringfort.Unavailable):
        client.upsert("c", [Document("a", "t", if_version=Version(1, 1))])
    assert len(store.batches) == 1


def test_an_error_of_the_stream_is_raised(fake: FakeService, client: Any) -> None:
    fake.answers[UPSERT] = Store(
        lambda number, request, context: abort(
            context, grpc.StatusCode.NOT_FOUND, "no collection named 'c'", field="collection"
        )
    )
    with pytest.raises(ringfort.NotFound, match="no collection named 'c'") as caught:
        client.upsert("c", _documents(1000), batch=10)
    assert caught.value.field == "collection"


def test_a_batch_that_is_never_acknowledged_ends_at_the_deadline(fake: FakeService, connect: Any) -> None:
    over = threading.Event()
    fake.answers[UPSERT] = Store(lambda number, request, context: over.wait(10) and None)
    client = connect(timeout_s=0.3)
    with pytest.raises(ringfort.DeadlineExceeded):
        client.upsert("c", _documents(1))
    over.set()


def test_a_long_upsert_outlives_the_deadline_of_one_stream(fake: FakeService, connect: Any) -> None:
    pause = threading.Event()
    store = Store(lambda number, request, context: pause.wait(0.02) and None)
    fake.answers[UPSERT] = store
    assert connect(timeout_s=0.4).upsert("c", _documents(40), batch=1).written == 40
    assert len(fake.contexts) > 1


def test_a_source_that_fails_is_heard(fake: FakeService, client: Any) -> None:
    def source() -> Iterator[Document]:
        yield from _documents(10)
        raise ringfort.Unavailable("the source's own service is away")

    fake.answers[UPSERT] = Store()
    with pytest.raises(ringfort.Unavailable, match="the source's own"):
        client.upsert("c", source(), batch=2)


def test_leaving_a_stream_early_ends_it(fake: FakeService) -> None:
    ended = threading.Event()

    def store(requests: Iterator[pb.UpsertRequest], context: Any) -> Iterator[pb.UpsertResponse]:
        context.add_callback(ended.set)
        yield from map(written, requests)

    fake.answers[UPSERT] = store
    with Client(fake.address) as client:
        results = client.upsert_stream("c", _documents(1000), batch=1)
        assert next(results).written == 1
        results.close()  # type: ignore[attr-defined]
        assert ended.wait(10)


async def test_an_asynchronous_source_is_taken_too(fake: FakeService) -> None:
    async def source() -> AsyncIterator[Document]:
        for document in _documents(10):
            yield document

    store = Store()
    fake.answers[UPSERT] = store
    async with AsyncClient(fake.address) as client:
        assert (await client.upsert("c", source(), batch=3)).written == 10
    assert list(store.documents) == [str(n) for n in range(10)]
