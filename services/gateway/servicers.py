"""The rpc methods: one class a service, each method a few lines over the rooms behind it.

A method takes (request, Call) and returns a message or its bytes; `server.py` does what is common to all
of them. What the contract names and no method here answers is UNIMPLEMENTED.
"""

import re
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass

import numpy as np

from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from services import wire
from services.config import Config
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.gateway.batch import BatchRetrieval
from services.gateway.catalog import Catalog
from services.gateway.directory import Directory
from services.gateway.documents import Documents
from services.gateway.ingest import Ingest
from services.gateway.jobs import Job, Jobs, Kind
from services.gateway.models import Models, require_dimension, space_at
from services.gateway.recommend import Recommend
from services.gateway.reindexer import Reindexer
from services.gateway.retrieval import Retrieval
from services.gateway.served import Served
from services.gateway.streams import in_order
from services.metadata.jobs import JobState
from shard_router.errors import InvalidField, NotFound, NotImplementedHere, PreconditionFailed

NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,127}")
ATTRIBUTE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
INPUT_TYPES = {pb.QUERY: InputType.QUERY, pb.DOCUMENT: InputType.DOCUMENT}
#: Requests of one EmbedStream under way at once; reading pauses beyond it.
EMBED_STREAM_REQUESTS = 4
MAX_DIM = 4_096
INDEX_KINDS = ("auto", "flat", "hnsw", "ivf")
JOB_STATES = {
    JobState.RUNNING: pb.Job.RUNNING,
    JobState.SUCCEEDED: pb.Job.SUCCEEDED,
    JobState.FAILED: pb.Job.FAILED,
    JobState.CANCELLED: pb.Job.CANCELLED,
}
#: Jobs that are about a generation.
OF_GENERATIONS = (Kind.REINDEX, Kind.ACTIVATE)
MAX_SHARDS = 64
MAX_REPLICAS = 64


@dataclass(frozen=True, slots=True)
class Call:
    """Whose call it is and how long it may take."""

    tenant: str
    deadline: Deadline


