"""Every error has its code, and its facts travel."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services import status
from shard_router import errors


def all_errors() -> list[type[errors.RingfortError]]:
    found, todo = [], [errors.RingfortError]
    while todo:
        cls = todo.pop()
        found.append(cls)
        todo.extend(c for c in cls.__subclasses__() if c.__module__ == errors.__name__)
    return found


@pytest.mark.parametrize("cls", all_errors(), ids=lambda c: c.__name__)
def test_every_error_class_has_a_line_in_the_table(cls: type[errors.RingfortError]) -> None:
    assert cls in status.CODES
    if cls is not errors.RingfortError:
        assert status.CODES[cls] is not grpc.StatusCode.INTERNAL


def test_details_carry_field_reason_and_retry() -> None:
    told = status_pb2.Status.FromString(status.trailing_metadata(errors.DimensionMismatch("v", 3, 4))[0][1])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert told.details[0].Unpack(info)
    assert told.details[1].Unpack(bad)
    assert (told.code, info.reason) == (3, "DIMENSION_MISMATCH")
    assert bad.field_violations[0].field == "v"
    retry = error_details_pb2.RetryInfo()
    assert status.details_of(errors.Overloaded("queue", 5, retry_after_ms=250)).details[-1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250
