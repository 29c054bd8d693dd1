"""One further gateway of a cluster: the parts of the head's, over copies and models that the head runs."""

import asyncio
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import siblings_pb2
from protos.ringfort.internal.v1.embedder_node_pb2_grpc import EmbedderNodeStub
from services import tasks
from services.cache.tier import CacheTier
from services.config import Config
from services.deadline import Deadline
from services.front import Front, Others, cached, models_of, open_cache
from services.gateway.following import Following
from services.gateway.handing import OVER_ALL, HandedOn, OfTheHead, WatchedJobs, carry_out
from services.gateway.http import listen
from services.gateway.mirror import Mirror
from services.gateway.model_service import ModelService
from services.gateway.models import Models
from services.gateway.rankers import Rankers
from services.gateway.remote_embedder import RemoteEmbedder, RemoteImageEmbedder, Replicas
from services.gateway.remote_shards import RemoteShards
from services.membership import Membership
from services.metadata.ownership import BorrowedClaim
from services.metadata.store import Store
from services.peers import Peer, Port, own_host
from services.telemetry import log_to
from shard_router.errors import EmbedderUnavailable, RingfortError

#: A process that cannot join the head in this time gives up, to be started again by whoever started it.
JOIN_S = 60.0
#: How often it is looked whether it can answer, where it cannot rely on what the head said.
_LOOK_S = 0.5
#: How long the head may take to say what the service is made of.
_DESCRIBE_S = 2.0


class SiblingSettings(msgspec.Struct, frozen=True, tag="gateway"):
    """What a further gateway has to know."""

    name: str
    #: HOST:PORT of the head, and of what it tells further gateways; the token that internal ports ask for.
    head: str
    siblings: str
    token: str
    #: The service's configuration, as JSON, with the addresses that all gateways listen at.
    config: str
    release: str
    postgres_url: str
    #: Further databases, by name.
    partitions: dict[str, str]
    redis_url: str | None
    #: Where models lie, and the default one's directory there.
    models: str
    model: str
    #: Where it logs.
    directory: str


