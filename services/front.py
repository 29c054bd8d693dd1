"""A gateway put together: what calls meet, from the two ports down to the parts it is given."""

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from services.cache.tier import CacheTier
from services.config import Config
from services.data_dir import StartupError
from services.deadline import Deadline
from services.gateway.admission import Admission
from services.gateway.answers import Answers, Known, known_here
from services.gateway.batch import BatchRetrieval
from services.gateway.cluster_service import CacheReads, ClusterReads
from services.gateway.directory import Directory
from services.gateway.documents import Documents
from services.gateway.embeddings import Embeddings
from services.gateway.endpoints import EmbedderEndpoint, ImageEmbedderEndpoint
from services.gateway.fanout import FanOut
from services.gateway.http import Http
from services.gateway.ingest import Ingest, Visible
from services.gateway.models import Models
from services.gateway.rankers import Rankers
from services.gateway.recall_audit import RecallAudit
from services.gateway.recommend import Recommend
from services.gateway.retrieval import Retrieval
from services.gateway.served import Served
from services.gateway.server import Server, Servicers, method_of
from services.gateway.servicers import Call, CollectionReads, DocumentService, EmbeddingService, SearchService
from services.gateway.transport import transport_of
from services.gateway.warming import Warming
from services.metadata.store import Store
from services.ranker.ranker import Ranker
from services.telemetry import Telemetry
from services.tracing import Tracing, TracingUnavailable
from shard_router.errors import RingfortError

log = logging.getLogger(__name__)

#: Answers of a coming generation that are computed in advance, in all and a second.
WARMED, WARM_RATE = 256, 500