class EmbeddingService:
    """Texts to vectors."""

    def __init__(self, models: Models, config: Config) -> None:
        self._models = models
        self._limits = config.gateway.limits

    async def Embed(self, request: pb.EmbedRequest, call: Call) -> pb.EmbedResponse:
        began = time.perf_counter()
        manifest = self._version(request, call.tenant)
        if request.images:
            return await self._embed_images(request, manifest, call, began)
        wire.check_rows(request.texts, "texts", self._limits.max_batch_rows)
        dim = require_dimension(manifest, request.dimensions, "dimensions")
        if request.dtype not in (pb.F32, pb.F16, pb.I8):
            raise InvalidField("dtype", f"{request.dtype} is not a dtype")
        if request.input_type not in INPUT_TYPES:
            raise InvalidField("input_type", f"{request.input_type} is not an input type")
        texts = self._models.check_texts(request.texts, "texts", truncate=request.truncate)
        made = await self._models.embed(
            manifest, texts, INPUT_TYPES[request.input_type], call.deadline, dim=dim, lease=True
        )
        truncated = made.truncated
        if request.truncate:
            truncated = truncated | [
                len(t) < len(whole) for t, whole in zip(texts, request.texts, strict=True)
            ]
        rows = zip(made.tokens.tolist(), truncated.tolist(), made.cached.tolist(), strict=True)
        return pb.EmbedResponse(
            vectors=wire.matrix_from(made.vectors, request.dtype),
            rows=[pb.EmbedRow(tokens=t, truncated=cut, cached=cached) for t, cut, cached in rows],
            model=manifest.model,
            space=space_at(manifest, dim),
            variant=manifest.variant,
            timings=pb.Timings(
                total_ms=(time.perf_counter() - began) * 1e3,
                queue_ms=made.queue_ms,
                tokenize_ms=made.tokenize_ms,
                inference_ms=made.inference_ms,
                cache_ms=made.cache_ms,
            ),
        )

    def _version(self, request: pb.EmbedRequest, tenant: str) -> ModelManifest:
        """The version of a model that a request meets; PreconditionFailed where its callers' would differ."""
        named = self._models.resolve(request.model)
        if "@" in request.model:
            return named
        key = request.traffic_key.encode() or _first(request)
        manifest = self._models.routed(named, tenant, key, dim=request.dimensions)
        if request.together and not request.traffic_key:
            for text in request.texts[1:]:
                other = self._models.routed(named, tenant, text.encode(), dim=request.dimensions)
                if other is not manifest:
                    raise PreconditionFailed(
                        f"together: apart these texts meet different versions of model {named.name!r}"
                    )
        return manifest

    async def _embed_images(
        self, request: pb.EmbedRequest, manifest: ModelManifest, call: Call, began: float
    ) -> pb.EmbedResponse:
        if request.texts:
            raise InvalidField("images", "give texts or images, one of the two")
        if request.dtype not in (pb.F32, pb.F16, pb.I8):
            raise InvalidField("dtype", f"{request.dtype} is not a dtype")
        require_dimension(manifest, request.dimensions, "dimensions")
        wire.check_rows(request.images, "images", self._limits.max_batch_rows)
        made = await self._models.embed_images(manifest, request.images, call.deadline)
        return pb.EmbedResponse(
            vectors=wire.matrix_from(made.vectors, request.dtype),
            rows=[pb.EmbedRow()] * len(request.images),
            model=manifest.model,
            space=manifest.space,
            variant=manifest.variant,
            timings=pb.Timings(
                total_ms=(time.perf_counter() - began) * 1e3,
                queue_ms=made.queue_ms,
                tokenize_ms=made.decode_ms,
                inference_ms=made.inference_ms,
            ),
        )

    async def EmbedStream(
        self, requests: AsyncIterator[pb.EmbedRequest], call: Call
    ) -> AsyncIterator[pb.EmbedResponse]:
        async for response in in_order(requests, lambda r: self.Embed(r, call), EMBED_STREAM_REQUESTS):
            yield response

    async def Rerank(self, request: pb.RerankRequest, call: Call) -> pb.RerankResponse:
        """Cosine of query and text; the one ranker of texts there is."""
        began = time.perf_counter()
        if request.ranker not in ("", "similarity"):
            raise NotFound("ranker", request.ranker)
        if not request.query:
            raise InvalidField("query", "is empty")
        wire.check_rows(request.texts, "texts", self._limits.max_batch_rows)
        query = self._models.check_text(request.query, "query", truncate=False)
        texts = self._models.check_texts(request.texts, "texts", truncate=False)
        default = self._models.default
        asked = await self._models.embed(default, [query], InputType.QUERY, call.deadline)
        made = await self._models.embed(default, texts, InputType.DOCUMENT, call.deadline)
        scores = made.vectors @ asked.vectors[0]
        order = np.argsort(-scores, kind="stable")[: request.top_n or None]
        return pb.RerankResponse(
            hits=[pb.RerankHit(index=int(i), score=float(scores[i])) for i in order],
            ranker="similarity",
            timings=pb.Timings(total_ms=(time.perf_counter() - began) * 1e3),
        )


def _first(request: pb.EmbedRequest) -> bytes:
    """The first text or picture of a request; nothing for an empty one."""
    if request.texts:
        return request.texts[0].encode()
    return request.images[0] if request.images else b""


class DocumentService:
    """Documents in and out."""

    def __init__(self, ingest: Ingest, documents: Documents) -> None:
        self._ingest = ingest
        self._documents = documents

    async def Upsert(self, request: pb.UpsertRequest, call: Call) -> pb.UpsertResponse:
        return await self._ingest.upsert(request, call.tenant, call.deadline)

    def UpsertStream(
        self, requests: AsyncIterator[pb.UpsertRequest], call: Call
    ) -> AsyncIterator[pb.UpsertResponse]:
        return self._ingest.upsert_stream(requests, call.tenant, call.deadline)

    async def Patch(self, request: pb.PatchRequest, call: Call) -> pb.PatchResponse:
        return await self._ingest.patch(request, call.tenant, call.deadline)

    async def Delete(self, request: pb.DeleteRequest, call: Call) -> pb.DeleteResponse:
        return await self._ingest.delete(request, call.tenant, call.deadline)

    async def Get(self, request: pb.GetRequest, call: Call) -> pb.GetResponse:
        return await self._documents.get(request, call.tenant, call.deadline)

    async def Scan(self, request: pb.ScanRequest, call: Call) -> pb.ScanResponse:
        return await self._documents.scan(request, call.tenant, call.deadline)

    async def Count(self, request: pb.CountRequest, call: Call) -> pb.CountResponse:
        return await self._documents.count(request, call.tenant, call.deadline)


