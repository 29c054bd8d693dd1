"""BatchSearch: many queries with shared options, each row cached for itself, answered packed."""

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from services import wire
from services.config import Limits
from services.deadline import Deadline
from services.gateway.answers import Answers, Cached, Computed
from services.gateway.directory import Directory
from services.gateway.fanout import FanOut, Found
from services.gateway.retrieval import DEFAULT_K, Retrieval, check_cache, check_mode, check_share
from services.gateway.served import Served
from services.shard.rendering import RenderedHits
from shard_router.errors import InvalidField
from shard_router.model import Include

IDS_ONLY = Include(attributes=False, text=False)

#: What is cached of a row: its ids, and its scores as float32 bytes.
_ROW = msgspec.msgpack.Decoder(tuple[list[str], bytes])

#: The score beyond a query's last hit.
_NO_SCORE = np.float32(-np.inf).tobytes()

#: Queries of one batch: texts, or vectors float32 [n, dim].
Queries = Sequence[str] | np.ndarray


class BatchRetrieval:
    """The packed face of the first stage."""

    def __init__(
        self,
        catalog: Directory,
        retrieval: Retrieval,
        fanout: FanOut,
        answers: Answers,
        limits: Limits,
    ) -> None:
        self._catalog = catalog
        self._retrieval = retrieval
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
        model = None
        if not isinstance(queries, np.ndarray):
            model = self._retrieval.model_for(served, request, queries[0])
        at_least = await self._retrieval.wait_for_token(served, request.read_after.positions, deadline)
        timings = pb.Timings()
        if request.cache == pb.BYPASS:
            found = await self._search(served, request, model, queries, k, deadline, timings)
            response = _packed([(_ids(hits), hits.scores) for hits in found.hits], k)
            response.row_served_from.extend([pb.INDEX] * len(queries))
            asked, answered = found.asked, found.answered
        else:
            names = self._names(served, request, self._retrieval.variant(served, model), queries, k)
            staleness_ms = self._retrieval.staleness(served, request)
            cached = await self._answers.get_many(served, names, at_least, staleness_ms)
            timings.cache_ms = (time.perf_counter() - began) * 1e3
            bodies = [None if row is None else row.body for row in cached]
            missing = [i for i, body in enumerate(bodies) if body is None]
            asked = answered = len(served.shard_map.shards)
            tiers = [pb.INDEX if row is None else row.served_from for row in cached]
            if missing:
                # Rows that are alike are one.
                places: dict[bytes, list[int]] = {}
                for i in missing:
                    places.setdefault(names[i], []).append(i)
                rows = list(places.values())

                async def compute(wanted: Sequence[int]) -> Sequence[Computed]:
                    nonlocal asked, answered
                    whole = len(wanted) == len(queries)
                    rest = queries if whole else _picked(queries, [rows[place][0] for place in wanted])
                    found = await self._search(served, request, model, rest, k, deadline, timings)
                    if found.answered * asked <= answered * found.asked:
                        asked, answered = found.asked, found.answered
                    return [_computed(found, hits, timings) for hits in found.hits]

                # Another gateway's vector is searched for again in less time than it takes to ask for it.
                made = await self._answers.once_many(
                    served, list(places), compute, at_least, deadline, lease=model is not None
                )
                for same, row in zip(rows, made, strict=True):
                    for i in same:
                        bodies[i] = row.body
                        tiers[i] = row.served_from if isinstance(row, Cached) else pb.INDEX
            response = _packed([_ROW.decode(body) for body in bodies if body is not None], k)
            response.row_served_from.extend(tiers)
            if pb.INDEX not in tiers:
                response.served_from = pb.REDIS if pb.REDIS in tiers else pb.L1
        self._retrieval.provenance(served, response, model)
        response.coverage.shards_asked, response.coverage.shards_answered = asked, answered
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

    def _names(
        self, served: Served, request: pb.BatchSearchRequest, variant: str, queries: Queries, k: int
    ) -> list[bytes]:
        effort = wire.effort_from(request)
        options = msgspec.msgpack.encode(
            (
                "batch", k, request.exact, effort.share, effort.recall,
                request.filter.SerializeToString(), variant,
            )
        )  # fmt: skip
        told = [
            b"t" + query.encode() if isinstance(query, str) else b"v" + query.tobytes() for query in queries
        ]
        return self._answers.keys(served, "", told, options)

    async def _search(
        self,
        served: Served,
        request: pb.BatchSearchRequest,
        model: ModelManifest | None,
        queries: Queries,
        k: int,
        deadline: Deadline,
        timings: pb.Timings,
    ) -> Found[RenderedHits]:
        filter = self._retrieval.conditions.checked(request.filter, served.collection)
        if not isinstance(queries, np.ndarray):
            assert model is not None, "texts have a model"
            began = time.perf_counter()
            made = await self._retrieval.text_vectors(
                served, model, queries, deadline, use_cache=request.cache != pb.BYPASS
            )
            queries = made.vectors
            timings.embed_ms = (time.perf_counter() - began) * 1e3
        found = await self._fanout.search_rendered(
            served, queries, k,
            filter=filter,
            exact=request.exact,
            effort=wire.effort_from(request),
            include=IDS_ONLY,
            min_coverage=request.min_coverage,
            deadline=deadline,
        )  # fmt: skip
        timings.search_ms, timings.merge_ms = found.search_ms, found.merge_ms
        return found


def _picked(queries: Queries, rows: Sequence[int]) -> Queries:
    return queries[rows] if isinstance(queries, np.ndarray) else [queries[i] for i in rows]


def _ids(hits: RenderedHits) -> list[str]:
    return [row.id for row in hits.rows]


def _computed(found: Found[RenderedHits], hits: RenderedHits, timings: pb.Timings) -> Computed:
    """One row's answer, to be kept."""
    body = msgspec.msgpack.encode((_ids(hits), hits.scores))
    return Computed(body, found.positions, found.as_of_ms, found.complete, timings)


def _packed(rows: Sequence[tuple[list[str], bytes]], k: int) -> pb.BatchSearchResponse:
    """The ids and float32 scores of every row as one answer, padded to k."""
    ids: list[str] = []
    scores: list[bytes] = []
    counts = [len(row_ids) for row_ids, _ in rows]
    for (row_ids, raw), count in zip(rows, counts, strict=True):
        ids += row_ids
        scores.append(raw)
        if count < k:
            ids += [""] * (k - count)
            scores.append(_NO_SCORE * (k - count))
    return pb.BatchSearchResponse(
        ids=ids, scores=pb.Matrix(data=b"".join(scores), rows=len(rows), dim=k), counts=counts
    )