class Sibling:
    """A further gateway. `start` once; it ends with the stack that it was given."""

    def __init__(
        self,
        settings: SiblingSettings,
        claim: BorrowedClaim,
        claims: Mapping[str, BorrowedClaim],
        hear_claim: Callable[[internal.Word], None],
        stack: AsyncExitStack,
    ) -> None:
        """claims: by name, those to partitions; `hear_claim` takes what the head says of all of them."""
        self._settings, self._stack = settings, stack
        self._config = Config.model_validate_json(settings.config)
        self._claim, self._claims, self._hear_claim = claim, claims, hear_claim
        nodes = [f"node-{i}" for i in range(self._config.cluster.nodes)]
        self._shards = RemoteShards(nodes, settings.token)
        #: By NAME@VERSION, the processes of the models that are asked here.
        self._replicas: dict[str, Replicas] = {}
        #: Who takes part, by kind and name, as the head said last.
        self._members: dict[tuple[str, str], internal.Member] = {}
        self._models: Models | None = None
        self._ending: set[asyncio.Task[None]] = set()
        #: Set, and replaced, whenever somebody joins or leaves.
        self._changed = asyncio.Event()
        self._front: Front
        self._store: Store
        self._following: Following
        self._cache: CacheTier

    async def start(self) -> str:
        """Bring it up and serve; where it answers."""
        settings, config, stack = self._settings, self._config, self._stack
        directory = Path(settings.directory)
        await asyncio.to_thread(directory.mkdir, mode=0o700, parents=True, exist_ok=True)
        log_to(directory)
        gateway = config.gateway
        shared = listen(gateway.http, shares_port=True)
        stack.callback(shared.close)
        own = listen(f"{gateway.http.rpartition(':')[0]}:0")
        stack.callback(own.close)

        self._store = store = await Store.borrow(
            settings.postgres_url,
            self._claim,
            partitions={name: (url, self._claims[name]) for name, url in settings.partitions.items()},
            pool_size=config.metadata.pool_size,
            statement_timeout_ms=config.metadata.statement_timeout_ms,
        )
        stack.push_async_callback(store.close)
        stack.push_async_callback(self._shards.close)
        stack.push_async_callback(self._end_models)
        here = internal.Member(
            kind="listener",
            name=settings.name,
            address="nowhere yet",
            pid=os.getpid(),
            http="{}:{}".format(*own.getsockname()[:2]),
        )
        listening = Membership(settings.head, settings.token, here, self._hear)
        stack.push_async_callback(listening.close)
        deadline = Deadline.after(JOIN_S)
        await listening.joined(deadline)
        self._cache = cache = await open_cache(config, settings.redis_url, stack)
        manifest = await asyncio.to_thread(ModelManifest.load, Path(settings.model))
        embedder = await self._joined(manifest, deadline)
        assert isinstance(embedder, RemoteEmbedder), "the default model is one of texts"
        default = cached(config, cache, embedder)
        self._models = models = models_of(config, default, cache, Path(settings.models), self._load)
        stack.push_async_callback(models.close)
        rankers = Rankers()
        model_service = ModelService(models, rankers, store.models, Path(settings.models))

        self._following = following = Following(
            settings.siblings, settings.token, store, clock=time.monotonic
        )
        mirror = Mirror(store, self._shards, following.assure)
        stack.push_async_callback(mirror.close)
        stack.push_async_callback(following.close)
        following.begin(mirror, model_service.open)
        await following.ready(deadline)
        others = Others(
            following.known,
            following.visible,
            lambda own: OfTheHead(own, following.hand_on),
            share_ports=True,
        )
        self._front = front = Front(
            config, stack, store=store, catalog=mirror, cache=cache, default=default, models=models,
            rankers=rankers, others=others,
            release=settings.release, composition="cluster", components=self._components,
        )  # fmt: skip
        front.telemetry.parts.add("siblings", following.stats)
        changes = {
            "CollectionService": (HandedOn("CollectionService", following.hand_on),),
            "ModelService": (HandedOn("ModelService", following.hand_on), model_service),
            "ClusterService": (HandedOn("ClusterService", following.hand_on),),
            "IndexService": (
                HandedOn("IndexService", following.hand_on), WatchedJobs(following.hand_on),
            ),
        }  # fmt: skip
        addresses = await front.start(changes, shared, own)
        looking = asyncio.create_task(self._look_on(), name="health")
        stack.push_async_callback(tasks.end, looking)
        service = siblings_pb2.DESCRIPTOR.services_by_name["Gateway"]
        port = Port({service: self}, settings.token)
        here.address = await port.start(f"{own_host(config.cluster.host)}:0")
        stack.push_async_callback(port.stop, 0)
        here.kind = "gateway"
        membership = Membership(settings.head, settings.token, here, lambda _: None)
        stack.push_async_callback(membership.close)
        await membership.joined(deadline)
        return addresses.grpc

    async def Ask(self, request: internal.HandOnRequest, deadline: Deadline) -> internal.HandOnResponse:
        """What this gateway alone answers to a call."""
        response = await carry_out(
            self._front.alone, request.service, request.method, request.tenant, request.request, deadline,
            OVER_ALL,
        )  # fmt: skip
        return internal.HandOnResponse(response=response)

    def _hear(self, word: internal.Word) -> None:
        """Who takes part now, and what the claim to the database is."""
        self._hear_claim(word)
        here = {(member.kind, member.name): member for member in word.members}
        before, self._members = self._members, here
        for key, member in before.items():
            if here.get(key) != member:
                self._heard(member, False)
        for key, member in here.items():
            if before.get(key) != member:
                self._heard(member, True)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _heard(self, member: internal.Member, here: bool) -> None:
        if member.kind == "shard":
            self._shards.move(member.name, member.address if here else "")
        elif member.kind == "embedder" and (replicas := self._replicas.get(member.model)) is not None:
            if here:
                self._ask_too(replicas, member)
            else:
                self._end(self._left(member, replicas), f"leave {member.name}")

    def _ask_too(self, replicas: Replicas, member: internal.Member) -> None:
        peer = Peer(f"embedder {member.name}", EmbedderNodeStub, self._settings.token)
        peer.move(member.address)
        replicas.join(member.name, peer)

    async def _left(self, member: internal.Member, replicas: Replicas) -> None:
        await replicas.leave(member.name)
        if not len(replicas) and self._models is not None:
            # The head may have given it up; whoever needs it next asks for it again.
            await self._models.forget(member.model)

    def _end(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end_models(self) -> None:
        for replicas in list(self._replicas.values()):
            await replicas.close()
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _load(self, manifest: ModelManifest) -> RemoteEmbedder | RemoteImageEmbedder:
        """A model that the head runs."""
        deadline = Deadline.after(self._config.cluster.start_s)
        await self._following.load(manifest.model, deadline)
        return await self._joined(manifest, deadline)

    async def _joined(
        self, manifest: ModelManifest, deadline: Deadline
    ) -> RemoteEmbedder | RemoteImageEmbedder:
        """A model whose processes are asked as they join, one of which has by then."""
        model = manifest.model
        replicas = self._replicas[model] = Replicas(model, random.Random())
        for (kind, _), member in self._members.items():
            if kind == "embedder" and member.model == model:
                self._ask_too(replicas, member)

        async def end() -> None:
            if self._replicas.get(model) is replicas:
                del self._replicas[model]
            await replicas.close()

        try:
            async with asyncio.timeout(deadline.left_s()):
                while not len(replicas):
                    await self._changed.wait()
        except TimeoutError:
            await end()
            raise EmbedderUnavailable(model, "none of its processes has joined") from None
        if manifest.image is not None:
            return RemoteImageEmbedder(manifest, replicas, end)
        return RemoteEmbedder(manifest, replicas, end, queue_texts=self._config.embedder.queue_texts)

    async def _components(self) -> Mapping[str, tuple[str, str]]:
        """What the head says the service is made of; while it is away, what can be seen from here."""
        nothing = pb.DescribeRequest().SerializeToString()
        try:
            told = await self._following.hand_on(
                "ClusterService", "Describe", "", nothing, Deadline.after(_DESCRIBE_S)
            )
        except RingfortError:
            return self._seen()
        components = pb.DescribeResponse.FromString(told).components
        return {each.name: (each.state, each.detail) for each in components}

    def _seen(self) -> Mapping[str, tuple[str, str]]:
        cache = next(
            ((str(tier["state"]), "Redis tier") for tier in self._cache.tiers() if tier["name"] == "REDIS"),
            ("off", "Redis tier"),
        )
        return {"gateway head": ("away", ""), "cache": cache, **members_told(self._members.values())}

    async def _look_on(self) -> None:
        """Say NOT_SERVING while nothing can be answered: neither the head nor the database can be reached."""
        serving = True
        while True:
            await asyncio.sleep(_LOOK_S)
            can = self._following.leased or await self._reaches_database()
            if can != serving:
                serving = can
                await self._front.server.say(serving=serving)

    async def _reaches_database(self) -> bool:
        try:
            await self._store.ping()
        except RingfortError:
            return False
        return True


def members_told(members: Iterable[internal.Member]) -> dict[str, tuple[str, str]]:
    """How those who take part do, each with its state and a detail."""
    told = {}
    for member in members:
        if member.kind in ("shard", "embedder", "gateway"):
            detail = f"pid {member.pid} at {member.address}"
            told[f"{member.kind} {member.name}"] = (
                "running", f"{detail}, alone at http://{member.http}" if member.http else detail,
            )  # fmt: skip
    return told
