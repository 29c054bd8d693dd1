"""The service on the other gRPC server: the same answers, refusals and end."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from refusal import refused
from rpc import Rpc
from up import Up, lend_model
from waiting import eventually

from protos.ringfort import v1 as pb
from ringfort import Client

pytest.importorskip(
    "pygrpc_native", reason="pygrpc-native has no wheel for this platform", exc_type=ImportError
)

#: A call that SIGTERM meets is to be answered, however slow the machine is.
SETTINGS = {"RINGFORT_GATEWAY__SERVER": "native", "RINGFORT_GATEWAY__DRAIN_S": "60"}
#: Takes long enough to be met under way; no two calls embed the same.
MANY = 1_500


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Up]:
    data_dir = tmp_path_factory.mktemp("native") / "data"
    lend_model(model_dir, data_dir)
    up = Up.start(data_dir, env=SETTINGS)
    yield up
    # The last test has stopped it.
    assert up.stop() == 0
    assert up.errors() == []


@pytest.fixture(scope="module")
def bare(native: Up) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(native.grpc, options) as channel:
        yield channel


@pytest.fixture(scope="module")
def call(bare: grpc.Channel) -> Rpc:
    return Rpc.on(bare)


def test_a_socket_that_cannot_be_had_is_told(tmp_path: Path, model_dir: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    lend_model(model_dir, tmp_path / "data")
    with pytest.raises(AssertionError, match=r"ringfort: cannot listen behind .*TMPDIR") as told:
        Up.start(tmp_path / "data", env=SETTINGS | {"TMPDIR": str(deep)})
    assert "Traceback" not in str(told.value)


def slow(name: str) -> pb.EmbedRequest:
    return pb.EmbedRequest(texts=[f"{name}: a text that takes a while, number {i}" for i in range(MANY)])


def metric(up: Up, name: str) -> float:
    lines = httpx.get(f"http://{up.http}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_documents_are_written_and_found(native: Up) -> None:
    with Client(native.grpc) as client:
        client.create_collection("papers", attributes={"year": "int"})
        rows = [{"id": str(i), "text": f"paper {i}", "attributes": {"year": i}} for i in range(300)]
        assert client.upsert("papers", rows, batch=32).written == 300
        found = client.search("papers", text="paper 7", k=3, filter="year < 10")
        assert found[0].id == "7"
        assert client.count("papers") == 300


def test_an_error_names_the_field_and_says_why(call: Rpc, bare: grpc.Channel) -> None:
    refusal = refused(lambda: call.search.Search(pb.SearchRequest(collection="Größe", text="x", k=1)))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "collection")
    assert "Größe" in refusal.message
    assert refusal.reason
    refusal = refused(lambda: bare.unary_unary("/ringfort.v1.SearchService/Search")(b"\xff\xff"))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request")
    refusal = refused(lambda: bare.unary_unary("/ringfort.v1.SearchService/Guess")(b""))
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED


def test_a_deadline_that_has_passed_frees_what_it_held(native: Up, call: Rpc) -> None:
    refusal = refused(lambda: call.embedding.Embed(slow("late"), timeout=0.02))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: metric(native, "ringfort_gateway_in_flight ") == 0)


def test_a_message_over_the_limit_is_refused(call: Rpc) -> None:
    request = pb.EmbedRequest(texts=["x" * (17 * 1024 * 1024)])
    refusal = refused(lambda: call.embedding.Embed(request))
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refusal.message


def test_a_stream_is_answered_in_order_and_ends_with_its_error(call: Rpc) -> None:
    asked = [pb.EmbedRequest(texts=[f"row {i} {j}" for j in range(1 + i % 5)]) for i in range(20)]
    answers = list(call.embedding.EmbedStream(iter(asked)))
    assert [answer.vectors.rows for answer in answers] == [len(request.texts) for request in asked]
    lost = pb.EmbedRequest(texts=["x"], model="no-such-model")
    refusal = refused(lambda: list(call.embedding.EmbedStream(iter([asked[0], lost]))))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "model")


def test_probes_and_explorers_are_answered(bare: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(bare)
    for name in ("", "ringfort.v1.SearchService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    reflection = reflection_pb2_grpc.ServerReflectionStub(bare)
    listed = next(reflection.ServerReflectionInfo(iter([question]))).list_services_response.service
    assert {service.name for service in listed} >= {"ringfort.v1.SearchService", "grpc.health.v1.Health"}


def test_calls_are_counted_with_their_codes(native: Up, call: Rpc) -> None:
    def counted(code: str) -> float:
        return metric(native, f'ringfort_rpc_total{{code="{code}",method="Rerank"}}')

    call.embedding.Rerank(pb.RerankRequest(query="a", texts=["b"]))
    refused(lambda: call.embedding.Rerank(pb.RerankRequest(query="a")))
    eventually(lambda: (counted("OK"), counted("INVALID_ARGUMENT")) == (1, 1))


def test_sigterm_lets_what_runs_finish_and_nothing_new_in(native: Up, call: Rpc, bare: grpc.Channel) -> None:
    told: list[int] = []
    heard = threading.Event()

    def watch() -> None:
        for answer in health_pb2_grpc.HealthStub(bare).Watch(health_pb2.HealthCheckRequest()):
            told.append(answer.status)
            heard.set()
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                return

    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(watch)
        assert heard.wait(30)
        under_way = pool.submit(call.embedding.Embed, slow("drained"))
        eventually(lambda: metric(native, "ringfort_gateway_in_flight ") == 1)
        native.process.terminate()
        watching.result(30)
        refusal = refused(lambda: call.embedding.Embed(pb.EmbedRequest(texts=["new"])))
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert under_way.result(60).vectors.rows == MANY
    assert told == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    assert native.process.wait(60) == 0
