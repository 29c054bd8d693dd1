"""BatchSearch: many queries with shared options, each row cached for itself, answered packed."""

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from protos.ringfort import v1 as pb
from services import wire
from services.config import Limits
from services.deadline import Deadline
from services.gateway.answers import Answers, Computed
from services.gateway.catalog import Catalog, Served
from services.gateway.embeddings import Embeddings
from services.gateway.fanout import FanOut
from services.gateway.retrieval import DEFAULT_K, Retrieval, check_cache, check_mode, check_share
from shard_router.errors import InvalidField
from shard_router.filters import check
from shard_router.model import Include

IDS_ONLY = Include(attributes=False, text=False)

#: What is cached of a row: its ids, and its scores as float32 bytes.
_ROW = msgspec.msgpack.Decoder(tuple[list[str], bytes])

#: Queries of one batch: texts, or vectors float32 [n, dim].
Queries = Sequence[str] | np.ndarray


class BatchRetrieval:
    """The packed face of the first stage."""

    def __init__(
        self,
        catalog: Catalog,
        retrieval: Retrieval,
        embeddings: Embeddings,
        fanout: FanOut,
        answers: Answers,
        limits: Limits,
    ) -> None:
        self._catalog = catalog
        self._retrieval = retrieval
        self._variant = embeddings.manifest.variant
        self._fanout = fanout
        self._answers = answers
        self._limits = limits

    async def search(
        self, request: pb.BatchSearchRequest, tenant: str, deadline: Deadline
    ) -> pb.BatchSearchResponse:
        """The k best documents for every row."""
        began = time.perf_counter()
        served = self._catalog.resolve(tenant, request.collection)
        k = self._retrieval.check_k(request.k if request.HasField("k") else DEFAULT_K, "k")
        check_mode(request.mode)
        wire.effort_from(request)
        check_share(request.min_coverage, "min_coverage")
        check_cache(request.cache)
        queries = self._queries(served, request)
        at_least = await self._retrieval.wait_for_token(served, request.read_after.positions, deadline)
        names: list[bytes] = []
        bodies: list[tuple[bytes, pb.ServedFrom.ValueType] | None] = [None] * len(queries)
        if request.cache != pb.BYPASS:
            names = self._names(served, request, queries, k)
            staleness_ms = self._retrieval.staleness(served, request)
            found = await self._answers.get_many(served, names, at_least, staleness_ms)
            bodies = [None if f is None else (f.body, f.served_from) for f in found]
        missing = [i for i, body in enumerate(bodies) if body is None]
        timings = pb.Timings(cache_ms=(time.perf_counter() - began) * 1e3)
        coverage = pb.Coverage(shards_asked=len(served.replicas), shards_answered=len(served.replicas))
        if missing:
            rest = queries if len(missing) == len(queries) else _picked(queries, missing)
            made, coverage = await self._compute(served, request, rest, k, deadline, timings)
            for i, computed in zip(missing, made, strict=True):
                bodies[i] = (computed.body, pb.INDEX)
            if names:
                self._answers.keep(served, [(names[i], m) for i, m in zip(missing, made, strict=True)])
        response = _packed([body for body in bodies if body is not None], k)
        self._retrieval.provenance(served, response)
        response.coverage.CopyFrom(coverage)
        timings.total_ms = (time.perf_counter() - began) * 1e3
        response.timings.CopyFrom(timings)
        return response

    def _queries(self, served: Served, request: pb.BatchSearchRequest) -> Queries:
        queries: Queries
        kind = request.WhichOneof("queries")
        if kind == "texts":
            queries = request.texts.values
            # Here and not where they are embedded: there the cached rows are gone, and the numbers with them.
            for i, text in enumerate(queries):
                self._retrieval.check_text(text, f"texts[{i}]")
        elif kind == "vectors":
            queries = wire.array_from(request.vectors, "vectors", dim=served.collection.dim)
        else:
            raise InvalidField("queries", "is missing: give vectors or texts")
        wire.check_rows(queries, kind, self._limits.max_batch_rows)
        return queries

    def _names(self, served: Served, request: pb.BatchSearchRequest, queries: Queries, k: int) -> list[bytes]:
        effort = wire.effort_from(request)
        options = msgspec.msgpack.encode(
            (
                "batch", k, request.exact, effort.share, effort.recall,
                request.filter.SerializeToString(), self._variant,
            )
        )  # fmt: skip
        told = [
            b"t" + query.encode() if isinstance(query, str) else b"v" + query.tobytes() for query in queries
        ]
        return [self._answers.key(served, "", query, options) for query in told]

    async def _compute(
        self,
        served: Served,
        request: pb.BatchSearchRequest,
        queries: Queries,
        k: int,
        deadline: Deadline,
        timings: pb.Timings,
    ) -> tuple[list[Computed], pb.Coverage]:
        filter = wire.filter_from(request.filter)
        if filter is not None:
            filter = check(filter, served.collection.schema)
        if not isinstance(queries, np.ndarray):
            began = time.perf_counter()
            made = await self._retrieval.text_vectors(
                served, queries, deadline, use_cache=request.cache != pb.BYPASS
            )
            queries = made.vectors
            timings.embed_ms = (time.perf_counter() - began) * 1e3
        found = await self._fanout.search(
            served, queries, k,
            filter=filter,
            exact=request.exact,
            effort=wire.effort_from(request),
            include=IDS_ONLY,
            min_coverage=request.min_coverage,
            deadline=deadline,
        )  # fmt: skip
        timings.search_ms, timings.merge_ms = found.search_ms, found.merge_ms
        computed = []
        for hits in found.hits:
            scores = np.array([hit.score for hit in hits], np.float32)
            body = msgspec.msgpack.encode(([hit.id for hit in hits], scores.tobytes()))
            computed.append(Computed(body, found.position, found.as_of_ms, found.complete, timings))
        return computed, pb.Coverage(shards_asked=found.asked, shards_answered=found.answered)


def _picked(queries: Queries, rows: Sequence[int]) -> Queries:
    return queries[rows] if isinstance(queries, np.ndarray) else [queries[i] for i in rows]


def _packed(bodies: "Sequence[tuple[bytes, pb.ServedFrom.ValueType]]", k: int) -> pb.BatchSearchResponse:
    scores = np.full((len(bodies), k), -np.inf, np.float32)
    ids: list[str] = []
    counts: list[int] = []
    for i, (body, _) in enumerate(bodies):
        row_ids, raw = _ROW.decode(body)
        scores[i, : len(row_ids)] = np.frombuffer(raw, np.float32)
        ids.extend(row_ids)
        ids.extend([""] * (k - len(row_ids)))
        counts.append(len(row_ids))
    tiers = [tier for _, tier in bodies]
    cached = pb.INDEX not in tiers
    return pb.BatchSearchResponse(
        ids=ids,
        scores=wire.matrix_from(scores),
        counts=counts,
        row_served_from=tiers,
        served_from=(pb.REDIS if pb.REDIS in tiers else pb.L1) if cached else pb.INDEX,
    )
