"""A service with API keys: who may come in, how often, how many at once, and what belongs to whom."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from up import Up, lend_model

from protos.ringfort import v1 as pb
from ringfort import Client
from ringfort.calls import operations
from ringfort.calls.call import Call, whole
from ringfort.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    RingfortError,
    Unauthenticated,
    Unimplemented,
)

SETTINGS = {
    "RINGFORT_GATEWAY__API_KEYS": '{"red-key": "red", "blue-key": "blue"}',
    "RINGFORT_GATEWAY__OPERATOR_KEYS": '{"red-operator": "red"}',
    "RINGFORT_GATEWAY__RATE_PER_KEY": "100",
    "RINGFORT_GATEWAY__MAX_IN_FLIGHT": "4",
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Up]:
    data_dir = tmp_path_factory.mktemp("keys") / "data"
    lend_model(model_dir, data_dir)
    up = Up.start(data_dir, env=SETTINGS)
    yield up
    assert up.stop() == 0
    assert up.errors() == []


@pytest.fixture(scope="module")
def red(guarded: Up) -> Iterator[Client]:
    with Client(guarded.grpc, api_key="red-key") as client:
        yield client


@pytest.fixture(scope="module")
def blue(guarded: Up) -> Iterator[Client]:
    with Client(guarded.grpc, api_key="blue-key") as client:
        yield client


@pytest.mark.parametrize("key", [None, "", "green-key", "red-key "])
def test_nobody_comes_in_without_a_key(guarded: Up, key: str | None) -> None:
    with Client(guarded.grpc, api_key=key) as stranger, pytest.raises(Unauthenticated) as refused:
        stranger.collections()
    assert refused.value.reason == "UNAUTHENTICATED"
    headers = {} if key is None else {"x-api-key": key.strip() + "?"}
    answer = httpx.post(f"http://{guarded.http}/v1/embeddings", json={"input": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHENTICATED")


def test_a_key_opens_both_ports(guarded: Up, red: Client) -> None:
    assert red.embed(["x"]).shape == (1, 384)
    for headers in (
        {"x-api-key": "red-key"}, {"authorization": "Bearer red-key"}, {"x-api-key": "red-operator"},
    ):  # fmt: skip
        answer = httpx.post(f"http://{guarded.http}/v1/embeddings", json={"input": "x"}, headers=headers)
        assert answer.status_code == 200


@pytest.fixture(scope="module")
def red_operator(guarded: Up) -> Iterator[Client]:
    with Client(guarded.grpc, api_key="red-operator") as client:
        yield client


OPERATORS_CALLS = [
    operations.register_model("/nowhere"),
    operations.promote_model("none", "1"),
    operations.set_traffic("none", "1", 10),
    operations.rollback_model("none"),
    operations.add_shard("none"),
    operations.drain_shard("none", 0),
    operations.set_replicas("none", 1),
    Call("ClusterService/Backup", pb.BackupRequest(), pb.Job, whole),
    Call("ClusterService/Restore", pb.RestoreRequest(), pb.Job, whole),
]


@pytest.mark.parametrize("call", OPERATORS_CALLS, ids=lambda call: call.method)
def test_what_concerns_the_host_or_everybody_needs_an_operator_s_key(
    red: Client, red_operator: Client, call: Call[Any, Any]
) -> None:
    with pytest.raises(PermissionDenied, match="needs an operator's key") as refused:
        red.send(call)
    assert refused.value.reason == "PERMISSION_DENIED"
    with pytest.raises((FailedPrecondition, InvalidArgument, NotFound, Unimplemented)):
        red_operator.send(call)


def test_an_operator_is_its_tenant_in_everything_else(red: Client, red_operator: Client) -> None:
    red.create_collection("operated")
    assert red_operator.send(operations.add_shard("operated")).collection == "operated"
    assert [c.name for c in red_operator.collections()] == [c.name for c in red.collections()]
    red.delete_collection("operated")


def test_hot_keys_are_those_of_one_s_own_collections(red: Client, blue: Client) -> None:
    for client, name in ((red, "hot-red"), (blue, "hot-blue")):
        client.create_collection(name)
        client.upsert(name, [{"id": "a", "text": "the same text"}])
        for _ in range(5):
            client.search(name, text="the same question")
    for client, name in ((red, "hot-red"), (blue, "hot-blue")):
        told = client.hot_keys(limit=1_000).keys
        assert {(key.kind, key.collection) for key in told if key.collection.startswith("hot-")} == {
            ("answer", name)
        }
        assert all(
            key.kind == "answer" for key in told
        )  # an embedding's digest would tell its text to a guesser
        client.delete_collection(name)


def test_probes_need_no_key(guarded: Up) -> None:
    with grpc.insecure_channel(guarded.grpc) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert httpx.get(f"http://{guarded.http}/readyz").status_code == 200


def test_a_name_belongs_to_its_tenant(red: Client, blue: Client) -> None:
    for tenant, colour in ((red, "red"), (blue, "blue")):
        tenant.create_collection("same")
        tenant.upsert("same", [{"id": colour, "text": "text"}])
    for tenant, colour in ((red, "red"), (blue, "blue")):
        for served_from in ("INDEX", "L1"):
            found = tenant.search("same", text="text")
            assert ([hit.id for hit in found], found.served_from) == ([colour], served_from)
        assert [c.name for c in tenant.collections()] == ["same"]
        assert [status.name for status in tenant.cluster().collections] == ["same"]
    red.set_alias("red-alias", "same")
    with pytest.raises(NotFound):
        blue.count("red-alias")
    red.delete_collection("same")
    assert [hit.id for hit in blue.search("same", text="text")] == ["blue"]


def test_more_calls_at_once_than_are_let_in_are_told_to_come_back(guarded: Up, red: Client) -> None:
    def ask(i: int) -> RingfortError | None:
        try:
            red.embed([f"one of many texts, {i} {j}" for j in range(60)])
        except RingfortError as error:
            return error
        return None

    with ThreadPoolExecutor(24) as pool:
        errors = [error for error in pool.map(ask, range(48)) if error is not None]
    assert 0 < len(errors) < 48
    for error in errors:
        assert isinstance(error, ResourceExhausted)
        assert error.reason in {"OVERLOADED", "QUOTA_EXCEEDED"}
        assert error.retry_after_ms is not None
        assert error.retry_after_ms > 0
    assert {error.reason for error in errors} >= {"OVERLOADED"}


def test_a_key_that_asks_too_often_is_told_when_to_come_back(red: Client, blue: Client) -> None:
    def ask_on_and_on() -> None:
        for _ in range(2_000):
            red.collections()

    with pytest.raises(ResourceExhausted) as refused:
        ask_on_and_on()
    assert refused.value.reason == "QUOTA_EXCEEDED"
    assert refused.value.retry_after_ms is not None
    assert 0 < refused.value.retry_after_ms < 1_000
    # The rate is each key's own.
    assert isinstance(blue.collections(), list)