class SearchService:
    """Nearest and recommended documents."""

    def __init__(self, retrieval: Retrieval, batch: BatchRetrieval, recommend: Recommend) -> None:
        self._retrieval = retrieval
        self._batch = batch
        self._recommend = recommend

    def Search(self, request: pb.SearchRequest, call: Call) -> Awaitable[bytes]:
        return self._retrieval.search(request, call.tenant, call.deadline)

    def BatchSearch(self, request: pb.BatchSearchRequest, call: Call) -> Awaitable[pb.BatchSearchResponse]:
        return self._batch.search(request, call.tenant, call.deadline)

    def Recommend(self, request: pb.RecommendRequest, call: Call) -> Awaitable[bytes]:
        return self._recommend.recommend(request, call.tenant, call.deadline)


class CollectionReads:
    """Collections and their aliases, as they are."""

    def __init__(self, catalog: Directory, models: Models) -> None:
        self._catalog = catalog
        self._models = models

    async def Get(self, request: pb.GetCollectionRequest, call: Call) -> pb.Collection:
        return collection_message(self._catalog.resolve(call.tenant, request.name, "name"), self._models)

    async def List(self, request: pb.ListCollectionsRequest, call: Call) -> pb.ListCollectionsResponse:
        return pb.ListCollectionsResponse(
            collections=[
                collection_message(served, self._models) for served in self._catalog.of_tenant(call.tenant)
            ]
        )


class CollectionChanges:
    """Collections that come and go, and their aliases."""

    def __init__(self, catalog: Catalog, models: Models, config: Config) -> None:
        self._catalog = catalog
        self._models = models
        self._defaults = config.index

    async def Create(self, request: pb.CreateCollectionRequest, call: Call) -> pb.Collection:
        if not NAME.fullmatch(request.name):
            raise InvalidField("name", "is not 1 to 128 of a-z, 0-9, _ and -, beginning without a hyphen")
        for name in request.attributes:
            if not ATTRIBUTE_NAME.fullmatch(name):
                raise InvalidField(f"attributes.{name}", "is not a letter followed by letters, digits and _")
        for name, kind in request.attributes.items():
            if kind not in wire.ATTRIBUTE_TYPES:
                raise InvalidField(f"attributes.{name}", f"{kind} is not an attribute type")
        if request.metric not in wire.METRICS:
            raise InvalidField("metric", f"{request.metric} is not a metric")
        if request.index.kind not in ("", *INDEX_KINDS):
            raise InvalidField("index.kind", f"{request.index.kind!r} is none of {', '.join(INDEX_KINDS)}")
        model: str | None = None
        dim, space = request.dim, f"vectors:{request.dim}"
        if request.model or not request.dim:
            manifest = self._models.resolve(request.model)
            if manifest.image is not None:
                raise InvalidField("model", f"{manifest.model} reads images, and documents are texts")
            dim = require_dimension(manifest, request.dim, "dim")
            model, space = manifest.model, space_at(manifest, dim)
        if not 2 <= dim <= MAX_DIM:
            raise InvalidField("dim", f"{dim} is not between 2 and {MAX_DIM}")
        slots = request.slots or self._defaults.slots
        shards = request.shards or self._defaults.shards
        if not 1 <= slots <= 65_536:
            raise InvalidField("slots", f"{slots} is not between 1 and 65536")
        if shards > min(slots, MAX_SHARDS):
            raise InvalidField("shards", f"{shards} is more than {min(slots, MAX_SHARDS)}")
        replicas = request.replicas or self._defaults.replicas
        if replicas > MAX_REPLICAS:
            raise InvalidField("replicas", f"{replicas} is more than {MAX_REPLICAS}")
        served = await self._catalog.create(
            tenant=call.tenant,
            name=request.name,
            dim=dim,
            metric=wire.METRICS[request.metric],
            schema={name: wire.ATTRIBUTE_TYPES[kind] for name, kind in request.attributes.items()},
            model=model,
            slots=slots,
            shards=shards,
            replicas=replicas,
            index=request.index.kind or "auto",
            max_staleness_ms=request.max_staleness_ms,
            space=space,
        )
        return collection_message(served, self._models)

    async def Delete(self, request: pb.DeleteCollectionRequest, call: Call) -> pb.DeleteCollectionResponse:
        await self._catalog.delete(call.tenant, request.name)
        return pb.DeleteCollectionResponse()

    async def SetAlias(self, request: pb.SetAliasRequest, call: Call) -> pb.SetAliasResponse:
        if not NAME.fullmatch(request.alias):
            raise InvalidField("alias", "is not 1 to 128 of a-z, 0-9, _ and -, beginning without a hyphen")
        if request.collection and not NAME.fullmatch(request.collection):
            raise NotFound("collection", request.collection)
        await self._catalog.set_alias(call.tenant, request.alias, request.collection or None)
        return pb.SetAliasResponse()


