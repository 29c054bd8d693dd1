"""The embedded composition: every part in one process, with Postgres and Valkey as its children.

Here the parts get to know each other; nothing else reads the configuration.
"""

import asyncio
import functools
import ipaddress
import logging
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from index_builder.models.build import ensure_model
from index_builder.models.manifest import ModelManifest
from services.cache.tier import CacheTier
from services.config import Config, GatewaySettings
from services.data_dir import DataDir, StartupError
from services.embedder.cpus import usable_cpus
from services.embedder.loading import load
from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.batch import BatchRetrieval
from services.gateway.catalog import Catalog
from services.gateway.documents import Documents
from services.gateway.embeddings import Embeddings
from services.gateway.endpoints import EmbedderEndpoint, ImageEmbedderEndpoint, Shards
from services.gateway.fanout import FanOut
from services.gateway.http import Http, listen
from services.gateway.ingest import Ingest
from services.gateway.model_service import ModelService
from services.gateway.models import Models
from services.gateway.rankers import Rankers
from services.gateway.recall_audit import RecallAudit
from services.gateway.recommend import Recommend
from services.gateway.resharder import Resharder
from services.gateway.retrieval import Retrieval
from services.gateway.server import Server
from services.gateway.servicers import (
    ClusterService,
    CollectionService,
    DocumentService,
    EmbeddingService,
    IndexService,
    SearchService,
)
from services.gateway.transport import transport_of
from services.gateway.warming import Warming
from services.metadata.store import Store
from services.ranker.ranker import Ranker
from services.shard.local_shards import LocalShards
from services.supervisor import Supervisor
from services.telemetry import Telemetry, log_to
from services.tracing import Tracing, TracingUnavailable
from shard_router import filters
from shard_router.errors import RingfortError
from shard_router.model import HOME

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the service listens, HOST:PORT each."""

    grpc: str
    http: str


class Embedded:
    """The whole service. `start` once, `stop` once; what was started is stopped in reverse order."""

    #: What people are told it is.
    composition = "embedded"

    def __init__(self, config: Config, path: Path, *, release: str, say: Callable[[str], None]) -> None:
        """`say` hears, in a few words, what a long start is doing."""
        self._config = config
        self._path = path
        self._release = release
        self._say = say
        self._stack = AsyncExitStack()
        #: Where Postgres is, once it is known.
        self._postgres_url = ""

    async def start(self) -> Addresses:
        """Bring everything up and serve; StartupError, in one sentence, where something is missing."""
        gateway = self._config.gateway
        transport = transport_of(gateway)
        for name, address in (("grpc", gateway.grpc), ("http", gateway.http)):
            require_private(name, address, gateway)
        # Taken early, so that a port in use is said before anything slow begins.
        http_socket = listen(gateway.http)
        self._stack.callback(http_socket.close)
        listen(gateway.grpc).close()

        data_dir = DataDir.open(self._path, release=self._release)
        self._stack.callback(data_dir.close)
        log_to(data_dir.logs)
        supervisor = Supervisor(data_dir)
        self._stack.push_async_callback(supervisor.stop)
        await supervisor.end_orphans()
        store, redis_url, manifest = await self._foundations(supervisor, data_dir)
        await self._spread(store, data_dir)
        telemetry = Telemetry(counting=self._config.telemetry.metrics)
        tracing = self._tracing()
        cache = await self._cache(redis_url)
        embeddings = await self._embeddings(manifest, cache)
        models = self._models(embeddings, cache, data_dir)
        self._stack.push_async_callback(models.close)
        rankers = Rankers()
        model_service = ModelService(models, rankers, store.models, data_dir.models)
        await model_service.open()
        catalog = await self._catalog(store, data_dir)
        resharder = Resharder(catalog)
        self._stack.push_async_callback(resharder.close)
        await resharder.open()
        ingest = Ingest(catalog, models, gateway.limits)
        self._stack.push_async_callback(ingest.close)

        answers = Answers(cache, ttl_s=self._config.cache.answer_ttl_s)
        self._stack.push_async_callback(answers.close)
        ranker = Ranker()
        fanout = FanOut(random.Random())
        audit = RecallAudit(fanout, every_s=self._config.telemetry.recall_audit_s)
        self._stack.push_async_callback(audit.close)
        retrieval = Retrieval(catalog, models, fanout, answers, gateway.limits, audit)
        batch = BatchRetrieval(catalog, retrieval, fanout, answers, gateway.limits)
        recommend = Recommend(
            catalog, retrieval, fanout, ranker, rankers, answers, gateway.limits,
            default_candidates=self._config.ranker.default_candidates,
        )  # fmt: skip
        embedding_service = EmbeddingService(models, self._config)
        search_service = SearchService(retrieval, batch, recommend)
        components = functools.partial(self._components, supervisor, store, cache)
        admission = Admission(max_in_flight=gateway.max_in_flight, rate_per_key=gateway.rate_per_key)
        server = Server(
            gateway,
            {
                "EmbeddingService": embedding_service,
                "DocumentService": DocumentService(ingest, Documents(catalog, gateway.limits)),
                "SearchService": search_service,
                "CollectionService": CollectionService(catalog, models, self._config),
                "ModelService": model_service,
                "IndexService": IndexService(catalog, resharder),
                "ClusterService": ClusterService(
                    catalog,
                    resharder,
                    cache,
                    answers,
                    Warming(answers),
                    self._config,
                    release=self._release,
                    composition=self.composition,
                    components=components,
                ),
            },
            telemetry,
            admission,
            transport,
            tracing,
        )
        for part, stats in (
            ("gateway", admission.stats), ("answers", answers.stats), ("cache", cache.stats),
            ("embedder", embeddings.embedder.stats), ("metadata", store.stats), ("shard", catalog.stats),
            ("models", models.stats), ("ranker", ranker.stats), ("supervisor", supervisor.stats),
            ("recall", audit.stats),
        ):  # fmt: skip
            telemetry.parts.add(part, stats)
        telemetry.parts.add_each("model", models.stats_of_each)
        telemetry.parts.add_each("ranker", rankers.stats_of_each)
        telemetry.parts.add_each("collection", catalog.stats_of_each)
        telemetry.parts.add_each("partition", store.stats_of_each)

        async def ready() -> str:
            try:
                await store.ping()
            except RingfortError as error:
                return str(error)
            return ""

        http = Http(gateway, embedding_service, search_service, telemetry, admission, ready, tracing)
        serving = asyncio.create_task(http.serve(http_socket))
        self._stack.push_async_callback(_finish_http, http, serving)
        grpc_address = await server.start()
        self._stack.push_async_callback(server.stop, gateway.drain_s)
        host, port = http_socket.getsockname()[:2]
        addresses = Addresses(grpc_address, f"{host}:{port}")
        log.info("serving gRPC on %s and HTTP on %s", addresses.grpc, addresses.http)
        return addresses

    async def stop(self) -> None:
        """Drain, then stop every part and every child; safe after a start that was cut short."""
        await self._stack.aclose()
        log.info("stopped")

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

    async def _spread(self, store: Store, data_dir: DataDir) -> None:
        """Bring up what runs beside this process: nothing here."""

    def _others(self) -> Mapping[str, tuple[str, str]]:
        """How that does, each with its state and a detail."""
        return {}

    async def _foundations(
        self, supervisor: Supervisor, data_dir: DataDir
    ) -> tuple[Store, str | None, ModelManifest]:
        """Postgres, Valkey and the model, side by side."""
        settings = self._config

        async def store() -> Store:
            self._postgres_url = settings.metadata.postgres_url or await supervisor.start_postgres()
            return await Store.open(
                self._postgres_url,
                partitions=settings.metadata.partitions,
                pool_size=settings.metadata.pool_size,
                statement_timeout_ms=settings.metadata.statement_timeout_ms,
                tombstone_ttl_s=settings.metadata.tombstone_ttl_s,
                say=self._say,
            )

        async def redis_url() -> str:
            if settings.cache.redis_url:
                return settings.cache.redis_url
            return await supervisor.start_valkey(maxmemory_bytes=settings.cache.redis_max_bytes)

        unwanted = threading.Event()

        def progress(stage: str, share: float) -> None:
            if unwanted.is_set():
                raise StartupError("stopped while building the model")
            self._say(f"embedding model: {stage} ({share:.0%})")

        async def manifest() -> ModelManifest:
            build = functools.partial(
                ensure_model,
                data_dir.models,
                source=settings.embedder.source,
                precision=settings.embedder.precision,
                progress=progress,
            )
            try:
                return await asyncio.to_thread(build)
            finally:
                # A thread cannot be cancelled, and a process that stops would wait for it.
                unwanted.set()

        # The grammar is built once; better now than within somebody's first filtered search.
        grammar = asyncio.create_task(asyncio.to_thread(filters.parse, "ready = true"))
        opening, starting = asyncio.create_task(store()), asyncio.create_task(redis_url())
        building = asyncio.create_task(manifest())
        tasks: tuple[asyncio.Task[Any], ...] = (opening, starting, building, grammar)
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                await opening.result().close()
            raise
        self._stack.push_async_callback(opening.result().close)
        return opening.result(), starting.result(), building.result()

    async def _cache(self, redis_url: str | None) -> CacheTier:
        settings = self._config.cache
        try:
            cache = CacheTier(
                l1_bytes=settings.l1_bytes, redis_url=redis_url, op_timeout_ms=settings.op_timeout_ms
            )
        except ValueError as error:
            raise StartupError(f"cache.redis_url: {error}") from None
        await cache.open()
        self._stack.push_async_callback(cache.close)
        return cache

    async def _embeddings(self, manifest: ModelManifest, cache: CacheTier) -> Embeddings:
        embedder = await self._load(manifest)
        self._stack.push_async_callback(embedder.close)
        return self._cached(cache, cast("EmbedderEndpoint", embedder))

    async def _load(self, manifest: ModelManifest) -> EmbedderEndpoint | ImageEmbedderEndpoint:
        """A model with its queue and threads; takes a moment."""
        settings = self._config.embedder
        return await asyncio.to_thread(
            load,
            manifest,
            workers=settings.workers,
            queue_texts=settings.queue_texts,
            queue_images=settings.queue_images,
            device=settings.device,
        )

    def _cached(self, cache: CacheTier, embedder: EmbedderEndpoint) -> Embeddings:
        return Embeddings(
            embedder,
            cache,
            ttl_s=self._config.cache.embedding_ttl_s,
            max_text_bytes=self._config.gateway.limits.max_text_bytes,
        )

    def _models(self, default: Embeddings, cache: CacheTier, data_dir: DataDir) -> Models:
        return Models(
            default,
            data_dir.models,
            load=self._load,
            cached=functools.partial(self._cached, cache),
            max_bytes=self._config.embedder.models_bytes,
        )

    def _components(
        self, supervisor: Supervisor, store: Store, cache: CacheTier
    ) -> Mapping[str, tuple[str, str]]:
        states = {name: (state, "child process") for name, state in supervisor.state().items()}
        if self._config.metadata.postgres_url:
            states["postgres"] = ("external", "by URL")
        for name, away in store.databases.items():
            if name != HOME:
                states[f"postgres {name}"] = ("away", away) if away else ("external", "by URL")
        states["cache"] = next(
            ((str(tier["state"]), "Redis tier") for tier in cache.tiers() if tier["name"] == "REDIS"),
            ("off", "Redis tier"),
        )
        return {**states, **self._others()}

    async def _catalog(self, store: Store, data_dir: DataDir) -> Catalog:
        catalog = Catalog(store, self._shards(store, data_dir))
        self._stack.push_async_callback(catalog.close)
        await catalog.load()
        return catalog

    def _shards(self, store: Store, data_dir: DataDir) -> Shards:
        """Where replicas are opened."""
        settings = self._config.shard
        threads = ThreadPoolExecutor(settings.threads or usable_cpus(), thread_name_prefix="search")
        self._stack.callback(threads.shutdown)
        return LocalShards(
            data_dir.segments,
            store.follow,
            search_threads=threads,
            memtable_rows=settings.memtable_rows,
            graph_rows=settings.graph_rows,
            child_rows=settings.child_rows,
            poll_ms=settings.poll_ms,
            device=settings.device,
        )


def require_private(name: str, address: str, settings: GatewaySettings) -> None:
    """StartupError unless the address is loopback, or guarded, or the risk was accepted."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise StartupError(f"--{name} {address}: not HOST:PORT")
    bare = host.strip("[]")
    try:
        loopback = bare == "localhost" or ipaddress.ip_address(bare).is_loopback
    except ValueError:
        loopback = False
    guarded = settings.tls_certificate and settings.tls_key and settings.api_keys
    if not (loopback or guarded or settings.insecure):
        needs = "TLS and API keys configured, or --insecure"
        if settings.server == "native":
            needs = "--insecure, as gateway.server: native speaks no TLS"
        raise StartupError(f"--{name} {address}: listening beyond loopback needs {needs}")


async def _finish_http(http: Http, serving: "asyncio.Task[None]") -> None:
    http.stop()
    await asyncio.wait([serving], timeout=5)
