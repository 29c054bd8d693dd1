"""The cluster composition: the gateway here, at the head; shards and models in processes of their own.

Everything but where shards and models run is the embedded composition's. Who starts those processes, and
again when they die, is a Launcher: Ray, or a test. They join the head, and from then on are asked directly.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from index_builder.models.manifest import ModelManifest
from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import head_pb2
from protos.ringfort.internal.v1.embedder_node_pb2_grpc import EmbedderNodeStub
from services.config import Config
from services.data_dir import DataDir
from services.deadline import Deadline
from services.embedded import Embedded
from services.gateway.catalog import Catalog
from services.gateway.endpoints import EmbedderEndpoint, ImageEmbedderEndpoint, Shards
from services.gateway.remote_embedder import RemoteEmbedder, RemoteImageEmbedder, Replicas
from services.gateway.remote_shards import RemoteShards
from services.members import EmbedderNodeSettings, ShardNodeSettings, claim_on_wire, claims_on_wire
from services.membership import Head
from services.metadata.store import Store
from services.peers import Peer, Port, own_host

log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Starts the processes beside the head, and again whenever one dies."""

    async def start_nodes(self, nodes: Sequence[ShardNodeSettings]) -> None:
        """Start these nodes; they join when they are up."""

    async def start_model(self, model: str, settings: EmbedderNodeSettings) -> None:
        """Start processes of a model, each under a name that begins with the settings' and is its own."""

    async def stop_model(self, model: str) -> None:
        """End them."""

    async def close(self) -> None:
        """End all that was started."""


class Cluster(Embedded):
    """The service, spread over processes. `start` once, `stop` once."""

    composition = "cluster"

    def __init__(
        self, config: Config, path: Path, launcher: Launcher, *, release: str, say: Callable[[str], None]
    ) -> None:
        super().__init__(config, path, release=release, say=say)
        self._launcher = launcher
        self._head: Head
        self._address = self._token = ""
        self._remote_shards: RemoteShards
        #: By NAME@VERSION.
        self._replicas: dict[str, Replicas] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        #: The collections, once they are opened.
        self._served: Catalog | None = None

    async def _spread(self, store: Store, data_dir: DataDir) -> None:
        """The head's internal server, and the nodes that hold shards."""
        settings = self._config.cluster
        self._token = data_dir.secrets.password("internal")
        self._head = Head(lambda: claim_on_wire(store.claim), lambda: claims_on_wire(store))
        port = Port({head_pb2.DESCRIPTOR.services_by_name["Head"]: self._head}, self._token)
        self._address = await port.start(f"{own_host(settings.host)}:0")
        self._stack.push_async_callback(port.stop, 0)
        names = [f"node-{i}" for i in range(settings.nodes)]
        self._remote_shards = RemoteShards(names, self._token)
        self._stack.push_async_callback(self._remote_shards.close)
        self._head.listen(self._heard)
        self._say(f"starting {settings.nodes} nodes")
        self._stack.push_async_callback(self._launcher.close)
        shard = self._config.shard
        await self._launcher.start_nodes(
            [
                ShardNodeSettings(
                    name=name,
                    head=self._address,
                    token=self._token,
                    host=settings.host,
                    directory=str(data_dir.path / "nodes" / name),
                    postgres_url=self._postgres_url,
                    partitions=self._config.metadata.partitions,
                    memtable_rows=shard.memtable_rows,
                    graph_rows=shard.graph_rows,
                    child_rows=shard.child_rows,
                    poll_ms=shard.poll_ms,
                    threads=shard.threads,
                    device=shard.device,
                )
                for name in names
            ]
        )
        deadline = Deadline.after(settings.start_s)
        await self._head.wait_for(
            lambda: {member.name for member in self._head.members("shard")} >= set(names), deadline, "a node"
        )

    def _shards(self, store: Store, data_dir: DataDir) -> Shards:
        return self._remote_shards

    async def _catalog(self, store: Store, data_dir: DataDir) -> Catalog:
        self._served = await super()._catalog(store, data_dir)
        return self._served

    async def _load(self, manifest: ModelManifest) -> EmbedderEndpoint | ImageEmbedderEndpoint:
        """A model in processes of its own, one of which is up by then."""
        model, settings = manifest.model, self._config.embedder
        replicas = self._replicas[model] = Replicas(model, random.Random())
        for member in self._head.members("embedder"):
            self._heard(member, True)
        self._say(f"starting processes of {model}")
        await self._launcher.start_model(
            model,
            EmbedderNodeSettings(
                name=model,
                head=self._address,
                token=self._token,
                host=self._config.cluster.host,
                model=str(manifest.directory),
                workers=settings.workers,
                queue_texts=settings.queue_texts,
                queue_images=settings.queue_images,
                device=settings.device,
            ),
        )

        async def end() -> None:
            self._replicas.pop(model, None)
            await self._launcher.stop_model(model)
            await replicas.close()

        try:
            deadline = Deadline.after(self._config.cluster.start_s)
            await self._head.wait_for(lambda: len(replicas) > 0, deadline, f"a process of {model}")
        except BaseException:
            await end()
            raise
        if manifest.image is not None:
            return RemoteImageEmbedder(manifest, replicas, end)
        return RemoteEmbedder(manifest, replicas, end, queue_texts=settings.queue_texts)

    def _others(self) -> Mapping[str, tuple[str, str]]:
        members = self._head.members("shard") + self._head.members("embedder")
        here = {f"{m.kind} {m.name}": ("running", f"pid {m.pid} at {m.address}") for m in members}
        nodes = {f"shard node-{i}": ("away", "") for i in range(self._config.cluster.nodes)}
        return {**nodes, **here}

    def _heard(self, member: internal.Member, here: bool) -> None:
        """Somebody joined or left."""
        if member.kind == "shard":
            self._remote_shards.move(member.name, member.address if here else "")
            if here and self._served is not None:
                self._served.hurry()
        elif (replicas := self._replicas.get(member.model)) is not None:
            if here:
                peer = Peer(f"embedder {member.name}", EmbedderNodeStub, self._token)
                peer.move(member.address)
                replicas.join(member.name, peer)
            else:
                leaving = asyncio.create_task(replicas.leave(member.name), name=f"leave {member.name}")
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
