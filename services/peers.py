"""The internal ports: calls between processes of one service, guarded by a token that they share.

Errors arrive as the classes they were raised as. A process that is away is Unavailable at once; nothing waits
for it to come back but whoever keeps a connection for that purpose.
"""

import asyncio
import contextlib
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from services import status, tasks
from services.deadline import Deadline
from shard_router.errors import RingfortError, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

Stub = TypeVar("Stub")
Context = grpc.aio.ServicerContext[Any, Any]

TOKEN_HEADER = "ringfort-token"
#: Silence on a connection after which it is probed, and how long the answer may take.
_PROBE_MS, _PROBE_WAIT_MS = 5_000, 3_000
#: A call that brings no deadline gets this one.
DEFAULT_S = 30.0
#: How long calls on a connection to where a peer was before may take to fail.
_LEAVE_S = 5.0

_CLIENT_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", _PROBE_MS),
    ("grpc.keepalive_timeout_ms", _PROBE_WAIT_MS),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)


def own_host(host: str) -> str:
    """The address to listen on; for `auto`, that by which other machines know this one."""
    return socket.gethostbyname(socket.gethostname()) if host == "auto" else host


class Port:
    """An internal server; a servicer's methods take a message and a Deadline."""

    def __init__(self, servicers: Mapping[ServiceDescriptor, object], token: str) -> None:
        self._token = token
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        for descriptor, servicer in servicers.items():
            handlers = {method.name: self._handler(method, servicer) for method in descriptor.methods}
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(descriptor.full_name, handlers),)
            )

    async def start(self, address: str = "127.0.0.1:0") -> str:
        """Listen; HOST:PORT of where."""
        host, _, _ = address.rpartition(":")
        port = self._server.add_insecure_port(address)
        await self._server.start()
        return f"{host}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Refuse what is new, let what runs finish within `grace_s`, cut the rest."""
        await self._server.stop(grace_s)

    def _handler(self, method: MethodDescriptor, servicer: object) -> Any:
        answer = getattr(servicer, method.name)
        request_type = message_factory.GetMessageClass(method.input_type)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        wrapped = self._streaming(answer) if method.server_streaming else self._unary(answer)
        return make(
            wrapped,
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _unary(self, answer: Callable[[Any, Deadline], Any]) -> Callable[[Any, Context], Any]:
        async def unary(request: Any, context: Context) -> Any:
            try:
                return await answer(request, self._admitted(context))
            except Exception as error:
                await _abort(context, error)

        return unary

    def _streaming(
        self, answer: Callable[[Any, Deadline], AsyncIterator[Any]]
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def streaming(requests: Any, context: Context) -> AsyncIterator[Any]:
            try:
                answers: Any = answer(requests, self._admitted(context))
                async with contextlib.aclosing(answers):
                    async for each in answers:
                        yield each
            except Exception as error:
                await _abort(context, error)

        return streaming

    def _admitted(self, context: Context) -> Deadline:
        """The call's deadline; Unauthenticated without the token."""
        for name, value in context.invocation_metadata() or ():
            if name == TOKEN_HEADER and hmac.compare_digest(str(value), self._token):
                left_s = context.time_remaining()
                return Deadline.after(DEFAULT_S if left_s is None else left_s)
        raise Unauthenticated("an internal port answers only to the processes of its own service")


async def _abort(context: Context, error: Exception) -> None:
    if isinstance(error, RingfortError):
        await context.abort(status.code_of(error), status.message_of(error), status.internal_metadata(error))
    log.error("an internal call failed", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


class Peer(Generic[Stub]):
    """Another process, at an address that may change; every call carries the token."""

    def __init__(self, name: str, make_stub: Callable[[grpc.aio.Channel], Stub], token: str) -> None:
        self.name = name
        self.metadata = ((TOKEN_HEADER, token),)
        #: Empty while it is away.
        self.address = ""
        #: Set, and replaced, whenever the address changes.
        self.moved = asyncio.Event()
        self._make_stub = make_stub
        self._channel: grpc.aio.Channel | None = None
        self._stub: Stub | None = None
        #: Connections to where it was before, with what gives them up.
        self._leaving: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def move(self, address: str) -> None:
        """It answers there from now on; nowhere, where that is empty."""
        if address == self.address:
            return
        self._leave()
        self.address = address
        if address:
            self._channel = grpc.aio.insecure_channel(address, _CLIENT_OPTIONS)
            self._stub = self._make_stub(self._channel)
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    @contextlib.contextmanager
    def calling(self) -> Iterator[Stub]:
        """Its stub; within, errors of calls are those of the other side, or Unavailable where it is away."""
        if self._stub is None:
            raise Unavailable(f"{self.name} is away")
        try:
            yield self._stub
        except grpc.aio.AioRpcError as error:
            raise status.error_from(error, self.name) from error
        except asyncio.CancelledError:
            # A call on a connection that is given up ends like a call that its caller gave up.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable(f"{self.name} is away") from None

    async def close(self) -> None:
        """Give the connection up, and every call on it."""
        self._leave()
        self.address = ""
        leaving = dict(self._leaving)
        await tasks.end(*leaving)
        for channel in leaving.values():
            await channel.close()

    def _leave(self) -> None:
        channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            task = asyncio.create_task(_left(channel), name=f"leave {self.name}")
            self._leaving[task] = channel
            task.add_done_callback(self._leaving.pop)


async def _left(channel: grpc.aio.Channel) -> None:
    # gRPC's own grace cannot be cut short.
    await asyncio.sleep(_LEAVE_S)
    await channel.close()
