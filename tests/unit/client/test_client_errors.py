"""Failures become exceptions with facts; what can be repeated is, and nothing else."""

import socket
import threading
from typing import Any

import grpc
import pytest
from client_fakes import PACKAGES, FakeService, abort, search_answer

import ringfort
from protos.ringfort import v1 as pb
from ringfort import Client, Patch, RingfortError, Version
from ringfort.errors import code_of_number


def test_details_become_attributes(fake: FakeService, client: Any) -> None:
    fake.answers["SearchService/Search"] = lambda request, context: abort(
        context,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "embedder queue is full (8192)",
        field="query",
        reason="OVERLOADED",
        retry_after_ms=150,
    )
    with pytest.raises(ringfort.ResourceExhausted) as caught:
        client.search("c", text="t")
    error = caught.value
    assert str(error) == error.message == "embedder queue is full (8192)"
    assert (error.code, error.field, error.reason, error.retry_after_ms) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "query",
        "OVERLOADED",
        150,
    )


CLASSES = {
    "INVALID_ARGUMENT": ringfort.InvalidArgument,
    "NOT_FOUND": ringfort.NotFound,
    "ALREADY_EXISTS": ringfort.AlreadyExists,
    "FAILED_PRECONDITION": ringfort.FailedPrecondition,
    "ABORTED": ringfort.Aborted,
    "RESOURCE_EXHAUSTED": ringfort.ResourceExhausted,
    "UNAVAILABLE": ringfort.Unavailable,
    "DEADLINE_EXCEEDED": ringfort.DeadlineExceeded,
    "UNIMPLEMENTED": ringfort.Unimplemented,
    "PERMISSION_DENIED": ringfort.PermissionDenied,
    "UNAUTHENTICATED": ringfort.Unauthenticated,
    "DATA_LOSS": ringfort.DataLoss,
    "INTERNAL": ringfort.Internal,
    "OUT_OF_RANGE": RingfortError,
}


def test_every_code_has_its_class(fake: FakeService) -> None:
    fake.answers["CollectionService/Delete"] = lambda request, context: abort(
        context, grpc.StatusCode[request.name], "no"
    )
    with Client(fake.address) as client:
        for name, cls in CLASSES.items():
            with pytest.raises(RingfortError) as caught:
                client.delete_collection(name)
            assert type(caught.value) is cls
            assert caught.value.code is grpc.StatusCode[name]


def test_an_error_without_details_still_has_its_message(fake: FakeService, client: Any) -> None:
    fake.answers["SearchService/Search"] = lambda request, context: context.abort(
        grpc.StatusCode.FAILED_PRECONDITION, "plain words"
    )
    with pytest.raises(ringfort.FailedPrecondition, match="plain words") as caught:
        client.search("c", text="t")
    assert (caught.value.field, caught.value.reason, caught.value.retry_after_ms) == ("", "", None)


def test_a_method_the_service_lacks(fake: FakeService, client: Any) -> None:
    with pytest.raises(ringfort.Unimplemented, match=f"{fake.address} does not offer this call"):
        client.models()


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_no_service_is_one_sentence_with_the_address() -> None:
    server = f"127.0.0.1:{_closed_port()}"
    with Client(server) as client, pytest.raises(ringfort.Unavailable) as caught:
        client.count("c")
    assert str(caught.value) == f"no service answers at {server} (Connection refused)"


def test_every_call_has_a_deadline(fake: FakeService, connect: Any) -> None:
    release = threading.Event()
    fake.answers["SearchService/Search"] = lambda request, context: release.wait(10) and search_answer()
    client = connect(timeout_s=0.2)
    with pytest.raises(ringfort.DeadlineExceeded, match="did not answer in time"):
        client.search("c", text="t")
    release.set()
    assert fake.contexts[0].time_remaining() <= 0.2


def _fails_twice(answer: Any) -> Any:
    calls = iter(range(100))

    def behave(request: Any, context: grpc.ServicerContext) -> Any:
        if next(calls) < 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "just a moment")
        return answer

    return behave


def test_reads_and_whole_writes_are_sent_again_while_the_service_is_away(
    fake: FakeService, client: Any
) -> None:
    fake.answers["DocumentService/Count"] = _fails_twice(pb.CountResponse(count=7))
    fake.answers["DocumentService/Patch"] = _fails_twice(pb.PatchResponse(statuses=[pb.WriteStatus(id="a")]))
    assert client.count("c") == 7
    assert client.patch("c", [Patch("a", {"rank": 1})]).written == 1
    assert len(fake.requests) == 6


def test_a_conditional_write_or_a_creation_is_sent_once(fake: FakeService, client: Any) -> None:
    fake.answers["DocumentService/Patch"] = _fails_twice(pb.PatchResponse())
    fake.answers["CollectionService/Create"] = _fails_twice(PACKAGES)
    with pytest.raises(ringfort.Unavailable):
        client.patch("c", [Patch("a", {"rank": 1}, if_version=Version(1, 1))])
    with pytest.raises(ringfort.Unavailable):
        client.create_collection("c")
    assert len(fake.requests) == 2


def test_the_api_key_travels_with_every_call(fake: FakeService, connect: Any) -> None:
    fake.answers["DocumentService/Count"] = lambda request, context: pb.CountResponse()
    connect(api_key="secret").count("c")
    assert ("authorization", "Bearer secret") in fake.contexts[0].invocation_metadata()


def test_the_server_comes_from_the_environment(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["DocumentService/Count"] = lambda request, context: pb.CountResponse(count=3)
    monkeypatch.setenv("RINGFORT_SERVER", fake.address)
    with Client() as client:
        assert client.count("c") == 3
    monkeypatch.delenv("RINGFORT_SERVER")
    with Client() as client:
        assert client.server == "127.0.0.1:7700"


def test_an_unknown_code_on_the_wire_is_unknown() -> None:
    assert code_of_number(5) is grpc.StatusCode.NOT_FOUND
    assert code_of_number(99) is grpc.StatusCode.UNKNOWN
