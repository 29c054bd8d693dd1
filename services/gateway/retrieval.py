"""Search: answer cache, embedding, fan-out over the shards, merge, answer with coverage and timings.

Answers are built as serialized protobuf, so that a cached one is sent as it lies there: `served_from` and
`timings` are appended, which protobuf defines as a merge of the two messages
(https://protobuf.dev/programming-guides/encoding/#last-one-wins).
"""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from index_builder.models.manifest import ModelManifest
from index_builder.segments.index_spec import Effort
from protos.ringfort import v1 as pb
from services import wire
from services.config import Limits
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.gateway.answers import Answers, Cached, Computed, Question
from services.gateway.conditions import Conditions
from services.gateway.directory import Directory
from services.gateway.embeddings import Vectors
from services.gateway.fanout import FanOut
from services.gateway.models import Models
from services.gateway.recall_audit import RecallAudit
from services.gateway.served import Served
from services.telemetry import stage
from shard_router.errors import (
    DeadlineExceeded,
    InvalidField,
    NotFound,
    NotImplementedHere,
    UnknownLog,
)

log = logging.getLogger(__name__)

DEFAULT_K = 10
_L1 = stage("l1")
Request = pb.SearchRequest | pb.BatchSearchRequest | pb.RecommendRequest
Response = TypeVar("Response", pb.SearchResponse, pb.BatchSearchResponse, pb.RecommendResponse)


#: The end of a SearchResponse, as bytes: where it was served from, and what stands before the length of the
#: timings, which is one byte, as they are nine doubles.
_SERVED_FROM = {
    tier: pb.SearchResponse(served_from=tier).SerializeToString() for tier in pb.ServedFrom.values()
}
_TIMINGS = pb.SearchResponse(timings=pb.Timings()).SerializeToString()[:-1]