#: What the service is made of, each part with its state and a detail.
Components = Callable[[], Awaitable[Mapping[str, tuple[str, str]]]]
#: Makes an embedder of a model.
LoadModel = Callable[[ModelManifest], Awaitable[EmbedderEndpoint | ImageEmbedderEndpoint]]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the service listens, HOST:PORT each."""

    grpc: str
    http: str
    #: Where this gateway alone answers HTTP, beside others at the same ports.
    own: str = ""


@dataclass(frozen=True, slots=True)
class Others:
    """What a gateway is told of the others; the values are those of one alone."""

    known: Known = known_here
    visible: Visible = Served.wait_for
    #: Makes of what answers for this gateway's cache what answers for all.
    caches: Callable[[CacheReads], object] = lambda own: own
    #: Whether they listen at the same ports.
    share_ports: bool = False


class Front:
    """A gateway over its parts. `start` once; what it started ends with the stack that it was given."""

    def __init__(
        self,
        config: Config,
        stack: AsyncExitStack,
        *,
        store: Store,
        catalog: Directory,
        cache: CacheTier,
        default: Embeddings,
        models: Models,
        rankers: Rankers,
        others: Others,
        release: str,
        composition: str,
        components: Components,
    ) -> None:
        self._config, self._stack = config, stack
        self._store, self._catalog, self._cache = store, catalog, cache
        self._default, self._models, self._rankers = default, models, rankers
        self._others = others
        self._release, self._composition, self._components = release, composition, components
        self.telemetry = Telemetry(counting=config.telemetry.metrics)
        self.server: Server
        #: What answers for each service.
        self.servicers: Servicers = {}
        #: What answers for this gateway alone.
        self.alone: Servicers = {}

    async def start(
        self, changes: Servicers, http_socket: socket.socket, *further: socket.socket
    ) -> Addresses:
        """Serve. `changes` answer what the services that every gateway has do not.

        `further` are other sockets that HTTP is served on.
        """
        config, gateway = self._config, self._config.gateway
        catalog, models, cache = self._catalog, self._models, self._cache
        tracing = self._tracing()
        ingest = Ingest(catalog, models, gateway.limits, self._others.visible)
        self._stack.push_async_callback(ingest.close)
        answers = Answers(cache, ttl_s=config.cache.answer_ttl_s, known=self._others.known)
        self._stack.push_async_callback(answers.close)
        ranker = Ranker()
        fanout = FanOut(random.Random())
        audit = RecallAudit(fanout, every_s=config.telemetry.recall_audit_s)
        self._stack.push_async_callback(audit.close)
        retrieval = Retrieval(catalog, models, fanout, answers, gateway.limits, audit)
        batch = BatchRetrieval(catalog, retrieval, fanout, answers, gateway.limits)
        recommend = Recommend(
            catalog, retrieval, fanout, ranker, self._rankers, answers, gateway.limits,
            default_candidates=config.ranker.default_candidates,
        )  # fmt: skip
        embedding_service = EmbeddingService(models, config)
        search_service = SearchService(retrieval, batch, recommend)
        admission = Admission(max_in_flight=gateway.max_in_flight, rate_per_key=gateway.rate_per_key)
        cluster = ClusterReads(
            catalog, cache, config,
            release=self._release, composition=self._composition, components=self._components,
        )  # fmt: skip
        caches = CacheReads(catalog, cache, answers, Warming(answers))
        self.alone = {"ClusterService": (caches,)}
        everywhere: Servicers = {
            "EmbeddingService": (embedding_service,),
            "DocumentService": (DocumentService(ingest, Documents(catalog, gateway.limits)),),
            "SearchService": (search_service,),
            "CollectionService": (CollectionReads(catalog, models),),
            "ClusterService": (self._others.caches(caches), cluster),
        }
        self.servicers = {
            name: (*everywhere.get(name, ()), *changes.get(name, ())) for name in {*everywhere, *changes}
        }
        self.server = Server(
            gateway,
            self.servicers,
            self.telemetry,
            admission,
            transport_of(gateway),
            tracing,
            shares_port=self._others.share_ports,
        )
        for part, stats in (
            ("gateway", admission.stats), ("answers", answers.stats), ("cache", cache.stats),
            ("embedder", self._default.embedder.stats), ("metadata", self._store.stats),
            ("models", models.stats), ("ranker", ranker.stats), ("recall", audit.stats),
        ):  # fmt: skip
            self.telemetry.parts.add(part, stats)
        self.telemetry.parts.add_each("model", models.stats_of_each)
        self.telemetry.parts.add_each("ranker", self._rankers.stats_of_each)
        self.telemetry.parts.add_each("hot_key", self._cache.stats_of_hottest, label="rank")
        self.telemetry.parts.add_each("partition", self._store.stats_of_each)
        http = Http(
            gateway, embedding_service, search_service, self.telemetry, admission, self._missing, tracing
        )
        serving = asyncio.create_task(http.serve(http_socket, *further))
        self._stack.push_async_callback(_finish_http, http, serving)
        grpc_address = await self.server.start()
        self._stack.push_async_callback(self.server.stop, gateway.drain_s)
        addresses = Addresses(grpc_address, *map(_address_of, (http_socket, *further)))
        log.info("serving gRPC on %s and HTTP on %s", addresses.grpc, addresses.http)
        return addresses

    async def warm(self, served: Served, deadline: Deadline) -> None:
        """Compute what is asked for most, at any gateway, of a generation that is about to be live."""
        collection = served.collection
        request = pb.WarmCacheRequest(
            collection=collection.name, limit=WARMED, rate=WARM_RATE, generation=collection.generation
        )
        warm = method_of(self.servicers, "ClusterService", "WarmCache")
        assert warm is not None, "every gateway has it"
        await warm(request, Call(collection.tenant, deadline))

    async def _missing(self) -> str:
        try:
            await self._store.ping()
        except RingfortError as error:
            return str(error)
        return ""

    def _tracing(self) -> Tracing | None:
        settings = self._config.telemetry
        if settings.otlp is None:
            return None
        try:
            tracing = Tracing.otlp(settings.otlp, share=settings.trace_share, release=self._release)
        except TracingUnavailable as error:
            raise StartupError(str(error)) from None
        self._stack.push_async_callback(tracing.close)
        return tracing


async def open_cache(config: Config, redis_url: str | None, stack: AsyncExitStack) -> CacheTier:
    """Both tiers; StartupError where the second has no address that can be one."""
    settings = config.cache
    try:
        cache = CacheTier(
            l1_bytes=settings.l1_bytes, redis_url=redis_url, op_timeout_ms=settings.op_timeout_ms
        )
    except ValueError as error:
        raise StartupError(f"cache.redis_url: {error}") from None
    await cache.open()
    stack.push_async_callback(cache.close)
    return cache


def cached(config: Config, cache: CacheTier, embedder: EmbedderEndpoint) -> Embeddings:
    """A model behind the embedding cache."""
    return Embeddings(
        embedder,
        cache,
        ttl_s=config.cache.embedding_ttl_s,
        max_text_bytes=config.gateway.limits.max_text_bytes,
    )


def models_of(
    config: Config, default: Embeddings, cache: CacheTier, directory: Path, load: LoadModel
) -> Models:
    """Every model by name, beside the default one."""
    return Models(
        default,
        directory,
        load=load,
        cached=partial(cached, config, cache),
        max_bytes=config.embedder.models_bytes,
    )


def _address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"{host}:{port}"


async def _finish_http(http: Http, serving: "asyncio.Task[None]") -> None:
    http.stop()
    await asyncio.wait([serving], timeout=5)
