"""What a balancer, a probe or an explorer asks of the running service, and what it does not do yet."""

import os
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from refusal import refused
from rpc import Rpc

from protos.ringfort import v1 as pb

SERVICES = [
    f"ringfort.v1.{name}Service"
    for name in ("Embedding", "Document", "Search", "Collection", "Index", "Model", "Cluster")
]


@pytest.mark.parametrize("name", ["", *SERVICES])
def test_every_service_says_serving(channel: grpc.Channel, name: str) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_does_not_know_other_services(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    refusal = refused(lambda: stub.Check(health_pb2.HealthCheckRequest(service="ringfort.v1.Nothing")))
    assert refusal.code is grpc.StatusCode.NOT_FOUND


def ask_reflection(channel: grpc.Channel, **question: str) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(**question)
    return next(stub.ServerReflectionInfo(iter([request])))


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    listed = ask_reflection(channel, list_services="").list_services_response.service
    assert {service.name for service in listed} >= {*SERVICES, "grpc.health.v1.Health"}


@pytest.mark.parametrize("name", SERVICES)
def test_reflection_describes_each_service(channel: grpc.Channel, name: str) -> None:
    described = ask_reflection(channel, file_containing_symbol=name)
    assert described.file_descriptor_response.file_descriptor_proto


NOT_YET: list[tuple[str, str, Any]] = [
    ("index", "Reindex", pb.ReindexRequest(collection="any", source_collection="other")),
    ("cluster", "Backup", pb.BackupRequest(destination="any")),
    ("cluster", "Restore", pb.RestoreRequest(source="any")),
]


@pytest.mark.parametrize(("stub", "method", "message"), NOT_YET, ids=[f"{s}.{m}" for s, m, _ in NOT_YET])
def test_what_is_not_there_yet_says_so_by_name(rpc: Rpc, stub: str, method: str, message: Any) -> None:
    call = getattr(getattr(rpc, stub), method)
    refusal = refused(lambda: call(message))
    assert refusal.code is grpc.StatusCode.UNIMPLEMENTED
    assert f"{stub.capitalize()}Service.{method}" in refusal.message
    assert refusal.reason == "NOT_IMPLEMENTED_HERE"


def test_the_models_are_listed_with_their_space(rpc: Rpc) -> None:
    model = rpc.model.List(pb.ListModelsRequest()).models[0]
    embedded = rpc.embedding.Embed(pb.EmbedRequest(texts=["any"]))
    assert f"{model.name}@{model.version}" == embedded.model
    assert (model.space, model.variant, model.dim) == (embedded.space, embedded.variant, embedded.vectors.dim)
    assert model.state == pb.Model.LIVE


def test_describe_tells_what_the_service_is_made_of(rpc: Rpc, collection: str) -> None:
    told = rpc.cluster.Describe(pb.DescribeRequest())
    assert told.composition == ("cluster" if os.environ.get("COMPOSITION") else "embedded")
    assert told.version
    assert (told.limits.max_k, told.limits.max_batch_rows, told.limits.max_id_bytes) == (1_000, 2_048, 256)
    assert (told.limits.max_text_bytes, told.limits.max_attributes_bytes) == (32 * 1024, 16 * 1024)
    assert told.limits.max_request_bytes == 16 * 1024 * 1024
    assert {component.name for component in told.components} >= {"postgres", "valkey", "cache"}
    (status,) = [status for status in told.collections if status.name == collection]
    assert [replica.state for replica in status.replicas] == ["serving"] * len(status.logs)
