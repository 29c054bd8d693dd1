"""What a balancer, a probe and an explorer ask of the running service."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def test_health_serving(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