class Retrieval:
    """The first stage: from a query to the nearest documents."""

    def __init__(
        self,
        catalog: Directory,
        models: Models,
        fanout: FanOut,
        answers: Answers,
        limits: Limits,
        audit: RecallAudit,
    ) -> None:
        self._audit = audit
        self._catalog = catalog
        self._models = models
        self._fanout = fanout
        self._answers = answers
        self._limits = limits
        #: The filters that requests name.
        self.conditions = Conditions()

    async def search(self, request: pb.SearchRequest, tenant: str, deadline: Deadline) -> bytes:
        """A serialized SearchResponse."""
        began = time.perf_counter()
        served = self._catalog.resolve(tenant, request.collection)
        k = self.check_k(request.k if request.HasField("k") else DEFAULT_K, "k")
        check_mode(request.mode)
        kind = request.WhichOneof("query")
        if kind is None:
            raise InvalidField("query", "is missing: give text, vector or id")
        effort = wire.effort_from(request)
        check_share(request.min_coverage, "min_coverage")
        check_cache(request.cache)
        model = self._model(served, request, kind)

        def model_of(other: Served) -> ModelManifest | None:
            # Of this generation the same: an answer is computed by the variant that its name tells.
            return model if other is served else self._model(other, request, kind)

        at_least: Mapping[str, int] = {}
        if request.HasField("read_after"):
            at_least = await self.wait_for_token(served, request.read_after.positions, deadline)
        if request.cache == pb.BYPASS:
            made = await self._search(served, request, kind, model, k, effort, deadline)
            return made.body + _suffix(pb.INDEX, began, made.timings)
        question = Question(
            lambda served: self._name(served, request, kind, model_of(served), k, effort),
            lambda served, deadline: self._search(
                served, request, kind, model_of(served), k, effort, deadline
            ),
            request.min_coverage,
        )
        name = question.name(served)
        staleness_ms = self.staleness(served, request)
        found: Cached | Computed | None
        found = await self._answers.get(served, name, question, at_least, staleness_ms)
        cache_ms = 0.0
        if isinstance(found, Cached) and found.served_from == pb.L1:
            _L1.took(time.perf_counter() - began)
        if found is None:
            cache_ms = (time.perf_counter() - began) * 1e3
            found = await self._answers.once(served, name, question, at_least, deadline)
        if isinstance(found, Cached):
            return found.body + _suffix(found.served_from, began, cache_ms=cache_ms)
        return found.body + _suffix(pb.INDEX, began, found.timings, cache_ms)

    def _name(
        self,
        served: Served,
        request: pb.SearchRequest,
        kind: str,
        model: ModelManifest | None,
        k: int,
        effort: Effort,
    ) -> bytes:
        options = msgspec.msgpack.encode(
            (
                "search", k, request.exact, effort.share, effort.recall,
                request.filter.SerializeToString(), request.HasField("include"),
                request.include.SerializeToString(), self.variant(served, model),
            )
        )  # fmt: skip
        return self._answers.key(served, "", _query_bytes(request, kind), options)

    def _model(self, served: Served, request: pb.SearchRequest, kind: str) -> ModelManifest | None:
        return self.model_for(served, request, request.text) if kind == "text" else None

    def model_for(self, served: Served, request: Request, text: str) -> ModelManifest:
        """What embeds a request's texts, of which `text` is the first; a mismatch of spaces is refused.

        A canary takes its share by the request's own key, or by this text where it names none.
        """
        return self._models.for_queries(served.collection, (request.traffic_key or text).encode())

    def variant(self, served: Served, model: ModelManifest | None) -> str:
        """How the request's texts are embedded, or, where it has none, how the collection's are."""
        return model.variant if model else self._models.variant(served.collection)

    async def text_vectors(
        self,
        served: Served,
        model: ModelManifest,
        texts: Sequence[str],
        deadline: Deadline,
        *,
        use_cache: bool = True,
    ) -> Vectors:
        """Checked query texts in the collection's space, by a model that `model_for` gave."""
        return await self._models.embed(
            model, texts, InputType.QUERY, deadline, dim=served.collection.dim, use_cache=use_cache
        )

    async def document_vectors(
        self, served: Served, ids: Sequence[str], fields: Sequence[str], deadline: Deadline
    ) -> np.ndarray:
        """The vectors of stored documents, float32 [n, dim]; NotFound names the field of one that is not."""
        found: dict[str, np.ndarray] = {}
        told = await served.each_shard(lambda replica, epoch: replica.vectors(ids, epoch=epoch), deadline)
        for of_shard in told:
            found.update(of_shard)
        for id, field in zip(ids, fields, strict=True):
            if id not in found:
                raise NotFound("document", id, field)
        return np.stack([found[id] for id in ids])

    async def wait_for_token(
        self, served: Served, positions: Mapping[str, int], deadline: Deadline
    ) -> Mapping[str, int]:
        """Until every shard shows the writes of a token; its positions by log.

        UnknownLog if the token is of another collection's log, or beyond one.
        """
        if not positions:
            return {}
        served.check_token(positions)
        known = served.positions
        for log_id, position in positions.items():
            if position > known[log_id]:
                counter = await self._catalog.store.position(served.collection, served.database_of(log_id))
                if position > counter:
                    raise UnknownLog(log_id, position, counter)
        if not await served.wait_for(positions, deadline):
            raise DeadlineExceeded("read_after")
        return dict(positions)

    def check_text(self, text: str, field: str) -> None:
        """A query text that can be embedded."""
        if not text:
            raise InvalidField(field, "is empty")
        self._models.check_text(text, field, truncate=False)

    def check_k(self, k: int, field: str) -> int:
        """k within 1 and the limit."""
        if not 1 <= k <= self._limits.max_k:
            raise InvalidField(field, f"{k} is not between 1 and {self._limits.max_k}")
        return k

    @staticmethod
    def staleness(
        served: Served, request: "pb.SearchRequest | pb.BatchSearchRequest | pb.RecommendRequest"
    ) -> int:
        """How old an answer may be, in ms: the request's word, else the collection's."""
        if request.HasField("max_staleness_ms"):
            return request.max_staleness_ms
        return served.collection.max_staleness_ms

    def provenance(self, served: Served, response: Response, model: ModelManifest | None) -> Response:
        """The response, told what it was computed from."""
        collection = served.collection
        response.generation = collection.generation
        response.space = collection.space
        response.variant = self.variant(served, model)
        response.epoch = served.state.epoch
        return response

    async def _search(
        self,
        served: Served,
        request: pb.SearchRequest,
        kind: str,
        model: ModelManifest | None,
        k: int,
        effort: Effort,
        deadline: Deadline,
    ) -> Computed:
        timings = pb.Timings()
        collection = served.collection
        filter = self.conditions.checked(request.filter, collection) if request.HasField("filter") else None
        exclude: frozenset[str] = frozenset()
        if model is not None:
            self.check_text(request.text, "text")
            began = time.perf_counter()
            use_cache = request.cache != pb.BYPASS
            made = await self.text_vectors(served, model, [request.text], deadline, use_cache=use_cache)
            queries = made.vectors
            timings.embed_ms = (time.perf_counter() - began) * 1e3
            timings.queue_ms, timings.tokenize_ms = made.queue_ms, made.tokenize_ms
            timings.inference_ms = made.inference_ms
        elif kind == "vector":
            queries = wire.array_from(request.vector, "vector", dim=collection.dim)
            if len(queries) != 1:
                raise InvalidField("vector.rows", f"{len(queries)} rows where one is meant")
        else:
            wire.key(request.id, "id", self._limits.max_id_bytes)
            queries = await self.document_vectors(served, [request.id], ["id"], deadline)
            exclude = frozenset((request.id,))
        found = await self._fanout.search_rendered(
            served, queries, k,
            filter=filter,
            exact=request.exact,
            effort=effort,
            include=wire.include_from(request.include, request.HasField("include")),
            min_coverage=request.min_coverage,
            deadline=deadline,
            exclude=exclude,
        )  # fmt: skip
        if kind == "vector" and not request.exact:
            self._audit.offer(served, queries, k, filter, found)
        timings.search_ms, timings.merge_ms = found.search_ms, found.merge_ms
        body = found.hits[0].body() + _provenance(
            collection.generation,
            collection.space,
            self.variant(served, model),
            found.epoch,
            found.asked,
            found.answered,
        )
        return Computed(body, found.positions, found.as_of_ms, found.complete, timings)


