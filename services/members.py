"""The processes of a cluster beside its head: a node that holds shards, one that runs a model, or a gateway.

`python -m services member` runs one in the foreground, told by a JSON object on stdin what it is; on Ray they
are hosted by actors and deployments (on_ray.py). Each has its own internal server, and joins the head.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID

import msgspec

from index_builder.models.manifest import ModelManifest
from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import embedder_node_pb2, shard_node_pb2
from services.deadline import Deadline
from services.embedder.cpus import usable_cpus
from services.embedder.embedder import Embedder
from services.embedder.images import ImageEmbedder
from services.embedder.loading import load
from services.embedder.node import EmbedderNode
from services.membership import Membership
from services.metadata.ownership import BorrowedClaim, Claim
from services.metadata.store import Store
from services.peers import Port, own_host
from services.shard.local_shards import LocalShards
from services.shard.node import ShardNode
from services.sibling import JOIN_S, Sibling, SiblingSettings
from services.telemetry import log_to

#: How long calls under way have to finish when a process ends.
DRAIN_S = 5.0
#: Connections of a node to the database: its replicas take turns.
_POOL_SIZE = 4


class ShardNodeSettings(msgspec.Struct, frozen=True, tag="shard"):
    """What a node that holds shards has to know."""

    name: str
    #: HOST:PORT of the head, and the token that all internal ports ask for.
    head: str
    token: str
    #: Where its server listens, on a port of its own choice; see `own_host`.
    host: str
    #: Its segments and logs; nobody else's.
    directory: str
    postgres_url: str
    #: Further databases, by name.
    partitions: dict[str, str]
    memtable_rows: int
    graph_rows: int
    child_rows: int
    poll_ms: int
    #: Search threads; 0 means the CPUs this process really has.
    threads: int
    device: str


class EmbedderNodeSettings(msgspec.Struct, frozen=True, tag="embedder"):
    """What a process that runs a model has to know."""

    name: str
    head: str
    token: str
    host: str
    #: Where the built model lies.
    model: str
    workers: int
    queue_texts: int
    queue_images: int
    device: str


MemberSettings = ShardNodeSettings | EmbedderNodeSettings | SiblingSettings


def settings_from(data: bytes) -> MemberSettings:
    """Settings from JSON; msgspec.ValidationError names what is wrong."""
    settings: MemberSettings = msgspec.json.decode(data, type=MemberSettings)
    return settings


class Member:
    """One process's part. `start` once, `stop` once."""

    def __init__(self, settings: MemberSettings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._embedder: Embedder | ImageEmbedder | None = None

    async def start(self) -> str:
        """Bring it up, join the head, and return where it answers."""
        match self._settings:
            case ShardNodeSettings():
                return await self._start_shards(self._settings)
            case EmbedderNodeSettings():
                return await self._start_embedder(self._settings)
            case SiblingSettings():
                claim = BorrowedClaim()
                claims = {name: BorrowedClaim() for name in self._settings.partitions}
                sibling = Sibling(self._settings, claim, claims, _hears(claim, claims), self._stack)
                return await sibling.start()

    @property
    def serves_callers(self) -> bool:
        """Whether it is a gateway."""
        return isinstance(self._settings, SiblingSettings)

    async def stop(self) -> None:
        """Leave the cluster, let calls under way finish, and stop everything."""
        await self._stack.aclose()

    def load(self) -> Mapping[str, float]:
        """What a decision on how many there should be is made on."""
        stats = self._embedder.stats() if isinstance(self._embedder, Embedder) else {}
        return {"queue_texts": stats.get("queue_texts", 0.0)}

    async def _start_shards(self, settings: ShardNodeSettings) -> str:
        directory = Path(settings.directory)
        for each in (directory / "segments", directory / "logs"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_to(directory / "logs")
        claim = BorrowedClaim()
        claims = {name: BorrowedClaim() for name in settings.partitions}
        store = await Store.borrow(
            settings.postgres_url,
            claim,
            partitions={name: (url, claims[name]) for name, url in settings.partitions.items()},
            pool_size=_POOL_SIZE,
        )
        self._stack.push_async_callback(store.close)
        threads = ThreadPoolExecutor(settings.threads or usable_cpus(), thread_name_prefix="search")
        self._stack.callback(threads.shutdown)
        shards = LocalShards(
            directory / "segments",
            store.follow,
            search_threads=threads,
            memtable_rows=settings.memtable_rows,
            graph_rows=settings.graph_rows,
            child_rows=settings.child_rows,
            poll_ms=settings.poll_ms,
            device=settings.device,
        )
        node = ShardNode(shards)
        self._stack.push_async_callback(node.close)
        service = shard_node_pb2.DESCRIPTOR.services_by_name["ShardNode"]
        port = Port({service: node}, settings.token)
        address = await self._join(port, internal.Member(kind="shard"), _hears(claim, claims))
        self._stack.callback(node.leave)
        return address

    async def _start_embedder(self, settings: EmbedderNodeSettings) -> str:
        manifest = await asyncio.to_thread(ModelManifest.load, Path(settings.model))
        self._embedder = await asyncio.to_thread(
            load,
            manifest,
            workers=settings.workers,
            queue_texts=settings.queue_texts,
            queue_images=settings.queue_images,
            device=settings.device,
        )
        self._stack.push_async_callback(self._embedder.close)
        service = embedder_node_pb2.DESCRIPTOR.services_by_name["EmbedderNode"]
        port = Port({service: EmbedderNode(self._embedder)}, settings.token)
        return await self._join(port, internal.Member(kind="embedder", model=manifest.model), lambda _: None)

    async def _join(self, port: Port, member: internal.Member, hear: Callable[[internal.Word], None]) -> str:
        settings = self._settings
        assert not isinstance(settings, SiblingSettings), "a gateway has ports of its own"
        self._stack.push_async_callback(port.stop, DRAIN_S)
        address = await port.start(f"{own_host(settings.host)}:0")
        member.name, member.address, member.pid = settings.name, address, os.getpid()
        membership = Membership(settings.head, settings.token, member, hear)
        self._stack.push_async_callback(membership.close)
        await membership.joined(Deadline.after(JOIN_S))
        return address


def _hears(claim: BorrowedClaim, partitions: Mapping[str, BorrowedClaim]) -> Callable[[internal.Word], None]:
    """Lets claims be what the head says: to the home database, and by name to its partitions."""

    def hear(word: internal.Word) -> None:
        claim.tell(claim_from(word.claim))
        for name, told in word.partitions.items():
            partitions[name].tell(claim_from(told))

    return hear


def claim_on_wire(claim: Claim) -> internal.Claim:
    """A claim as a message."""
    return internal.Claim(id=claim.id.bytes, log_id=claim.log_id, term=claim.term, identity=claim.identity)


def claims_on_wire(store: Store) -> Mapping[str, internal.Claim]:
    """The claims to the partitions that were there so far."""
    return {name: claim_on_wire(claim) for name, claim in store.claims.items()}


def claim_from(message: internal.Claim) -> Claim:
    """A claim as its holder told it."""
    return Claim(UUID(bytes=message.id), message.log_id, message.term, message.identity)
