"""The cluster composition: a gateway here, at the head; shards, models and further gateways beside it.

Everything but where shards and models run is the embedded composition's. Who starts those processes, and
again when they die, is a Launcher: Ray, or a test. They join the head, and from then on are asked directly.
"""

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from index_builder.models.manifest import ModelManifest
from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import head_pb2, siblings_pb2
from protos.ringfort.internal.v1.embedder_node_pb2_grpc import EmbedderNodeStub
from protos.ringfort.internal.v1.siblings_pb2_grpc import GatewayStub
from services.config import Config
from services.data_dir import DataDir
from services.deadline import Deadline
from services.embedded import Embedded
from services.front import Addresses, Front, Others
from services.gateway.catalog import Catalog
from services.gateway.endpoints import EmbedderEndpoint, ImageEmbedderEndpoint, Shards
from services.gateway.handing import OverGateways, carry_out
from services.gateway.http import listen
from services.gateway.model_service import ModelService
from services.gateway.models import Models
from services.gateway.remote_embedder import RemoteEmbedder, RemoteImageEmbedder, Replicas
from services.gateway.remote_shards import RemoteShards
from services.gateway.server import Servicers
from services.gateway.siblings import Siblings
from services.members import EmbedderNodeSettings, ShardNodeSettings, claim_on_wire, claims_on_wire
from services.membership import Head
from services.metadata.store import Store
from services.peers import Peer, Port, own_host
from services.sibling import SiblingSettings, members_told
from shard_router.errors import RingfortError

if TYPE_CHECKING:
    from protos.ringfort.internal.v1.siblings_pb2_grpc import GatewayAsyncStub