def check_mode(mode: "pb.Mode.ValueType") -> None:
    """Dense retrieval is what this release does."""
    if mode in (pb.LEXICAL, pb.HYBRID):
        raise NotImplementedHere(f"mode {pb.Mode.Name(mode)}", "mode")
    if mode != pb.DENSE:
        raise InvalidField("mode", f"{mode} is not a mode")


def check_share(share: float, field: str) -> None:
    """Coverage is a share."""
    if not 0.0 <= share <= 1.0:
        raise InvalidField(field, f"{share} is not between 0 and 1")


def check_cache(cache: "pb.CacheControl.ValueType") -> None:
    """A control that is known here: another may forbid what we would do."""
    if cache not in (pb.DEFAULT, pb.BYPASS):
        raise InvalidField("cache", f"{cache} is not a cache control")


def _query_bytes(request: pb.SearchRequest, kind: str) -> bytes:
    if kind == "text":
        return b"t" + request.text.encode()
    if kind == "vector":
        return b"v" + request.vector.SerializeToString()
    return b"i" + request.id.encode()


@functools.lru_cache(1024)
def _provenance(generation: int, space: str, variant: str, epoch: int, asked: int, answered: int) -> bytes:
    """What a SearchResponse says it was computed from."""
    return pb.SearchResponse(
        generation=generation,
        space=space,
        variant=variant,
        epoch=epoch,
        coverage=pb.Coverage(shards_asked=asked, shards_answered=answered),
    ).SerializeToString()


def _suffix(
    served_from: "pb.ServedFrom.ValueType",
    began: float,
    timings: pb.Timings | None = None,
    cache_ms: float = 0.0,
) -> bytes:
    timings = timings or pb.Timings()
    timings.total_ms, timings.cache_ms = (time.perf_counter() - began) * 1e3, cache_ms
    told = timings.SerializeToString()
    return b"".join((_SERVED_FROM[served_from], _TIMINGS, bytes((len(told),)), told))