def collection_message(served: Served, models: Models) -> pb.Collection:
    """A collection as it is told."""
    c = served.collection
    return pb.Collection(
        name=c.name,
        model=c.model or "",
        dim=c.dim,
        metric=wire.METRICS_ON_WIRE[c.metric],
        attributes=wire.schema_on_wire(c.schema),
        slots=c.slots,
        shards=c.shards,
        replicas=c.replicas,
        index=pb.IndexSpec(kind=c.index),
        max_staleness_ms=c.max_staleness_ms,
        generation=c.generation,
        space=c.space,
        variant=models.variant(c),
        epoch=served.state.epoch,
        aliases=c.aliases,
        created_at=wire.timestamp(c.created_at_us),
        databases=c.databases,
    )


class IndexService:
    """Long operations, as jobs to watch."""

    def __init__(self, catalog: Catalog, jobs: Jobs, reindexer: Reindexer) -> None:
        self._catalog = catalog
        self._jobs = jobs
        self._reindexer = reindexer

    async def Reindex(self, request: pb.ReindexRequest, call: Call) -> pb.Job:
        if request.source_collection:
            raise NotImplementedHere("IndexService.Reindex from another collection", "source_collection")
        if request.index.kind not in ("", *INDEX_KINDS):
            raise InvalidField("index.kind", f"{request.index.kind!r} is none of {', '.join(INDEX_KINDS)}")
        served = self._catalog.resolve(call.tenant, request.collection)
        return job_message(await self._reindexer.reindex(served, request.model, request.index.kind))

    async def Activate(self, request: pb.ActivateRequest, call: Call) -> pb.ActivateResponse:
        served = self._catalog.resolve(call.tenant, request.collection)
        return _live_message(await self._reindexer.activate(served, request.generation, call.deadline))

    async def Rollback(self, request: pb.RollbackRequest, call: Call) -> pb.ActivateResponse:
        served = self._catalog.resolve(call.tenant, request.collection)
        return _live_message(await self._reindexer.rollback(served, call.deadline))

    async def GetJob(self, request: pb.GetJobRequest, call: Call) -> pb.Job:
        return job_message(await self._jobs.job(self._catalog.of_tenant(call.tenant), request.id))

    async def ListJobs(self, request: pb.ListJobsRequest, call: Call) -> pb.ListJobsResponse:
        of = self._catalog.of_tenant(call.tenant)
        if request.collection:
            of = [self._catalog.resolve(call.tenant, request.collection)]
        return pb.ListJobsResponse(jobs=[job_message(job) for job in await self._jobs.all(of)])

    async def WatchJob(self, request: pb.WatchJobRequest, call: Call) -> AsyncIterator[pb.Job]:
        async for job in self._jobs.watch(self._catalog.of_tenant(call.tenant), request.id):
            yield job_message(job)

    async def CancelJob(self, request: pb.CancelJobRequest, call: Call) -> pb.Job:
        of = self._catalog.of_tenant(call.tenant)
        return job_message(await self._jobs.cancel(of, request.id, call.deadline))


def _live_message(served: Served) -> pb.ActivateResponse:
    return pb.ActivateResponse(generation=served.collection.generation, space=served.collection.space)


def job_message(job: Job) -> pb.Job:
    """A job as it is told."""
    record = job.record
    message = pb.Job(
        id=record.id,
        kind=record.kind,
        collection=job.served.collection.name,
        state=JOB_STATES[record.state],
        generation=record.argument if record.kind in OF_GENERATIONS else job.served.collection.generation,
        done=job.done,
        total=job.total,
        message=job.message,
        started_at=wire.timestamp(record.started_at_us),
        figures=job.figures,
    )
    if record.ended_at_us is not None:
        message.ended_at.CopyFrom(wire.timestamp(record.ended_at_us))
    return message
