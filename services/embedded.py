"""The embedded composition: every part in one process, with Postgres and Valkey as its children.

Here the parts get to know each other; nothing else reads the configuration.
"""

import asyncio
import functools
import ipaddress
import logging
import random
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

from index_builder.models.build import ensure_model
from index_builder.models.manifest import ModelManifest
from services.cache.tier import CacheTier
from services.config import Config, GatewaySettings
from services.data_dir import DataDir, StartupError
from services.embedder.cpus import usable_cpus
from services.embedder.loading import load
from services.front import Addresses, Front, Others, cached, models_of, open_cache
from services.gateway.catalog import Catalog
from services.gateway.cluster_service import ShardChanges
from services.gateway.comparison import Comparison
from services.gateway.embeddings import Embeddings
from services.gateway.endpoints import EmbedderEndpoint, ImageEmbedderEndpoint, Shards
from services.gateway.fanout import FanOut
from services.gateway.http import listen
from services.gateway.jobs import Jobs
from services.gateway.model_service import ModelService
from services.gateway.models import Models
from services.gateway.rankers import Rankers
from services.gateway.reindexer import Reindexer
from services.gateway.resharder import Resharder
from services.gateway.servicers import CollectionChanges, IndexService
from services.gateway.transport import transport_of
from services.metadata.store import Store
from services.shard.local_shards import LocalShards
from services.supervisor import Supervisor
from services.telemetry import log_to
from shard_router import filters
from shard_router.model import HOME

log = logging.getLogger(__name__)


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
        transport_of(gateway)  # what keeps it from serving so is said before anything slow begins, too
        for name, address in (("grpc", gateway.grpc), ("http", gateway.http)):
            require_private(name, address, gateway)
        # Taken early, so that a port in use is said before anything slow begins.
        listen(gateway.grpc).close()
        http_sockets = self._listen_for_http()
        for each in http_sockets:
            self._stack.callback(each.close)

        data_dir = DataDir.open(self._path, release=self._release)
        self._stack.callback(data_dir.close)
        log_to(data_dir.logs)
        supervisor = Supervisor(data_dir)
        self._stack.push_async_callback(supervisor.stop)
        await supervisor.end_orphans()
        store, redis_url, manifest = await self._foundations(supervisor, data_dir)
        await self._spread(store, data_dir)
        cache = await open_cache(self._config, redis_url, self._stack)
        default = await self._default(manifest, cache)
        models = models_of(self._config, default, cache, data_dir.models, self._load)
        self._stack.push_async_callback(models.close)
        rankers = Rankers()
        model_service = ModelService(models, rankers, store.models, data_dir.models)
        await model_service.open()
        catalog = await self._catalog(store, data_dir)
        jobs = Jobs(catalog)
        comparison = Comparison(store, models, FanOut(random.Random()))
        resharder, reindexer = Resharder(catalog, jobs), Reindexer(catalog, jobs, models, comparison)
        self._stack.push_async_callback(reindexer.close)
        self._stack.push_async_callback(jobs.close)
        others = await self._others(catalog, models, model_service)
        await reindexer.open()
        await jobs.open()
        front = Front(
            self._config,
            self._stack,
            store=store,
            catalog=catalog,
            cache=cache,
            default=default,
            models=models,
            rankers=rankers,
            others=others,
            release=self._release,
            composition=self.composition,
            components=functools.partial(self._components, supervisor, store, cache),
        )
        front.telemetry.parts.add("shard", catalog.stats)
        front.telemetry.parts.add("supervisor", supervisor.stats)
        front.telemetry.parts.add_each("collection", catalog.stats_of_each)
        changes = {
            "CollectionService": (CollectionChanges(catalog, models, self._config),),
            "ModelService": (model_service,),
            "IndexService": (IndexService(catalog, jobs, reindexer),),
            "ClusterService": (ShardChanges(catalog, resharder),),
        }
        front.telemetry.parts.add("reindex", reindexer.stats)
        addresses = await front.start(changes, *http_sockets)
        reindexer.warm = front.warm
        await self._beside(front, addresses, redis_url, default.manifest)
        return addresses

    async def stop(self) -> None:
        """Drain, then stop every part and every child; safe after a start that was cut short."""
        await self._stack.aclose()
        log.info("stopped")

    def _listen_for_http(self) -> list[socket.socket]:
        """Where HTTP is served, the configured address first."""
        return [listen(self._config.gateway.http)]

    async def _spread(self, store: Store, data_dir: DataDir) -> None:
        """Bring up what runs beside this process: nothing here."""

    async def _others(self, catalog: Catalog, models: Models, model_service: ModelService) -> Others:
        """What the gateway is told of others: here it is alone."""
        return Others()

    async def _beside(
        self, front: Front, addresses: Addresses, redis_url: str | None, default: ModelManifest
    ) -> None:
        """Bring up further gateways: none here."""

    def _members(self) -> Mapping[str, tuple[str, str]]:
        """How what runs beside this process does, each with its state and a detail."""
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

    async def _default(self, manifest: ModelManifest, cache: CacheTier) -> Embeddings:
        embedder = await self._load(manifest)
        self._stack.push_async_callback(embedder.close)
        return cached(self._config, cache, cast("EmbedderEndpoint", embedder))

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

    async def _components(
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
        return {**states, **self._members()}

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