log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Starts the processes beside the head, and again whenever one dies."""

    async def start_nodes(self, nodes: Sequence[ShardNodeSettings]) -> None:
        """Start these nodes; they join when they are up."""

    async def start_gateways(self, gateways: Sequence[SiblingSettings]) -> None:
        """Start these further gateways; they join once they serve."""

    async def stop_gateways(self) -> None:
        """End them; calls under way may finish."""

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
        self._siblings: Siblings
        self._servicers: Servicers = {}
        #: Further gateways, by name.
        self._gateways: dict[str, Peer[GatewayAsyncStub]] = {}
        #: How this process's own gateway is told of, beside others.
        self._own_gateway: dict[str, tuple[str, str]] = {}
        self._data_dir: DataDir

    async def _spread(self, store: Store, data_dir: DataDir) -> None:
        """The head's internal server, and the nodes that hold shards."""
        settings = self._config.cluster
        self._data_dir = data_dir
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

    def _listen_for_http(self) -> list[socket.socket]:
        address = self._config.gateway.http
        if self._config.cluster.gateways == 1:
            return super()._listen_for_http()
        listen(address).close()  # nobody's but ours
        own = f"{address.rpartition(':')[0]}:0"
        return [listen(address, shares_port=True), listen(own)]

    async def _others(self, catalog: Catalog, models: Models, model_service: ModelService) -> Others:
        """Every write is told to further gateways, and so is what changes."""
        if self._config.cluster.gateways == 1:
            return Others()

        async def load(model: str, deadline: Deadline) -> None:
            await models.load(models.resolve(model), deadline)

        siblings = self._siblings = Siblings(catalog, self._carry_out, load, clock=time.monotonic)
        self._stack.push_async_callback(siblings.close)
        model_service.on_change.append(siblings.registry_changed)
        return Others(
            visible=siblings.visible,
            caches=lambda own: OverGateways(own, self._ask_gateways),
            share_ports=True,
        )

    async def _beside(
        self, front: Front, addresses: Addresses, redis_url: str | None, default: ModelManifest
    ) -> None:
        """Further gateways behind the same ports."""
        settings, gateway = self._config.cluster, self._config.gateway
        if settings.gateways == 1:
            return
        self._servicers = front.servicers
        front.telemetry.parts.add("siblings", self._siblings.stats)
        service = siblings_pb2.DESCRIPTOR.services_by_name["Siblings"]
        port = Port({service: self._siblings}, self._token)
        address = await port.start(f"{own_host(settings.host)}:0")
        self._stack.push_async_callback(port.stop, 0)
        names = [f"gateway-{i}" for i in range(1, settings.gateways)]
        self._gateways = {name: Peer(f"gateway {name}", GatewayStub, self._token) for name in names}
        for peer in self._gateways.values():
            self._stack.push_async_callback(peer.close)
        ports = gateway.model_copy(update={"grpc": addresses.grpc, "http": addresses.http})
        self._own_gateway = {
            "gateway head": ("running", f"at {addresses.grpc}, alone at http://{addresses.own}")
        }
        self._say(f"starting {len(names)} further gateways")
        self._stack.push_async_callback(self._launcher.stop_gateways)
        await self._launcher.start_gateways(
            [
                SiblingSettings(
                    name=name,
                    head=self._address,
                    siblings=address,
                    token=self._token,
                    config=self._config.model_copy(update={"gateway": ports}).model_dump_json(),
                    release=self._release,
                    postgres_url=self._postgres_url,
                    partitions=self._config.metadata.partitions,
                    redis_url=redis_url,
                    models=str(self._data_dir.models),
                    model=str(default.directory),
                    directory=str(self._data_dir.path / "gateways" / name / "logs"),
                )
                for name in names
            ]
        )
        deadline = Deadline.after(settings.start_s)
        await self._head.wait_for(
            lambda: {member.name for member in self._head.members("gateway")} >= set(names),
            deadline,
            "a gateway",
        )

    async def _ask_gateways(
        self, service: str, method: str, tenant: str, request: bytes, deadline: Deadline
    ) -> list[bytes]:
        """What each further gateway answers for itself; one that cannot be asked is left out."""
        message = internal.HandOnRequest(service=service, method=method, tenant=tenant, request=request)

        async def ask(peer: "Peer[GatewayAsyncStub]") -> bytes | None:
            try:
                with peer.calling() as stub:
                    left_s = deadline.require(peer.name)
                    answer = await stub.Ask(message, timeout=left_s, metadata=peer.metadata)
            except RingfortError as error:
                log.warning("%s is left out: %s", peer.name, error)
                return None
            return bytes(answer.response)

        answers = await asyncio.gather(*map(ask, self._gateways.values()))
        return [answer for answer in answers if answer is not None]

    async def _carry_out(
        self, service: str, method: str, tenant: str, request: bytes, deadline: Deadline
    ) -> bytes:
        return await carry_out(self._servicers, service, method, tenant, request, deadline)

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

    def _members(self) -> Mapping[str, tuple[str, str]]:
        settings = self._config.cluster
        expected = [f"shard node-{i}" for i in range(settings.nodes)] + [
            f"gateway {name}" for name in self._gateways
        ]
        here = [member for kind in ("shard", "embedder", "gateway") for member in self._head.members(kind)]
        return {**dict.fromkeys(expected, ("away", "")), **members_told(here), **self._own_gateway}

    def _heard(self, member: internal.Member, here: bool) -> None:
        """Somebody joined or left."""
        if member.kind == "shard":
            self._remote_shards.move(member.name, member.address if here else "")
            if here and self._served is not None:
                self._served.hurry()
        elif member.kind == "gateway" and member.name in self._gateways:
            self._gateways[member.name].move(member.address if here else "")
        elif member.kind == "embedder" and (replicas := self._replicas.get(member.model)) is not None:
            if here:
                peer = Peer(f"embedder {member.name}", EmbedderNodeStub, self._token)
                peer.move(member.address)
                replicas.join(member.name, peer)
            else:
                leaving = asyncio.create_task(replicas.leave(member.name), name=f"leave {member.name}")
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
