"""What an operator sees: metrics of every stage, traces through all parts, and which part is slow."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from loadtests.drive.house import House
from protos.ringfort import v1 as pb
from ringfort import Client

#: A caller's own trace: W3C's version, trace-id, parent-id and the flag that it is sampled.
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
DELAY_MS = 200.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        self._changed = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._spans += scope.spans
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str, root: str, count: int = 1) -> list[Any]:
        """All spans of a trace, once so many calls of that name have ended."""

        def found() -> list[Any]:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

        def complete() -> bool:
            return sum(span.name == root for span in found()) >= count

        with self._changed:
            assert self._changed.wait_for(complete, 60), [span.name for span in self._spans]
            return found()


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, int]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    kept = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, port
    server.stop(None).wait()


@pytest.fixture(scope="module")
def house(
    collector: tuple[Collector, int], model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    settings = {
        "RINGFORT_TELEMETRY__OTLP": f"http://127.0.0.1:{collector[1]}",
        "RINGFORT_TELEMETRY__TRACE_SHARE": "0",
        "RINGFORT_TELEMETRY__RECALL_AUDIT_S": "0.001",
        "RINGFORT_CACHE__OP_TIMEOUT_MS": "20000",
        "RINGFORT_CACHE__L1_BYTES": "0",
    }
    with House(model_dir, tmp_path_factory.mktemp("house"), **settings) as house:
        with Client(house.grpc) as client:
            client.create_collection("notes")
            client.upsert("notes", [{"id": str(i), "text": f"note {i}"} for i in range(50)])
        yield house


@pytest.fixture
def channel(house: House) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(house.grpc) as channel:
        yield channel


def call(
    channel: grpc.Channel, method: str, request: Any, answer: Any, traceparent: str = TRACEPARENT
) -> Any:
    rpc = channel.unary_unary(
        f"/ringfort.v1.{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    return rpc(request, timeout=60, metadata=(("traceparent", traceparent),))


def scraped(house: House) -> dict[str, float]:
    lines = httpx.get(f"http://{house.http}/metrics", timeout=30).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def stage_ms(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The mean time of every stage between two scrapes."""
    told: dict[str, float] = {}
    for name in after:
        if found := re.fullmatch(r'ringfort_stage_seconds_count\{stage="(\w+)"\}', name):
            total = name.replace("_count", "_sum")
            count = after[name] - before[name]
            if count:
                told[found[1]] = 1e3 * (after[total] - before[total]) / count
    return told


def upsert(channel: grpc.Channel, id: str, traceparent: str) -> None:
    document = pb.Document(id=id, text=f"note {id}")
    request = pb.UpsertRequest(collection="notes", documents=[document], wait=pb.VISIBLE)
    call(channel, "DocumentService/Upsert", request, pb.UpsertResponse, traceparent)


def search(channel: grpc.Channel, text: str, traceparent: str) -> None:
    request = pb.SearchRequest(collection="notes", text=text, k=3)
    call(channel, "SearchService/Search", request, pb.SearchResponse, traceparent)


def test_a_trace_goes_through_all_parts(collector: tuple[Collector, int], channel: grpc.Channel) -> None:
    upsert(channel, "traced", TRACEPARENT)
    search(channel, "a traced note", TRACEPARENT)
    spans = collector[0].trace(TRACE_ID, "Search")
    roots = {span.name: span for span in spans if not span.name.islower()}
    assert set(roots) == {"Upsert", "Search"}
    for root in roots.values():
        assert root.parent_span_id.hex() == "00f067aa0ba902b7"
        inside = [span for span in spans if span.parent_span_id == root.span_id]
        for span in inside:
            assert root.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano + 5_000_000
    below = {
        name: {span.name for span in spans if span.parent_span_id == root.span_id}
        for name, root in roots.items()
    }
    embedded = {"embedder.queue", "embedder.tokenize", "embedder.inference"}
    assert below["Upsert"] >= embedded | {"gateway.commit", "gateway.visible", "metadata.postgres"}
    assert below["Search"] >= embedded | {"cache.redis", "gateway.fanout", "shard.search", "shard.faiss"}


