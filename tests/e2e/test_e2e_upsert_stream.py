"""UpsertStream: answers in order, failures by document, and a service that reads no faster than it writes."""

import threading
from collections.abc import Callable, Iterator

import grpc
import numpy as np
from refusal import refusal_of
from rpc import Rpc

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.documents import Document

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_answers_come_in_the_order_of_the_batches(rpc: Rpc, client: Client, collection: str) -> None:
    sizes = [1, 40, 2, 30, 1, 1, 25, 3, 17, 1] * 2
    batches = [
        pb.UpsertRequest(
            collection=collection,
            documents=[
                pb.Document(id=f"{b}/{i}", text=f"batch {b} row {i} " * (1 + size // 10)) for i in range(size)
            ],
            wait=pb.VISIBLE,
        )
        for b, size in enumerate(sizes)
    ]
    answers = list(rpc.document.UpsertStream(iter(batches)))
    assert [[status.id for status in answer.statuses] for answer in answers] == [
        [document.id for document in batch.documents] for batch in batches
    ]
    assert all(status.code == 0 for answer in answers for status in answer.statuses)
    assert all(answer.visible for answer in answers)
    for log in {log for answer in answers for log in answer.token.positions}:
        positions = [answer.token.positions[log] for answer in answers if log in answer.token.positions]
        assert positions == sorted(positions)
    assert client.count(collection) == sum(sizes)


def test_a_later_batch_overwrites_an_earlier_one(rpc: Rpc, client: Client, collection: str) -> None:
    # The earlier text takes far longer to embed.
    batches = [
        pb.UpsertRequest(collection=collection, documents=[pb.Document(id="a", text=text)])
        for text in ("a long text " * 200, "short", "last")
    ]
    list(rpc.document.UpsertStream(iter(batches)))
    (stored,) = client.get(collection, ["a"])
    assert stored is not None
    assert stored.text == "last"


def test_a_refused_document_stops_neither_its_batch_nor_the_stream(
    rpc: Rpc, client: Client, collection: str
) -> None:
    def batch(*documents: pb.Document) -> pb.UpsertRequest:
        return pb.UpsertRequest(collection=collection, documents=documents, wait=pb.VISIBLE)

    bad = pb.Document(id="bad", text="x", attributes={"rank": pb.Value(keyword="high")})
    answers = list(
        rpc.document.UpsertStream(
            iter(
                [
                    batch(pb.Document(id="a", text="a"), bad, pb.Document(id="b", text="b")),
                    batch(bad, pb.Document(id="", text="no id")),
                    batch(pb.Document(id="c", text="c")),
                ]
            )
        )
    )
    assert [[status.code for status in answer.statuses] for answer in answers] == [
        [0, INVALID_ARGUMENT, 0],
        [INVALID_ARGUMENT, INVALID_ARGUMENT],
        [0],
    ]
    assert answers[0].statuses[1].field == "documents[1].attributes.rank"
    assert [status.field for status in answers[1].statuses] == [
        "documents[0].attributes.rank",
        "documents[1].id",
    ]
    assert sorted(document.id for document in client.scan(collection)) == ["a", "b", "c"]


def test_a_batch_that_means_nothing_ends_the_stream_after_the_answers_before_it(
    rpc: Rpc, client: Client, collection: str
) -> None:
    good = pb.UpsertRequest(collection=collection, documents=[pb.Document(id="a", text="a")])
    lost = pb.UpsertRequest(collection="no-such-collection", documents=[pb.Document(id="b", text="b")])
    answers = []
    try:
        for answer in rpc.document.UpsertStream(iter([good, lost])):
            answers.append(answer)  # noqa: PERF402  # those before the error count
    except grpc.RpcError as error:
        refusal = refusal_of(error)
    assert [len(answer.statuses) for answer in answers] == [1]
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "collection")
    assert client.count(collection) == 1


def test_the_service_reads_no_further_ahead_than_it_can_write(
    rpc: Rpc, client: Client, make_collection: Callable[..., str]
) -> None:
    name = make_collection(dim=1024)
    rows, batches = 256, 60
    matrix = np.random.default_rng(0).normal(size=(rows, 1024)).astype(np.float32)
    packed = pb.Matrix(data=matrix.tobytes(), rows=rows, dim=1024)
    sent, answered, furthest = 0, 0, 0
    lock = threading.Lock()

    def requests() -> Iterator[pb.UpsertRequest]:
        nonlocal sent, furthest
        for _ in range(batches):
            with lock:
                sent += 1
                furthest = max(furthest, sent - answered)
            # The same documents again and again: what is measured is the stream, not the index.
            documents = [pb.Document(id=str(i)) for i in range(rows)]
            yield pb.UpsertRequest(collection=name, documents=documents, vectors=packed)

    for _ in rpc.document.UpsertStream(requests()):
        with lock:
            answered += 1
    assert (sent, answered) == (batches, batches)
    # Two rounds of work under way, and what HTTP/2's windows hold; 1 MiB a batch.
    assert furthest < batches / 2
    assert client.count(name) == rows


def test_the_client_streams_any_iterable_and_tells_what_was_refused(client: Client, collection: str) -> None:
    def documents() -> Iterator[Document]:
        for i in range(600):
            yield Document(f"u{i}" if i % 200 else "", f"text {i % 10}", attributes={"rank": i})

    written = client.upsert(collection, documents(), batch=64)
    assert written.written == 597
    assert written.visible
    assert [failure.code for failure in written.failures] == [grpc.StatusCode.INVALID_ARGUMENT] * 3
    assert client.count(collection) == 597
    assert len(client.search(collection, text="text", k=1000, read_after=written.token)) == 597
