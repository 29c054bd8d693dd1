"""Recommend: retrieve candidates near what is liked, then rank and diversify them.

The taste vector is the mean of the liked examples' directions less half the mean of the unliked ones'
(Rocchio, "Relevance feedback in information retrieval", 1971, with beta = 1 and gamma = 0.5). Where
distance is L2, it is the liked examples' centre, moved half as far again from the unliked ones'.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from services import wire
from services.config import Limits
from services.deadline import Deadline
from services.gateway.answers import Answers, Cached, Computed, Question
from services.gateway.directory import Directory
from services.gateway.fanout import FanOut, Found
from services.gateway.rankers import Chosen, Rankers
from services.gateway.retrieval import DEFAULT_K, Retrieval, check_cache, check_share
from services.gateway.served import Served
from services.ranker.ranker import Ranked, Ranker
from services.telemetry import stage
from shard_router.errors import InvalidField, NotImplementedHere, PreconditionFailed
from shard_router.model import Hit, Include, Metric

UNLIKE_WEIGHT = 0.5
_RANK = stage("rank")


class Recommend:
    """The two-stage path."""

    def __init__(
        self,
        catalog: Directory,
        retrieval: Retrieval,
        fanout: FanOut,
        ranker: Ranker,
        rankers: Rankers,
        answers: Answers,
        limits: Limits,
        *,
        default_candidates: int,
    ) -> None:
        self._catalog = catalog
        self._retrieval = retrieval
        self._fanout = fanout
        self._ranker = ranker
        self._rankers = rankers
        self._answers = answers
        self._limits = limits
        self._default_candidates = default_candidates

    async def recommend(self, request: pb.RecommendRequest, tenant: str, deadline: Deadline) -> bytes:
        """A serialized RecommendResponse."""
        began = time.perf_counter()
        served = self._catalog.resolve(tenant, request.collection)
        self._check(served, request)
        asked = self._asked(served, request)

        def asked_of(other: Served) -> _Asked:
            # Of this generation the same: an answer is computed by the versions that its name tells.
            return asked if other is served else self._asked(other, request)

        at_least = await self._retrieval.wait_for_token(served, request.read_after.positions, deadline)
        if request.cache == pb.BYPASS:
            made = await self._recommend(served, request, asked, deadline)
            return made.body + _suffix(pb.INDEX, began, made.timings)
        question = Question(
            lambda served: self._name(served, request, asked_of(served)),
            lambda served, deadline: self._recommend(served, request, asked_of(served), deadline),
            request.min_coverage,
        )
        name = question.name(served)
        staleness_ms = self._retrieval.staleness(served, request)
        found: Cached | Computed | None
        found = await self._answers.get(served, name, question, at_least, staleness_ms)
        if found is None:
            found = await self._answers.once(served, name, question, at_least, deadline)
        if isinstance(found, Cached):
            return found.body + _suffix(found.served_from, began)
        return found.body + _suffix(pb.INDEX, began, found.timings)

    def _name(self, served: Served, request: pb.RecommendRequest, asked: "_Asked") -> bytes:
        options = b"recommend" + self._retrieval.variant(served, asked.model).encode()
        return self._answers.key(served, asked.ranker.version, _query_bytes(request), options)

    def _check(self, served: Served, request: pb.RecommendRequest) -> None:
        for name in ("user_features", "context_features"):
            if getattr(request, name):
                raise NotImplementedHere(f"ranking by {name}", name)
        if not request.like:
            raise InvalidField("like", "is empty: give at least one example")
        if len(request.like) + len(request.unlike) > self._limits.max_batch_rows:
            raise InvalidField("like", f"more than {self._limits.max_batch_rows} examples")
        for name, examples in (("like", request.like), ("unlike", request.unlike)):
            for i, example in enumerate(examples):
                if example.WhichOneof("kind") is None:
                    raise InvalidField(f"{name}[{i}]", "is empty: give an id, a vector or a text")
        wire.keys(request.exclude, "exclude", self._limits.max_id_bytes)
        self._retrieval.check_k(request.k if request.HasField("k") else DEFAULT_K, "k")
        if request.retrieve.HasField("k"):
            self._retrieval.check_k(request.retrieve.k, "retrieve.k")
        wire.effort_from(request.retrieve, "retrieve.")
        check_share(request.min_coverage, "min_coverage")
        check_cache(request.cache)
        self._ranker.check(served.collection.schema, dict(request.rank.features), **_diversity(request))

    def _asked(self, served: Served, request: pb.RecommendRequest) -> "_Asked":
        """The versions that answer a request, for as long as it takes."""
        collection = served.collection
        # Both canaries go by one key, but each has its own share of the keys.
        key = request.traffic_key.encode() or request.like[0].SerializeToString()
        ranker = self._rankers.resolve(request.rank.ranker, collection.tenant, key)
        try:
            self._ranker.check(collection.schema, ranker.weights)
        except InvalidField as error:
            name = collection.name
            raise PreconditionFailed(f"ranker {ranker.model} does not fit {name!r}: {error}") from None
        texts = (e.text for e in (*request.like, *request.unlike) if e.WhichOneof("kind") == "text")
        text = next(texts, None)
        model = None if text is None else self._retrieval.model_for(served, request, text)
        return _Asked(ranker, {**ranker.weights, **request.rank.features}, model)

    async def _recommend(
        self, served: Served, request: pb.RecommendRequest, asked: "_Asked", deadline: Deadline
    ) -> Computed:
        k = request.k if request.HasField("k") else DEFAULT_K
        timings = pb.Timings()
        began = time.perf_counter()
        use_cache = request.cache != pb.BYPASS
        like, unlike = await asyncio.gather(
            self._examples(served, asked, request.like, "like", deadline, use_cache=use_cache),
            self._examples(served, asked, request.unlike, "unlike", deadline, use_cache=use_cache),
        )
        taste = _taste(like, unlike, served.collection.metric)
        timings.embed_ms = (time.perf_counter() - began) * 1e3
        found = await self._candidates(served, request, k, taste, deadline)
        timings.search_ms, timings.merge_ms = found.search_ms, found.merge_ms
        candidates = found.hits[0]
        ranking = time.perf_counter()
        ranked: Ranked = await asyncio.to_thread(
            self._ranker.rank, candidates, asked.weights, k=k, **_diversity(request)
        )
        rank_s = time.perf_counter() - ranking
        _RANK.took(rank_s)
        timings.rank_ms = rank_s * 1e3
        include = wire.include_from(request.include, request.HasField("include"))
        hits = []
        for place, index in enumerate(ranked.order):
            hit = wire.hit_on_wire(candidates[index], served.collection.schema, ranked.features[place])
            hit.score = ranked.scores[place]
            _keep_parts(hit, include)
            hits.append(hit)
        response = self._retrieval.provenance(
            served,
            pb.RecommendResponse(
                hits=hits,
                ranker=asked.ranker.model,
                coverage=pb.Coverage(shards_asked=found.asked, shards_answered=found.answered),
                stages=[
                    pb.Stage(
                        name="retrieve",
                        took_ms=timings.embed_ms + timings.search_ms + timings.merge_ms,
                        candidates=len(candidates),
                    ),
                    pb.Stage(name="rank", took_ms=ranked.score_ms, candidates=len(candidates)),
                    _diversify_stage(request, ranked),
                ],
            ),
            asked.model,
        )
        return Computed(
            response.SerializeToString(), found.positions, found.as_of_ms, found.complete, timings
        )

    async def _candidates(
        self, served: Served, request: pb.RecommendRequest, k: int, taste: np.ndarray, deadline: Deadline
    ) -> Found[list[Hit]]:
        retrieve = request.retrieve
        wanted = retrieve.k if retrieve.HasField("k") else self._default_candidates
        filter = self._retrieval.conditions.checked(retrieve.filter, served.collection, "retrieve.filter")
        seen = [e.id for e in (*request.like, *request.unlike) if e.WhichOneof("kind") == "id"]
        return await self._fanout.search(
            served,
            taste[None, :].astype(np.float32),
            min(max(wanted, k), self._limits.max_k),
            filter=filter,
            exact=False,
            effort=wire.effort_from(retrieve, "retrieve."),
            include=Include(
                attributes=True,
                text=not request.HasField("include") or request.include.text,
                vector=request.diversity.HasField("mmr_lambda") or request.include.vector,
            ),
            min_coverage=request.min_coverage,
            deadline=deadline,
            exclude=frozenset((*seen, *request.exclude)),
        )

    async def _examples(
        self,
        served: Served,
        asked: "_Asked",
        examples: Sequence[pb.Example],
        field: str,
        deadline: Deadline,
        *,
        use_cache: bool,
    ) -> np.ndarray:
        """Vectors of the examples, float32 [n, dim], ids first, then vectors, then texts."""
        dim = served.collection.dim
        parts: list[np.ndarray] = [np.empty((0, dim), np.float32)]
        by_kind: dict[str, list[tuple[str, pb.Example]]] = {"id": [], "vector": [], "text": []}
        for i, example in enumerate(examples):
            by_kind[str(example.WhichOneof("kind"))].append((f"{field}[{i}]", example))
        if by_kind["id"]:
            ids = [example.id for _, example in by_kind["id"]]
            fields = [f"{where}.id" for where, _ in by_kind["id"]]
            parts.append(await self._retrieval.document_vectors(served, ids, fields, deadline))
        for where, example in by_kind["vector"]:
            vector = wire.array_from(example.vector, f"{where}.vector", dim=dim)
            if len(vector) != 1:
                raise InvalidField(f"{where}.vector.rows", f"{len(vector)} rows where one is meant")
            parts.append(vector)
        if by_kind["text"]:
            assert asked.model is not None, "texts have a model"
            for where, example in by_kind["text"]:
                self._retrieval.check_text(example.text, f"{where}.text")
            texts = [example.text for _, example in by_kind["text"]]
            made = await self._retrieval.text_vectors(
                served, asked.model, texts, deadline, use_cache=use_cache
            )
            parts.append(made.vectors)
        return np.concatenate(parts)


def _taste(like: np.ndarray, unlike: np.ndarray, metric: Metric) -> np.ndarray:
    """What to search for, float64 [dim]."""
    if metric is Metric.L2:
        # A point among points: weights that add up to one keep it in their midst.
        centre: np.ndarray = like.mean(axis=0, dtype=np.float64)
        return centre + UNLIKE_WEIGHT * (centre - unlike.mean(axis=0)) if len(unlike) else centre
    return _direction(like) - UNLIKE_WEIGHT * _direction(unlike) if len(unlike) else _direction(like)


def _direction(vectors: np.ndarray) -> np.ndarray:
    """The mean of the rows' directions, float64 [dim]; a zero row has none."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    mean: np.ndarray = (wide / np.where(norms > 0, norms, 1.0)).mean(axis=0)
    return mean


