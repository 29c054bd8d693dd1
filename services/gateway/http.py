"""The HTTP face: embeddings and rerank as other servers offer them, search and recommend as JSON of the
protobuf messages, and what operators ask for.

It calls the same methods as the gRPC server, behind the same admission, and says errors as
`{"error": {"code", "message", "field", "reason"}}`.
Sources: https://platform.openai.com/docs/api-reference/embeddings, https://docs.cohere.com/reference/rerank.
"""

import base64
import contextlib
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import uvicorn
from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from protos.ringfort import v1 as pb
from services import status
from services.config import GatewaySettings
from services.deadline import Deadline
from services.gateway.admission import Admission
from services.gateway.server import DEFAULT_TENANT, PortTaken, tenant_of
from services.gateway.servicers import Call, EmbeddingService, SearchService
from services.telemetry import Telemetry
from services.trace import current_id
from services.tracing import Tracing
from shard_router.errors import InvalidField, NotFound, RingfortError, TooLarge

log = logging.getLogger(__name__)

#: Canonical code -> HTTP status; https://cloud.google.com/apis/design/errors#handling_errors.
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


class Http:
    """The second port."""

    def __init__(
        self,
        settings: GatewaySettings,
        embedding: EmbeddingService,
        search: SearchService,
        telemetry: Telemetry,
        admission: Admission,
        ready: Callable[[], Awaitable[str]],
        tracing: Tracing | None = None,
    ) -> None:
        """`ready` says what is missing, or nothing."""
        self._settings = settings
        self._tracing = tracing
        self._embedding = embedding
        self._search = search
        self._telemetry = telemetry
        self._admission = admission
        self._ready = ready
        app = Starlette(
            routes=[
                Route("/v1/embeddings", self._route("embeddings", self._embeddings), methods=["POST"]),
                Route("/v1/rerank", self._route("rerank", self._rerank), methods=["POST"]),
                Route("/v1/search", self._route("search", self._searched), methods=["POST"]),
                Route("/v1/recommend", self._route("recommend", self._recommended), methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )
        self._server = _Uvicorn(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
            )
        )

    async def serve(self, *listening: socket.socket) -> None:
        """Serve until `stop`; returns when the last answer is out."""
        await self._server.serve(sockets=list(listening))

    def stop(self) -> None:
        """Ask `serve` to end."""
        self._server.should_exit = True

    def _route(
        self, name: str, answer: Callable[[dict[str, Any], Call], Awaitable[dict[str, Any]]]
    ) -> Callable[[Request], Awaitable[Response]]:
        method, tracing = self._telemetry.methods.method(f"http_{name}"), self._tracing

        async def route(request: Request) -> Response:
            began = time.perf_counter()
            code = grpc.StatusCode.OK
            traced = None if tracing is None else tracing.begin(f"http_{name}", request.headers.items())
            try:
                body = await self._body(request)
                key, tenant = self._caller(request)
                self._admission.enter(key, time.monotonic())
                try:
                    deadline = Deadline.after(self._settings.default_timeout_s)
                    return JSONResponse(await answer(body, Call(tenant, deadline)))
                finally:
                    self._admission.leave()
            except RingfortError as error:
                code = status.code_of(error)
                told = _error(code, str(error), error.field, error.reason, error.retry_after_ms)
                if isinstance(error, TooLarge):
                    told.status_code = 413
                return told
            except Exception:
                code = grpc.StatusCode.INTERNAL
                log.exception("POST /v1/%s failed", name)
                return _error(code, "internal error; the server's log has the reason", "", "INTERNAL", None)
            finally:
                method.ended(code.name, time.perf_counter() - began)
                if traced is not None:
                    traced.end(code.name)

        return route

    async def _body(self, request: Request) -> dict[str, Any]:
        limit = self._settings.limits.max_request_bytes
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > limit:
                raise TooLarge("body", limit)
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise InvalidField("body", f"is not JSON: {error}") from None
        except RecursionError:
            raise InvalidField("body", "nests too deep") from None
        if not isinstance(body, dict):
            raise InvalidField("body", "is not a JSON object")
        return body

    def _caller(self, request: Request) -> tuple[str, str]:
        if not self._settings.api_keys:
            return "", DEFAULT_TENANT
        given = request.headers.get("x-api-key", "")
        authorization = request.headers.get("authorization", "")
        if not given and authorization.lower().startswith("bearer "):
            given = authorization[7:]
        return given, tenant_of(self._settings.api_keys, given)

    async def _embeddings(self, body: dict[str, Any], call: Call) -> dict[str, Any]:
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidField("input", "is not a text or a list of texts")
        encoding = body.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise InvalidField("encoding_format", f"{encoding!r} is neither float nor base64")
        asked = {"model": body.get("model", ""), "dimensions": body.get("dimensions", 0)}
        request = _parsed(
            asked | {"texts": texts, "traffic_key": body.get("user") or ""},
            pb.EmbedRequest(input_type=pb.DOCUMENT),
        )
        with _fields_as_asked("texts", "input"):
            made = await self._embedding.Embed(request, call)
        vectors = np.frombuffer(made.vectors.data, np.float32).reshape(made.vectors.rows, made.vectors.dim)
        tokens = sum(row.tokens for row in made.rows)
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": vector.tolist()
                    if encoding == "float"
                    else base64.b64encode(vector.tobytes()).decode(),
                }
                for i, vector in enumerate(vectors)
            ],
            "model": made.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    async def _rerank(self, body: dict[str, Any], call: Call) -> dict[str, Any]:
        documents = body.get("documents")
        if not isinstance(documents, list):
            raise InvalidField("documents", "is not a list")
        texts = [d.get("text") if isinstance(d, dict) else d for d in documents]
        ranker = {name: body[name] for name in ("ranker", "model") if body.get(name)}
        if len(set(map(str, ranker.values()))) > 1:
            raise InvalidField("model", "is another than ranker: give one of them")
        asked = {"query": body.get("query", ""), "texts": texts, "top_n": body.get("top_n") or 0}
        request = _parsed(asked | {"ranker": next(iter(ranker.values()), "")}, pb.RerankRequest())
        with _fields_as_asked("texts", "documents"), _fields_as_asked("ranker", next(iter(ranker), "model")):
            made = await self._embedding.Rerank(request, call)
        results = []
        for hit in made.hits:
            result: dict[str, Any] = {"index": hit.index, "relevance_score": hit.score}
            if body.get("return_documents"):
                result["document"] = {"text": texts[hit.index]}
            results.append(result)
        return {"results": results, "model": made.ranker}

    async def _searched(self, body: dict[str, Any], call: Call) -> dict[str, Any]:
        raw = await self._search.Search(_parsed(_filter_text(body), pb.SearchRequest()), call)
        return _json(pb.SearchResponse.FromString(raw))

    async def _recommended(self, body: dict[str, Any], call: Call) -> dict[str, Any]:
        if isinstance(body.get("retrieve"), dict):
            body["retrieve"] = _filter_text(body["retrieve"])
        raw = await self._search.Recommend(_parsed(body, pb.RecommendRequest()), call)
        return _json(pb.RecommendResponse.FromString(raw))

    async def _metrics(self, request: Request) -> Response:
        return Response(self._telemetry.exposition(), media_type="text/plain; version=0.0.4")

    async def _healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, request: Request) -> Response:
        missing = await self._ready()
        return PlainTextResponse(f"{missing}\n" if missing else "ok\n", 503 if missing else 200)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the composition root has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(address: str, *, shares_port: bool = False) -> socket.socket:
    """A listening socket at HOST:PORT; PortTaken in one sentence where that cannot be.

    With `shares_port` others that say so too may listen there beside it.
    """
    host, _, port = address.rpartition(":")
    try:
        return socket.create_server((host.strip("[]"), int(port)), backlog=1024, reuse_port=shares_port)
    except OSError as error:
        # create_server tells the address once more, in Python's words.
        reason = str(error.strerror or error).partition(" (while")[0]
        raise PortTaken(f"cannot listen on {address}: {reason.lower()}") from None