@pytest.mark.parametrize(
    ("target", "span", "root"),
    [("postgres", "metadata.postgres", "Upsert"), ("redis", "cache.redis", "Search")],
)
def test_a_slow_dependency_is_the_stage_that_is_slow(
    house: House, collector: tuple[Collector, int], channel: grpc.Channel, target: str, span: str, root: str
) -> None:
    trace_id = f"{hash(target) & (2**100 - 1):032x}"
    before = scraped(house)
    house.delay(target, DELAY_MS)
    try:
        for number in range(3):
            traceparent = f"00-{trace_id}-00f067aa0ba902b7-01"
            if target == "postgres":
                upsert(channel, f"slow-{number}", traceparent)
            else:
                search(channel, f"slow note {number}", traceparent)
        after = scraped(house)
    finally:
        house.delay(target, 0.0)
    slow_ms = stage_ms(before, after)
    # What waits for it is as slow; of the stages that are a dependency's or a part's own it is the slowest.
    own = {"queue", "tokenize", "inference", "faiss", "merge", "redis", "postgres"} & slow_ms.keys()
    assert max(own, key=slow_ms.__getitem__) == target, slow_ms
    assert slow_ms[target] >= DELAY_MS
    spans = collector[0].trace(trace_id, root, count=3)
    inside = [each for each in spans if each.name != root]
    ms = {id(each): (each.end_time_unix_nano - each.start_time_unix_nano) / 1e6 for each in inside}
    named = [each for each in inside if each.name == span]
    assert named
    assert max(ms[id(each)] for each in named) >= DELAY_MS


def test_an_error_carries_the_trace_id(channel: grpc.Channel) -> None:
    request = pb.SearchRequest(collection="nowhere", text="x")
    with pytest.raises(grpc.RpcError) as refused:
        call(channel, "SearchService/Search", request, pb.SearchResponse)
    trailing = dict(refused.value.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    [told] = [each for each in status.details if each.Is(error_details_pb2.RequestInfo.DESCRIPTOR)]
    info = error_details_pb2.RequestInfo()
    told.Unpack(info)
    assert info.request_id == TRACE_ID


def test_http_continues_a_trace_too(house: House, collector: tuple[Collector, int]) -> None:
    trace_id = "c" * 32
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    url = f"http://{house.http}/v1/search"
    answer = httpx.post(url, json={"collection": "nowhere", "text": "x"}, headers=headers, timeout=30)
    assert answer.json()["error"]["trace_id"] == trace_id
    httpx.post(url, json={"collection": "notes", "text": "by http"}, headers=headers, timeout=30)
    assert "shard.faiss" in {span.name for span in collector[0].trace(trace_id, "http_search", count=2)}


def test_recall_is_audited(house: House) -> None:
    with Client(house.grpc) as client:
        dim = client.collection("notes").dim
        rng = np.random.default_rng(1)
        for _ in range(200):
            client.search("notes", vector=rng.normal(size=dim).astype(np.float32), cache=False)
            told = scraped(house)
            if told["ringfort_recall_audits_total"] >= 2:
                break
        assert told["ringfort_recall_audits_total"] >= 2
        assert told["ringfort_recall_documents_wanted_total"] >= 20
        assert told["ringfort_recall_documents_found_total"] == told["ringfort_recall_documents_wanted_total"]


def test_models_collections_lag_and_the_process_are_told(house: House) -> None:
    told = scraped(house)
    assert told['ringfort_collection_documents{collection="notes"}'] >= 50
    assert told['ringfort_collection_lag_positions{collection="notes"}'] == 0
    [texts] = [value for name, value in told.items() if name.startswith("ringfort_model_texts_total{")]
    assert texts >= 50
    assert told["ringfort_shard_tail_age_s"] < 60
    assert told["process_open_fds"] > 10


def test_log_lines_are_json_without_payloads(house: House) -> None:
    assert house.service is not None
    lines = (house.service.data_dir / "logs" / "ringfort.log").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert events
    assert all({"time", "level", "logger", "message"} <= event.keys() for event in events)
    assert not any("slow note" in line for line in lines)


def test_without_traces_a_service_does_without_opentelemetry() -> None:
    # redis-py imports it where it is installed; so it is made to look as if it were not.
    program = "import sys; sys.modules['opentelemetry'] = None; import services.embedded"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
