"""More than the embedder can take, callers who leave, and callers who do not read: nobody else pays."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from uuid import uuid4

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from refusal import refusal_of
from rpc import Rpc
from scrape import Scrape
from up import Up
from waiting import eventually

from protos.ringfort import v1 as pb

ROWS = 2_048
HITS = "ringfort_cache_l1_hits_total"


@pytest.fixture
def idle(scrape: Scrape) -> Iterator[Callable[[], bool]]:
    """Whether nothing is under way; every test leaves it so."""

    def idle() -> bool:
        return queued(scrape) == 0 and scrape.value("ringfort_gateway_in_flight") == 0

    yield idle
    eventually(idle)


def test_a_full_queue_refuses_says_when_to_come_back_and_recovers(
    rpc: Rpc, scrape: Scrape, idle: Callable[[], bool]
) -> None:
    # Four calls fill the queue to the last place; texts are long, so that it empties slowly.
    waiting = [rpc.embedding.Embed.future(work(ROWS)) for _ in range(4)]
    eventually(lambda: queued(scrape) > 3.5 * ROWS)
    with pytest.raises(grpc.RpcError) as raised:
        rpc.embedding.Embed(work(ROWS))
    refusal = refusal_of(raised.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert 0 < retry_after_s(raised.value) < 10
    for call in waiting:
        call.cancel()
    eventually(idle)
    assert rpc.embedding.Embed(work(1)).vectors.rows == 1


def test_a_caller_killed_in_the_middle_of_a_stream_leaves_no_work_behind(
    service: Up, scrape: Scrape, idle: Callable[[], bool]
) -> None:
    before = scrape.value("ringfort_embedder_abandoned_texts_total")
    code = (
        "import sys, grpc\n"
        "from protos.ringfort import v1 as pb\n"
        "from protos.ringfort.v1.embedding_pb2_grpc import EmbeddingServiceStub\n"
        "stub = EmbeddingServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "asked = (pb.EmbedRequest(texts=[f'{sys.argv[2]} {i} {j} ' * 40 for j in range(1500)])"
        " for i in range(100))\n"
        "list(stub.EmbedStream(asked))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, service.grpc, uuid4().hex]) as caller:
        try:
            eventually(lambda: queued(scrape) > 1_500)
        finally:
            caller.send_signal(signal.SIGKILL)
    eventually(idle)
    assert scrape.value("ringfort_embedder_abandoned_texts_total") - before > 1_000


def test_a_stream_nobody_reads_is_not_worked_on(
    service: Up, scrape: Scrape, idle: Callable[[], bool]
) -> None:
    """Its answers fill the connection's window, which else grows to megabytes; then the rest has to wait."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    texts = [f"{uuid4().hex} {i}" for i in range(128)]
    requests = 32
    asked = (pb.EmbedRequest(texts=texts[: len(texts) - number]) for number in range(requests))
    before = scrape.value(HITS)
    with grpc.insecure_channel(service.grpc, options) as channel:
        stream = Rpc.on(channel).embedding.EmbedStream(asked)
        first = next(stream)
        # The first request is computed, all others are remembered from it.
        assert settled(lambda: scrape.value(HITS)) - before < len(texts) * requests / 2
        rows = [first.vectors.rows, *(answer.vectors.rows for answer in stream)]
    assert rows == [len(texts) - number for number in range(requests)]


def test_callers_at_once_each_get_their_own(rpc: Rpc, idle: Callable[[], bool]) -> None:
    own = uuid4().hex
    calls = [rpc.embedding.Embed.future(pb.EmbedRequest(texts=[f"{own} {i}"])) for i in range(64)]
    together = [call.result().vectors.data for call in calls]
    assert len(set(together)) == 64
    again = rpc.embedding.Embed(pb.EmbedRequest(texts=[f"{own} {i}" for i in range(64)]))
    assert again.vectors.data == b"".join(together)
    assert all(row.cached for row in again.rows)


def work(rows: int) -> pb.EmbedRequest:
    """Texts that no cache knows, each about 200 tokens."""
    own = uuid4().hex[:8]
    return pb.EmbedRequest(texts=[f"{own} {i} " + "long winding river " * 60 for i in range(rows)])


def queued(scrape: Scrape) -> float:
    return scrape.value("ringfort_embedder_queue_texts")


def retry_after_s(error: grpc.RpcError) -> float:
    """What RetryInfo says; fails where there is none."""
    [status] = [
        status_pb2.Status.FromString(value)
        for key, value in error.trailing_metadata()
        if key == "grpc-status-details-bin"
    ]
    [info] = [
        error_details_pb2.RetryInfo.FromString(detail.value)
        for detail in status.details
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    ]
    return info.retry_delay.ToTimedelta().total_seconds()


def settled(value: Callable[[], float], quiet_s: float = 0.5) -> float:
    """A value that has not changed for a while."""
    latest, since_s = value(), monotonic()
    while monotonic() < since_s + quiet_s:
        sleep(0.02)
        if value() != latest:
            latest, since_s = value(), monotonic()
    return latest
