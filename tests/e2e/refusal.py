"""A refused call as its caller sees it: the code, and the google.rpc details sent along."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    """`field` is what BadRequest names, `reason` what ErrorInfo gives; "" where there is no such detail."""

    code: grpc.StatusCode
    message: str
    field: str = ""
    reason: str = ""


def refused(call: Callable[[], object]) -> Refusal:
    """How the call is refused; fails the test where it is not."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return refusal_of(raised.value)


def refusal_of(error: grpc.RpcError) -> Refusal:
    """The error read by the rules of https://google.aip.dev/193."""
    field = reason = ""
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status.FromString(value)
        assert status.code == error.code().value[0]
        assert status.message == error.details()
        for detail in status.details:
            if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                field = error_details_pb2.BadRequest.FromString(detail.value).field_violations[0].field
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                assert info.domain == "ringfort"
                reason = info.reason
    return Refusal(error.code(), error.details(), field, reason)
