"""A small gRPC server for the client's tests: any method of the contract, answered by a function."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import any_pb2, descriptor_pool, duration_pb2, message_factory
from google.rpc import error_details_pb2, status_pb2

from protos.ringfort import v1 as pb

Answer = Callable[[Any, grpc.ServicerContext], Any]


class FakeService(grpc.GenericRpcHandler):
    """Answers `Service/Method` with what was put into `answers`, and keeps every request it saw."""

    def __init__(self, port: int = 0) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[Any] = []
        self.contexts: list[grpc.ServicerContext] = []
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        service, _, name = handler_call_details.method.removeprefix("/").partition("/")
        method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        answer = self.answers.get(f"{service.removeprefix('ringfort.v1.')}/{name}")
        if answer is None:
            return None

        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            self.requests.append(request)
            self.contexts.append(context)
            return answer(request, context)

        kind = (
            grpc.stream_stream_rpc_method_handler
            if method.client_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return kind(
            handle,
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )

    def stop(self) -> None:
        self._server.stop(0).wait()


def abort(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    *,
    field: str = "",
    reason: str = "",
    retry_after_ms: int | None = None,
) -> None:
    """Fails a call as the service does: with google.rpc details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="ringfort")]
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        part = any_pb2.Any()
        part.Pack(detail)
        status.details.append(part)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


def written(request: pb.UpsertRequest, position: int = 0) -> pb.UpsertResponse:
    """The answer to a batch that was written whole."""
    return pb.UpsertResponse(
        statuses=[pb.WriteStatus(id=document.id) for document in request.documents],
        visible=request.wait == pb.VISIBLE,
        token=pb.WriteToken(positions={"log": position}),
    )


class Store:
    """UpsertStream over a dictionary; `before(batch_number, request, context)` may interfere."""

    def __init__(self, before: Callable[[int, pb.UpsertRequest, grpc.ServicerContext], None] | None = None):
        self.documents: dict[str, pb.Document] = {}
        self.batches: list[pb.UpsertRequest] = []
        self._before = before

    def __call__(
        self, requests: Iterator[pb.UpsertRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.UpsertResponse]:
        for request in requests:
            self.batches.append(request)
            if self._before:
                self._before(len(self.batches), request, context)
            self.documents.update({document.id: document for document in request.documents})
            yield written(request, len(self.documents))


PACKAGES = pb.Collection(
    name="packages",
    model="all-minilm-l6-v2@1",
    dim=384,
    attributes={"rank": pb.INT, "name": pb.KEYWORD},
    slots=128,
    shards=2,
    replicas=1,
    generation=1,
    aliases=["pypi"],
)


def search_answer(*ids: str, served_from: Any = pb.INDEX) -> pb.SearchResponse:
    """Hits with falling scores."""
    return pb.SearchResponse(
        hits=[
            pb.Hit(
                id=id,
                score=1 - 0.125 * rank,
                text=f"about {id}",
                attributes={"rank": pb.Value(int=rank), "name": pb.Value(keyword=id)},
                version=pb.Version(term=1, seq=rank + 1),
            )
            for rank, id in enumerate(ids)
        ],
        generation=1,
        space="s1",
        variant="v1",
        epoch=3,
        coverage=pb.Coverage(shards_asked=2, shards_answered=2),
        served_from=served_from,
        timings=pb.Timings(total_ms=3.25, embed_ms=2, search_ms=1),
    )
