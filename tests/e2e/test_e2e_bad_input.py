"""Bad input: the right code, the field by name, a reason, nothing written, and a service none the worse."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from bad_requests import BAD, INVALID, TEXTS, UNIMPLEMENTED, VECTORS, Bad
from grpc_health.v1 import health_pb2, health_pb2_grpc
from refusal import Refusal, refused
from rpc import Rpc
from scrape import Scrape
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import Client


@pytest.fixture(scope="module", autouse=True)
def collections(client: Client) -> Iterator[dict[str, list[tuple[object, ...]]]]:
    """The two collections the requests name, and what is in them."""
    schema = {
        "name": "keyword", "rank": "int", "share": "float", "free": "bool", "released": "timestamp",
        "tags": "keywords",
    }  # fmt: skip
    client.create_collection(TEXTS, attributes=schema)
    client.create_collection(VECTORS, dim=4, attributes=schema)
    client.upsert(TEXTS, [{"id": id, "text": f"document {id}"} for id in "abc"])
    client.upsert(VECTORS, [{"id": id, "vector": np.ones(4, np.float32)} for id in "abc"])
    yield {name: stored(client, name) for name in (TEXTS, VECTORS)}
    client.delete_collection(TEXTS)
    client.delete_collection(VECTORS)


def stored(client: Client, name: str) -> list[tuple[object, ...]]:
    """Every document of a collection, as it is compared."""
    return sorted((d.id, d.version, dict(d.attributes)) for d in client.scan(name))


@pytest.fixture(autouse=True)
def _nothing_written(client: Client, collections: dict[str, list[tuple[object, ...]]]) -> Iterator[None]:
    """Whatever a test asks for, the documents stay as they are and are found as before."""
    yield
    for name in (TEXTS, VECTORS):
        assert [id for id, *_ in collections[name]] == ["a", "b", "c"]
        assert stored(client, name) == collections[name]
        assert client.count(name) == 3
        assert sorted(hit.id for hit in client.search(name, id="a", cache=False)) == ["b", "c"]
    assert {c.name for c in client.collections()} >= {TEXTS, VECTORS}
    assert "bad-input-never" not in {c.name for c in client.collections()}


def send(rpc: Rpc, bad: Bad) -> Refusal:
    service, _, method = bad.call.partition(".")
    return refused(lambda: getattr(getattr(rpc, service), method)(bad.request))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(rpc: Rpc, name: str) -> None:
    bad = BAD[name]
    refusal = send(rpc, bad)
    assert refusal.code is bad.code, refusal
    if bad.field.endswith("…"):
        assert refusal.field.startswith(bad.field[:-1])
    elif name == "nested too deep":
        assert refusal.field.startswith(bad.field)
    else:
        assert refusal.field == bad.field
    assert refusal.reason
    assert refusal.reason == refusal.reason.upper()
    assert 0 < len(refusal.message) <= 1_000
    assert "internal error" not in refusal.message


def test_what_names_the_error_names_the_value_too(rpc: Rpc) -> None:
    assert "3" in send(rpc, BAD["wrong dimension"]).message
    assert send(rpc, BAD["wrong dimension"]).reason == "DIMENSION_MISMATCH"
    assert "colour" in send(rpc, BAD["unknown attribute in a filter"]).message
    assert send(rpc, BAD["unknown attribute in a filter"]).reason == "INVALID_FILTER"
    assert "100000" in send(rpc, BAD["k of 100,000"]).message
    assert "LEXICAL" in send(rpc, BAD["LEXICAL"]).message


@pytest.mark.parametrize("megabytes", [17, 100])
def test_a_request_over_the_limit_is_refused_by_grpc_itself(rpc: Rpc, megabytes: int) -> None:
    request = pb.EmbedRequest(texts=["x" * (megabytes * 1024 * 1024)])
    refusal = refused(lambda: rpc.embedding.Embed(request))
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refusal.message


@pytest.mark.parametrize("raw", [b"\xff\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["no protobuf", "no UTF-8"])
@pytest.mark.parametrize("method", ["SearchService/Search", "DocumentService/Upsert", "IndexService/GetJob"])
def test_bytes_that_are_no_request_are_an_invalid_one(channel: grpc.Channel, method: str, raw: bytes) -> None:
    refusal = refused(lambda: channel.unary_unary(f"/ringfort.v1.{method}")(raw))
    assert (refusal.code, refusal.field, refusal.reason) == (INVALID, "request", "INVALID_FIELD")


def test_bytes_that_are_no_request_end_a_stream(channel: grpc.Channel) -> None:
    stream = channel.stream_stream("/ringfort.v1.DocumentService/UpsertStream")
    refusal = refused(lambda: list(stream(iter([b"\xff\xff\xff\xff"]))))
    assert (refusal.code, refusal.field) == (INVALID, "request")


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    refusal = refused(lambda: channel.unary_unary("/ringfort.v1.SearchService/Guess")(b""))
    assert refusal.code is UNIMPLEMENTED


def test_a_deadline_that_has_passed_is_said_to_have(rpc: Rpc) -> None:
    texts = [f"a text that takes a while, number {i}" for i in range(1_500)]
    refusal = refused(lambda: rpc.embedding.Embed(pb.EmbedRequest(texts=texts), timeout=0.02))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED


def all_well(rpc: Rpc, channel: grpc.Channel, scrape: Scrape) -> None:
    """The service says so itself, answers, and has nothing left under way."""
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    found = rpc.search.Search(pb.SearchRequest(collection=TEXTS, text="document a", k=1, cache=pb.BYPASS))
    assert [hit.id for hit in found.hits] == ["a"]
    eventually(lambda: scrape.value("ringfort_gateway_in_flight") == 0)


@pytest.mark.parametrize("callers", [1, 32])
def test_two_hundred_bad_calls_leave_the_service_as_it_was(
    rpc: Rpc, channel: grpc.Channel, scrape: Scrape, callers: int
) -> None:
    bad = [list(BAD.values())[i % len(BAD)] for i in range(200)]
    with ThreadPoolExecutor(callers) as pool:
        refusals = list(pool.map(lambda one: send(rpc, one), bad))
    assert [refusal.code for refusal in refusals] == [one.code for one in bad]
    all_well(rpc, channel, scrape)


def test_callers_who_leave_leave_nothing_behind(rpc: Rpc, channel: grpc.Channel, scrape: Scrape) -> None:
    calls = [
        rpc.embedding.Embed.future(pb.EmbedRequest(texts=[f"left {i} {j}" for j in range(50)]))
        for i in range(50)
    ]
    for call in calls:
        call.cancel()
    all_well(rpc, channel, scrape)
