"""The gRPC server: every rpc of the contract behind one wrapper.

The wrapper lets a call in (or refuses it), gives it a tenant and a deadline, turns errors into canonical
codes with details, and counts. A method may return a message or a message's bytes.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.ringfort.v1 import (
    cluster_pb2,
    collection_pb2,
    document_pb2,
    embedding_pb2,
    index_pb2,
    model_pb2,
    search_pb2,
)
from services import status
from services.config import GatewaySettings
from services.deadline import Deadline
from services.gateway.admission import Admission
from services.gateway.servicers import Call
from services.gateway.transport import Transport, left_s
from services.telemetry import Telemetry
from services.trace import current_id
from services.tracing import Tracing
from shard_router.errors import InvalidField, NotImplementedHere, RingfortError, Unauthenticated

log = logging.getLogger(__name__)

FILES = (
    embedding_pb2, document_pb2, search_pb2, collection_pb2, index_pb2, model_pb2, cluster_pb2,
)  # fmt: skip
SERVICES: dict[str, ServiceDescriptor] = {
    name: descriptor for file in FILES for name, descriptor in file.DESCRIPTOR.services_by_name.items()
}
DEFAULT_TENANT = "default"
Context = grpc.aio.ServicerContext[Any, Any]
#: By service, those that answer for its methods: of each method the first that has it.
Servicers = Mapping[str, Sequence[object]]


class PortTaken(RuntimeError):
    """The address cannot be listened on; one sentence."""


class Server:
    """One listening gRPC server; methods by rpc name."""

    def __init__(
        self,
        settings: GatewaySettings,
        servicers: Servicers,
        telemetry: Telemetry,
        admission: Admission,
        transport: Transport,
        tracing: Tracing | None = None,
        *,
        shares_port: bool = False,
    ) -> None:
        """`shares_port`: with other processes of the service, that the kernel gives connections in turn."""
        self._tracing = tracing
        self._settings = settings
        self._telemetry = telemetry
        self._admission = admission
        self._health = health.aio.HealthServicer()
        self._linger_s = transport.linger_s
        self._server = transport.make(
            options=(
                ("grpc.so_reuseport", int(shares_port)),  # else a taken port is an error
                ("grpc.max_receive_message_length", settings.limits.max_request_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),  # clients ping while they wait
            )
        )
        streams: dict[str, Any] = {}
        for name, descriptor in SERVICES.items():
            unary: dict[str, Any] = {}
            for method in descriptor.methods:
                handler = self._handler(method, method_of(servicers, name, method.name))
                if method.server_streaming:
                    streams[f"/{descriptor.full_name}/{method.name}"] = handler
                else:
                    unary[method.name] = handler
            self._server.add_registered_method_handlers(descriptor.full_name, unary)
        # Not by name: a stream of the native server whose reader is slow takes one of asyncio's few threads.
        self._server.add_generic_rpc_handlers((_Router(streams),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [descriptor.full_name for descriptor in SERVICES.values()]
        reflection.enable_server_reflection(
            (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self) -> str:
        """Listen, say SERVING, and return HOST:PORT; PortTaken where that cannot be."""
        host, _, port = self._settings.grpc.rpartition(":")
        try:
            if self._settings.tls_certificate and self._settings.tls_key:
                key = await asyncio.to_thread(self._settings.tls_key.read_bytes)
                certificate = await asyncio.to_thread(self._settings.tls_certificate.read_bytes)
                credentials = grpc.ssl_server_credentials([(key, certificate)])
                bound = self._server.add_secure_port(self._settings.grpc, credentials)
            else:
                bound = self._server.add_insecure_port(self._settings.grpc)
        except RuntimeError:
            bound = 0
        if not bound:
            raise PortTaken(f"cannot listen on {host}:{port}: the port is taken or not ours to use")
        try:
            await self._server.start()
        except (
            RuntimeError
        ) as error:  # the native server's; what is behind it has a path that may be too long
            raise PortTaken(f"cannot listen behind {host}:{bound}, where TMPDIR says: {error}") from None
        await self.say(serving=True)
        return f"{host}:{bound}"

    async def say(self, *, serving: bool) -> None:
        """What the health service says from now on."""
        states = health_pb2.HealthCheckResponse
        for name in ("", *(descriptor.full_name for descriptor in SERVICES.values())):
            await self._health.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse what is new, let what runs finish within `grace_s`, cut the rest."""
        if self._linger_s:
            self._admission.close()
        await self._health.enter_graceful_shutdown()
        if self._linger_s:
            await self._drain(grace_s)
            grace_s = 0
        await self._server.stop(grace_s)

    async def _drain(self, grace_s: float) -> None:
        """Wait until what was let in has ended, and its answers have had time to leave."""
        until_s = time.monotonic() + grace_s
        while self._admission.in_flight and time.monotonic() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(self._linger_s)

    def _handler(self, method: MethodDescriptor, answer: Any) -> Any:
        request_type = message_factory.GetMessageClass(method.input_type)
        streams = (method.client_streaming, method.server_streaming)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[streams]
        if answer is None:
            answer = _streaming_refusal(method) if method.server_streaming else _refusal(method)
        wrap = self._streaming if method.server_streaming else self._unary
        parse = functools.partial(_parse, request_type)
        # Parsed behind the wrapper: what gRPC cannot deserialize it answers with UNKNOWN.
        return make(wrap(method.name, parse, answer), request_deserializer=None, response_serializer=None)

    def _unary(
        self, name: str, parse: Callable[[bytes], Any], answer: Callable[[Any, Call], Any]
    ) -> Callable[[bytes, Context], Any]:
        method, tracing = self._telemetry.methods.method(name), self._tracing
        default_s = self._settings.default_timeout_s

        # The hottest wrapper of all, so without a context manager of its own; `_streaming` does the same.
        async def unary(request: bytes, context: Context) -> Any:
            began = time.monotonic()
            code = "OK"
            entered = False
            traced = None if tracing is None else tracing.begin(name, context.invocation_metadata() or ())
            try:
                key, tenant = self._caller(context)
                self._admission.enter(key, began)
                entered = True
                call = Call(tenant, Deadline(began + left_s(context, default_s)))
                return _serialized(await answer(parse(request), call))
            except Exception as error:
                refused, message, details = self._told(name, error)
                code = refused.name
                await context.abort(refused, message, details)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            finally:
                if entered:
                    self._admission.leave()
                method.ended(code, time.monotonic() - began)
                if traced is not None:
                    traced.end(code)

        return unary

    def _streaming(
        self, name: str, parse: Callable[[bytes], Any], answer: Callable[[Any, Call], AsyncIterator[Any]]
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        method, tracing = self._telemetry.methods.method(name), self._tracing

        async def parsed(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
            async for request in requests:
                yield parse(request)

        async def streaming(requests: Any, context: Context) -> AsyncIterator[Any]:
            began = time.monotonic()
            code = "OK"
            entered = False
            traced = None if tracing is None else tracing.begin(name, context.invocation_metadata() or ())
            try:
                key, tenant = self._caller(context)
                self._admission.enter(key, began)
                entered = True
                call = Call(tenant, Deadline(began + left_s(context, STREAM_TIMEOUT_S)))
                asked = parse(requests) if isinstance(requests, bytes) else parsed(requests)
                responses = answer(asked, call)
                async with contextlib.aclosing(responses):  # type: ignore[type-var]  # async generators all
                    async for response in responses:
                        yield _serialized(response)
            except Exception as error:
                refused, message, details = self._told(name, error)
                code = refused.name
                await context.abort(refused, message, details)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            finally:
                if entered:
                    self._admission.leave()
                method.ended(code, time.monotonic() - began)
                if traced is not None:
                    traced.end(code)

        return streaming

    @staticmethod
    def _told(name: str, error: Exception) -> tuple[grpc.StatusCode, str, Any]:
        """What a caller is told of an error: code, message, details."""
        if isinstance(error, RingfortError):
            return status.code_of(error), status.message_of(error), status.trailing_metadata(error)
        log.error("%s failed", name, exc_info=error)
        details = status.trailing_metadata(RingfortError("internal error")) if current_id() else ()
        return grpc.StatusCode.INTERNAL, "internal error; the server's log has the reason", details

    def _caller(self, context: Context) -> tuple[str, str]:
        """The call's key and tenant; Unauthenticated where keys are asked for and none fits."""
        keys = self._settings.api_keys
        if not keys:
            return "", DEFAULT_TENANT
        given = ""
        for name, value in context.invocation_metadata() or ():
            if name == "x-api-key":
                given = str(value)
            elif name == "authorization" and str(value).lower().startswith("bearer "):
                given = str(value)[7:]
        return given, tenant_of(keys, given)


#: A stream without a deadline of its own may go on this long.
STREAM_TIMEOUT_S = 24 * 3600.0


def method_of(servicers: Servicers, service: str, method: str) -> Any:
    """What answers a method of a service; None where nothing does."""
    return next((getattr(each, method) for each in servicers.get(service, ()) if hasattr(each, method)), None)


def tenant_of(keys: Mapping[str, str], given: str) -> str:
    """The tenant of an API key; Unauthenticated for an unknown one."""
    tenant = keys.get(given)
    if tenant is None:
        raise Unauthenticated("an API key is needed: send it as x-api-key or as a bearer token")
    return tenant


def _parse(request_type: type[Message], raw: bytes) -> Message:
    try:
        return request_type.FromString(raw)
    except DecodeError:
        raise InvalidField("request", f"is not a {request_type.DESCRIPTOR.name}") from None


def _serialized(answer: Any) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


class _Router(grpc.GenericRpcHandler):
    """Every stream of the contract by its path: one look-up a call."""

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handlers.get(handler_call_details.method)


def _refusal(method: MethodDescriptor) -> Callable[[Any, Call], Any]:
    async def refuse(request: Any, call: Call) -> Any:
        raise NotImplementedHere(f"{method.containing_service.name}.{method.name}")

    return refuse


def _streaming_refusal(method: MethodDescriptor) -> Callable[[Any, Call], AsyncIterator[Any]]:
    async def refuse(request: Any, call: Call) -> AsyncIterator[Any]:
        raise NotImplementedHere(f"{method.containing_service.name}.{method.name}")
        yield  # makes it a stream

    return refuse
