"""Errors on the wire: canonical gRPC codes with google.rpc details.

`BadRequest` names the field, `RetryInfo` says when to come back, `ErrorInfo.reason` is the error class, and
`RequestInfo.request_id` is the trace-id of a traced call.
Source: https://google.aip.dev/193.
"""

import functools

import grpc
import msgspec
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from services.trace import current_id
from shard_router import errors

DOMAIN = "ringfort"

#: Errors travel as HTTP/2 trailers, of which clients take 8 KiB in all, escapes included.
MAX_MESSAGE_BYTES, MAX_FIELD_BYTES = 512, 256

#: The one table; a subclass without a line of its own takes its nearest base's.
CODES: dict[type[errors.RingfortError], grpc.StatusCode] = {
    errors.RingfortError: grpc.StatusCode.INTERNAL,
    errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidFilter: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DimensionMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PreconditionFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.TooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SpaceMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnknownLog: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LogPurged: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.VersionConflict: grpc.StatusCode.ABORTED,
    errors.StaleEpoch: grpc.StatusCode.ABORTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.ShardUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.EmbedderUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.GenerationChanged: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.SegmentCorrupt: grpc.StatusCode.DATA_LOSS,
    errors.NotImplementedHere: grpc.StatusCode.UNIMPLEMENTED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
}


def code_of(error: errors.RingfortError) -> grpc.StatusCode:
    """The canonical code of an error, by its class."""
    return next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)


def number(code: grpc.StatusCode) -> int:
    """A code as the integer that travels: NOT_FOUND is 5."""
    value: int = code.value[0]
    return value


def message_of(error: errors.RingfortError) -> str:
    """What an error says; a long one, such as of a long name, loses its middle."""
    return _shortened(str(error), MAX_MESSAGE_BYTES)


def details_of(error: errors.RingfortError) -> status_pb2.Status:
    """The google.rpc.Status of an error: code, message and every detail it has facts for."""
    message = message_of(error)
    status = status_pb2.Status(code=number(code_of(error)), message=message)
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    parts: list[any_pb2.Any] = []
    if error.field:
        field = _shortened(error.field, MAX_FIELD_BYTES)
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if trace_id := current_id():
        details.append(error_details_pb2.RequestInfo(request_id=trace_id))
    for detail in details:
        part = any_pb2.Any()
        part.Pack(detail)
        parts.append(part)
    status.details.extend(parts)
    return status


def trailing_metadata(error: errors.RingfortError) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries an error's details, as every gRPC library reads them."""
    return (("grpc-status-details-bin", details_of(error).SerializeToString()),)


#: Beside the public details, between processes of one service: the error's facts as MessagePack.
FACTS_HEADER = "ringfort-facts-bin"


def internal_metadata(error: errors.RingfortError) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata from which `error_from` makes the same error again."""
    facts = {
        name: value for name, value in vars(error).items() if isinstance(value, str | int | float | None)
    }
    told = (error.reason, [str(part) for part in error.args], facts)
    return ((FACTS_HEADER, _facts_encoder.encode(told)),)


def error_from(failed: grpc.aio.AioRpcError, peer: str) -> errors.RingfortError:
    """The error that another process of the service raised, or what became of a call to it."""
    for name, value in failed.trailing_metadata() or ():
        if name == FACTS_HEADER and isinstance(value, bytes):
            reason, args, facts = _facts_decoder.decode(value)
            cls = _by_reason().get(reason, errors.RingfortError)
            error = cls.__new__(cls)
            error.args = tuple(args)
            vars(error).update(facts)
            return error
    code, said = failed.code(), failed.details()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(peer)
    if code is grpc.StatusCode.UNAVAILABLE or code is grpc.StatusCode.CANCELLED:
        return errors.Unavailable(f"{peer} is away: {said}")
    return errors.RingfortError(f"{peer} failed: {code.name}: {said}")


_facts_encoder = msgspec.msgpack.Encoder()
_facts_decoder = msgspec.msgpack.Decoder(tuple[str, list[str], dict[str, str | int | float | bool | None]])


@functools.cache
def _by_reason() -> dict[str, type[errors.RingfortError]]:
    """Every class of errors by how it is spelled on the wire."""
    return {errors.reason_of(cls): cls for cls in CODES}


def _shortened(text: str, limit_bytes: int) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= limit_bytes:
        return text
    head = raw[: limit_bytes * 2 // 3].decode(errors="ignore")
    tail = raw[-(limit_bytes // 3 - len("…".encode())) :].decode(errors="ignore")
    return f"{head}…{tail}"