def _parsed(body: Mapping[str, Any], message: Any) -> Any:
    try:
        return json_format.ParseDict(dict(body), message)
    except json_format.ParseError as error:
        raise InvalidField("body", str(error)) from None


@contextlib.contextmanager
def _fields_as_asked(field: str, asked: str) -> Iterator[None]:
    """Says an error of the message's field under the name it has in the HTTP request."""
    try:
        yield
    except (InvalidField, NotFound) as error:
        if not error.field.startswith(field):
            raise
        where = asked + error.field.removeprefix(field)
        if isinstance(error, NotFound):
            raise NotFound(error.kind, error.name, where) from None
        raise InvalidField(where, error.problem) from None


def _filter_text(body: dict[str, Any]) -> dict[str, Any]:
    """A filter given as text, in place of the message of the same meaning."""
    if isinstance(body.get("filter"), str):
        return {**body, "filter": {"text": body["filter"]}}
    return body


def _json(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        unquote_int64_if_possible=True,
    )
    return told


async def _no_such_route(request: Request, error: Exception) -> Response:
    """What Starlette says of an unknown path or method, as JSON like every other error."""
    assert isinstance(error, HTTPException)
    code = "NOT_FOUND" if error.status_code == 404 else "UNIMPLEMENTED"
    told = {"code": code, "message": f"no {request.method} {request.url.path}", "field": "", "reason": code}
    return JSONResponse({"error": told}, error.status_code, error.headers)


def _error(
    code: grpc.StatusCode, message: str, field: str, reason: str, retry_after_ms: int | None
) -> JSONResponse:
    headers = {"retry-after": str(max(1, retry_after_ms // 1000))} if retry_after_ms is not None else None
    error = {"code": code.name, "message": message, "field": field, "reason": reason}
    if trace_id := current_id():
        error["trace_id"] = trace_id
    return JSONResponse({"error": error}, HTTP_STATUS.get(code, 500), headers)