def _keep_parts(hit: pb.Hit, include: Include) -> None:
    if not include.attributes:
        hit.ClearField("attributes")
    if not include.text:
        hit.ClearField("text")
    if not include.vector:
        hit.ClearField("vector")


class _Asked(NamedTuple):
    """What answers one request."""

    ranker: Chosen
    #: The ranker's, and what the request weighs itself before it.
    weights: Mapping[str, float]
    #: What embeds its texts; None where it has none.
    model: ModelManifest | None


class _Diversity(TypedDict):
    mmr_lambda: float | None
    group_by: str | None
    per_group: int


def _diversity(request: pb.RecommendRequest) -> _Diversity:
    """What the ranker is asked to do about sameness; one of a group where the request gives no number."""
    asked = request.diversity
    return {
        "mmr_lambda": asked.mmr_lambda if asked.HasField("mmr_lambda") else None,
        "group_by": asked.group_by or None,
        "per_group": asked.per_group or 1,
    }


def _diversify_stage(request: pb.RecommendRequest, ranked: Ranked) -> pb.Stage:
    if request.diversity.HasField("mmr_lambda") or request.diversity.group_by:
        return pb.Stage(name="diversify", took_ms=ranked.diversify_ms, candidates=len(ranked.order))
    return pb.Stage(name="diversify", skipped="neither mmr_lambda nor group_by was asked for")


def _query_bytes(request: pb.RecommendRequest) -> bytes:
    """What the answer depends on: the request without where, for whom and how to cache it."""
    asked = pb.RecommendRequest()
    asked.CopyFrom(request)
    for field in ("collection", "read_after", "min_coverage", "max_staleness_ms", "cache", "traffic_key"):
        asked.ClearField(field)
    # Map fields have no order of their own; deterministic serialization sorts them.
    return asked.SerializeToString(deterministic=True)


def _suffix(served_from: "pb.ServedFrom.ValueType", began: float, timings: pb.Timings | None = None) -> bytes:
    tail = pb.RecommendResponse(served_from=served_from, timings=timings)
    tail.timings.total_ms = (time.perf_counter() - began) * 1e3
    return tail.SerializeToString()
