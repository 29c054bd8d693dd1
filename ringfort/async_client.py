"""The client for asyncio: the same calls, awaited."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import grpc
import grpc.aio

from protos.ringfort import v1 as pb
from ringfort import channel as channels
from ringfort import upload as uploads
from ringfort.calls import collections as collection_calls
from ringfort.calls import documents as document_calls
from ringfort.calls import embedding as embedding_calls
from ringfort.calls import operations as operation_calls
from ringfort.calls import search as search_calls
from ringfort.calls.call import Call, M, method_signature
from ringfort.documents import Document
from ringfort.errors import Internal, RingfortError, Unavailable, from_rpc
from ringfort.results import WriteResult
from ringfort.together import EMBED_TOGETHER, Together

P = ParamSpec("P")
T = TypeVar("T")


def _method(build: Callable[P, Call[M, T]]) -> "Callable[Concatenate[AsyncClient, P], Awaitable[T]]":
    """The coroutine method that sends the call `build` makes and gives its answer as a value."""

    @wraps(build)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = build(*args, **kwargs)
        return call.read(await self.send(call))

    method.__signature__ = method_signature(build)  # type: ignore[attr-defined]  # for help()
    return method


class AsyncClient:
    """A connection to a service at HOST:PORT (by default RINGFORT_SERVER, or 127.0.0.1:7700).

    An asynchronous context manager, for one event loop. Every call ends within `timeout_s`; an upsert
    gives each batch at least half of that. What can be repeated is sent again, a few times, while the
    service is away. Failures are raised as ringfort.RingfortError. `tls` is True for the system's roots,
    or gRPC credentials.

    Calls of `embed` made in one turn of the event loop that differ in their texts only are sent as one, up to
    `embed_together` short texts at a time; 1 sends each as it is. Each gets what it would get alone, but for
    the timings, which are the whole call's.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        api_key: str | None = None,
        tls: bool | grpc.ChannelCredentials | None = None,
        timeout_s: float = channels.DEFAULT_TIMEOUT_S,
        embed_together: int = EMBED_TOGETHER,
    ) -> None:
        self.server = channels.server_address(server)
        self._timeout_s = timeout_s
        self._metadata = channels.metadata(api_key)
        credentials = channels.credentials(tls)
        #: By whether gRPC may send a call again; each connects on its first call.
        self._channels = {retries: self._channel(credentials, retries) for retries in (True, False)}
        self._sends: dict[tuple[str, bool], Any] = {}
        self._together = Together(self._embed, embed_together, timeout_s)

    def _channel(self, credentials: grpc.ChannelCredentials | None, retries: bool) -> grpc.aio.Channel:
        options = channels.options(retries=retries)
        if credentials is None:
            return grpc.aio.insecure_channel(self.server, options)
        return grpc.aio.secure_channel(self.server, credentials, options)

    create_collection = _method(collection_calls.create_collection)
    collection = _method(collection_calls.collection)
    collections = _method(collection_calls.collections)
    delete_collection = _method(collection_calls.delete_collection)
    set_alias = _method(collection_calls.set_alias)
    patch = _method(document_calls.patch)
    delete = _method(document_calls.delete)
    get = _method(document_calls.get)
    scan_page = _method(document_calls.scan_page)
    count = _method(document_calls.count)
    search = _method(search_calls.search)
    batch_search = _method(search_calls.batch_search)
    recommend = _method(search_calls.recommend)
    embed = _method(embedding_calls.embed)
    rerank = _method(embedding_calls.rerank)
    reindex = _method(operation_calls.reindex)
    job = _method(operation_calls.job)
    jobs = _method(operation_calls.jobs)
    cancel_job = _method(operation_calls.cancel_job)
    activate = _method(operation_calls.activate)
    rollback = _method(operation_calls.rollback)
    models = _method(operation_calls.models)
    register_model = _method(operation_calls.register_model)
    set_traffic = _method(operation_calls.set_traffic)
    promote_model = _method(operation_calls.promote_model)
    rollback_model = _method(operation_calls.rollback_model)
    cluster = _method(operation_calls.cluster)
    add_shard = _method(operation_calls.add_shard)
    drain_shard = _method(operation_calls.drain_shard)
    set_replicas = _method(operation_calls.set_replicas)
    cache_stats = _method(operation_calls.cache_stats)
    hot_keys = _method(operation_calls.hot_keys)
    warm_cache = _method(operation_calls.warm_cache)

    async def scan(
        self,
        collection: str,
        *,
        filter: str | pb.Filter | None = None,
        include: Iterable[str] | None = None,
        page_size: int = 0,
    ) -> AsyncIterator[Document]:
        """Every document (that matches the filter), in a fixed order, fetched page by page."""
        page_token = ""
        while True:
            page, page_token = await self.scan_page(
                collection, filter=filter, include=include, page_size=page_size, page_token=page_token
            )
            for document in page:
                yield document
            if not page_token:
                return

    async def upsert(
        self,
        collection: str,
        documents: Iterable[document_calls.AnyDocument] | AsyncIterable[document_calls.AnyDocument],
        *,
        wait: str = "VISIBLE",
        batch: int = 256,
        truncate: bool = False,
    ) -> WriteResult:
        """Writes whole documents, however many; each replaces what had its id.

        Documents are `Document` or dicts with its fields, taken from the iterable (of either kind) as
        fast as the service acknowledges them. One that is refused is among the result's `failures` and
        stops nothing. `wait` is VISIBLE (also searchable) or DURABLE (committed).
        """
        results = self.upsert_stream(collection, documents, wait=wait, batch=batch, truncate=truncate)
        return WriteResult.total([result async for result in results])

    async def upsert_stream(
        self,
        collection: str,
        documents: Iterable[document_calls.AnyDocument] | AsyncIterable[document_calls.AnyDocument],
        *,
        wait: str = "VISIBLE",
        batch: int = 256,
        truncate: bool = False,
    ) -> AsyncIterator[WriteResult]:
        """The same, giving the result of each batch as it is acknowledged, in the documents' order."""
        batcher = document_calls.Batcher(collection, wait, batch, truncate)
        requests = document_calls.upsert_requests_async(documents, batcher)
        upload = uploads.Upload(self._timeout_s)
        stream = _UpsertStream(self._channels[True], self.server, self._metadata, self._timeout_s)
        try:
            while not isinstance(step := upload.next(time.monotonic()), uploads.Done):
                match step:
                    case uploads.Fill():
                        upload.filled(await anext(requests, None))
                    case uploads.Open():
                        stream.open()
                    case uploads.Send(request):
                        await stream.send(request)
                    case uploads.Receive():
                        try:
                            result = upload.answered(await stream.receive())
                        except RingfortError as error:
                            stream.cancel()
                            upload.broke(error, time.monotonic())
                        else:
                            yield result
                    case uploads.Close():
                        await stream.close()
                    case uploads.Pause(seconds):
                        await asyncio.sleep(seconds)
        finally:
            stream.cancel()

    async def send(self, call: Call[M, T]) -> M:
        """The service's answer to a call, as the message it came in."""
        if isinstance(call.request, pb.EmbedRequest):
            return cast("M", await self._together.send(call.request))
        return await self._send(call, self._timeout_s)

    async def _embed(self, request: pb.EmbedRequest, timeout_s: float) -> pb.EmbedResponse:
        return await self._send(embedding_calls.sent(request), timeout_s)

    async def _send(self, call: Call[M, T], timeout_s: float) -> M:
        key = (call.method, call.repeatable)
        if key not in self._sends:
            self._sends[key] = self._channels[call.repeatable].unary_unary(
                call.path,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer.FromString,
            )
        try:
            answer: M = await self._sends[key](call.request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error, self.server) from error
        return answer

    async def close(self) -> None:
        """Ends the connection; calls on their way fail."""
        for each in self._channels.values():
            await each.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _UpsertStream:
    """UpsertStream one step at a time."""

    def __init__(
        self, channel: grpc.aio.Channel, server: str, metadata: channels.Metadata, timeout_s: float
    ) -> None:
        self._rpc = channel.stream_stream(
            "/ringfort.v1.DocumentService/UpsertStream",
            request_serializer=pb.UpsertRequest.SerializeToString,
            response_deserializer=pb.UpsertResponse.FromString,
        )
        self._server, self._metadata, self._timeout_s = server, metadata, timeout_s
        self._call: Any = None
        self._write_failed = False

    def open(self) -> None:
        """Opens a stream that lasts `timeout_s` at most."""
        self._call = self._rpc(timeout=self._timeout_s, metadata=self._metadata)
        self._write_failed = False

    async def send(self, request: pb.UpsertRequest) -> None:
        """Writes a request, waiting for flow control; what goes wrong with it shows in `receive`."""
        try:
            await self._call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError):
            self._write_failed = True

    async def receive(self) -> pb.UpsertResponse:
        """The next answer. Raises RingfortError; Unavailable also where the stream ended early."""
        try:
            answer = await self._call.read()
        except grpc.RpcError as error:
            failure = from_rpc(error, self._server)
            # A write that met the end of the stream leaves this in place of the status the service sent;
            # as the next stream starts with one batch alone, that status is seen there.
            if self._write_failed and isinstance(failure, Internal):
                failure = Unavailable(f"the service at {self._server} ended the stream")
            raise failure from error
        if not isinstance(answer, pb.UpsertResponse):
            raise Unavailable(f"the service at {self._server} ended the stream early")
        return answer

    async def close(self) -> None:
        """Says that nothing more comes and waits until the service has ended the stream too."""
        try:
            await self._call.done_writing()
            while isinstance(await self._call.read(), pb.UpsertResponse):
                pass
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # everything was acknowledged before
        self._call = None

    def cancel(self) -> None:
        """Drops the stream, if one is open."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
