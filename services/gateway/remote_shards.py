"""Replicas on the nodes of a cluster: Shards over gRPC.

A node is known by its name and may come and go; where it answers is the membership's to say. A collection's
shards lie on the nodes in turn, beginning with another for each collection.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence

from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1.shard_node_pb2_grpc import ShardNodeStub
from services.deadline import Deadline
from services.gateway.remote_shard import READ_S, RemoteShard, ShardPeer
from services.peers import Peer
from services.shard.parcels import key_of
from shard_router.errors import RingfortError
from shard_router.model import HOME, Collection

log = logging.getLogger(__name__)


class RemoteShards:
    """Opens replicas on a fixed list of nodes."""

    def __init__(self, nodes: Iterable[str], token: str) -> None:
        """nodes: their names; all of them have to be given whenever the service starts on the same data."""
        self._peers: dict[str, ShardPeer] = {name: Peer(name, ShardNodeStub, token) for name in nodes}
        self._known: set[tuple[int, int]] = set()

    def move(self, name: str, address: str) -> None:
        """A node answers there now; nowhere, where that is empty. Others' names are nothing to us."""
        if (peer := self._peers.get(name)) is not None:
            peer.move(address)

    async def open(
        self,
        collection: Collection,
        shard: int,
        replica: int,
        *,
        database: str = HOME,
        slots: Sequence[int],
        epoch: int,
        log_id: str,
    ) -> RemoteShard:
        """A replica on the node whose turn it is; raises what opening it there raises."""
        self._known.add((collection.uid, collection.generation))
        peer = self._peer(collection, shard, replica)
        return await RemoteShard.open(
            peer, collection, shard, replica, database=database, slots=slots, epoch=epoch, log_id=log_id
        )

    async def attach(
        self, collection: Collection, shard: int, replica: int, database: str, deadline: Deadline
    ) -> RemoteShard:
        """A replica that another gateway has opened, where it lies; Unavailable."""
        return await RemoteShard.attach(
            self._peer(collection, shard, replica), collection, shard, replica, database, deadline
        )

    async def forget(self, collection: Collection, shard: int, replica: int, *, database: str = HOME) -> None:
        """Have its node remove the files of a closed replica that will not be opened again."""
        request = internal.ForgetRequest(replica=key_of(collection, shard, replica, database))
        await self._forget(self._peer(collection, shard, replica), request)

    async def forget_all(self, collection: Collection) -> None:
        """Have every node that can be reached remove the files of a collection that is gone."""
        await self.keep_only(self._known - {(collection.uid, collection.generation)})

    async def keep_only(self, collections: Iterable[tuple[int, int]]) -> None:
        """Have every node that can be reached remove the files of every other collection."""
        self._known = set(collections)
        keys = [internal.ReplicaKey(collection=uid, generation=number) for uid, number in self._known]
        request = internal.ForgetRequest(all_but=internal.Collections(known=keys))
        await asyncio.gather(*(self._forget(peer, request) for peer in self._peers.values()))

    async def close(self) -> None:
        """Give every connection up."""
        for peer in self._peers.values():
            await peer.close()

    def _peer(self, collection: Collection, shard: int, replica: int) -> ShardPeer:
        """In turn, so that a shard's copies lie on as many nodes as there are."""
        names = sorted(self._peers)
        return self._peers[names[(collection.uid + shard + replica) % len(names)]]

    @staticmethod
    async def _forget(peer: ShardPeer, request: internal.ForgetRequest) -> None:
        try:
            with peer.calling() as stub:
                await stub.Forget(request, timeout=READ_S, metadata=peer.metadata)
        except RingfortError as error:
            log.warning("%s keeps files of collections that are gone: %s", peer.name, error)
