"""What can go wrong, as exceptions: one class for each canonical gRPC code a caller may act on.

The service sends google.rpc details with every error (https://google.aip.dev/193): the field at fault,
when to come back, and the class of the error. They become attributes here. A mistake that the client
notices by itself, before anything is sent, is an InvalidArgument too.
"""

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class RingfortError(Exception):
    """A call failed. `str(error)` is one sentence.

    `field` names the part of the request at fault ("" where none is), `reason` is the service's class of
    error (`DIMENSION_MISMATCH`), `retry_after_ms` says when to try again, where that helps.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        reason: str = "",
        retry_after_ms: int | None = None,
        code: grpc.StatusCode | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.field, self.reason, self.retry_after_ms = message, field, reason, retry_after_ms
        if code is not None:
            self.code = code


class InvalidArgument(RingfortError):
    """A field of the request cannot be accepted, whatever the state of the service."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(RingfortError):
    """There is no such collection or document."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(RingfortError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(RingfortError):
    """The state of the service does not allow this request: vectors of another space, an unknown token."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(RingfortError):
    """Somebody else was first: the document is at another version than `if_version`."""

    code = grpc.StatusCode.ABORTED


class ResourceExhausted(RingfortError):
    """A limit, a rate or a queue is full; `retry_after_ms` says when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(RingfortError):
    """No service answers, or a part that the answer needs is away."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(RingfortError):
    """The call's time ran out; a write may still have happened."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(RingfortError):
    """It was interrupted on this side."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(RingfortError):
    """This release of the service does not offer that."""

    code = grpc.StatusCode.UNIMPLEMENTED


class PermissionDenied(RingfortError):
    """The API key does not allow this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(RingfortError):
    """An API key is needed, and none that the service knows was given."""

    code = grpc.StatusCode.UNAUTHENTICATED


class DataLoss(RingfortError):
    """Stored bytes are not those that were written."""

    code = grpc.StatusCode.DATA_LOSS


class Internal(RingfortError):
    """The service failed in a way it did not foresee."""

    code = grpc.StatusCode.INTERNAL


_CLASSES: dict[grpc.StatusCode, type[RingfortError]] = {
    cls.code: cls for cls in RingfortError.__subclasses__()
}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_of_number(number: int) -> grpc.StatusCode:
    """The canonical code behind an integer on the wire; UNKNOWN for one that does not exist."""
    return _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def from_rpc(error: grpc.RpcError, server: str) -> RingfortError:
    """The error that a failed gRPC call stands for, with the details the service sent along."""
    call: grpc.Call = error  # type: ignore[assignment]  # both stacks raise errors that are calls too
    code = call.code() or grpc.StatusCode.UNKNOWN
    status = _status_of(call)
    if status is None:
        return _CLASSES.get(code, RingfortError)(
            _local_message(code, call.details() or "", server), code=code
        )
    field, reason, retry_after_ms = "", "", None
    for detail in status.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            field = bad.field_violations[0].field if bad.field_violations else ""
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry_after_ms = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds()
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
    return _CLASSES.get(code, RingfortError)(
        status.message or call.details() or code.name,
        field=field,
        reason=reason,
        retry_after_ms=retry_after_ms,
        code=code,
    )


def _status_of(call: grpc.Call) -> status_pb2.Status | None:
    """The google.rpc.Status in the trailing metadata; None where gRPC itself made the error."""
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            return status_pb2.Status.FromString(value)
    return None


def _local_message(code: grpc.StatusCode, details: str, server: str) -> str:
    """The sentence for an error that gRPC made on this side of the wire."""
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            # gRPC nests causes: "failed to connect to all addresses; last error: ...: Connection refused".
            return f"no service answers at {server} ({details.rpartition(': ')[2]})"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"the service at {server} did not answer in time"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"the service at {server} does not offer this call"
        case _:
            return details or code.name
