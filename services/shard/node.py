"""A process's replicas, as other processes ask them: the service ShardNode of protos/ringfort/internal."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from protos.ringfort.internal import v1 as internal
from services.deadline import Deadline
from services.shard import parcels
from services.shard.local_shards import LocalShards
from services.shard.parcels import ReplicaId
from services.shard.replica import Replica
from shard_router.errors import PreconditionFailed, Unavailable
from shard_router.model import Collection, Include

log = logging.getLogger(__name__)

#: A moving position is told so often at most, and all that a replica says of itself so often at least.
MOVES_S, FIGURES_S = 0.005, 0.5


@dataclass(slots=True)
class _Held:
    """A replica, or the place of one."""

    #: Opened and closed by one at a time.
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    replica: Replica | None = None
    collection: Collection | None = None
    log_id: str = ""


class ShardNode:
    """Replicas by what they are of; each is opened when first asked for and closed with the node."""

    def __init__(self, shards: LocalShards) -> None:
        self._shards = shards
        self._held: dict[ReplicaId, _Held] = {}
        self._leaving = False

    async def Open(self, request: internal.OpenRequest, deadline: Deadline) -> internal.ReplicaState:
        """The replica asked for, opened anew where it fell or follows another log."""
        collection, slots = parcels.collection_from(request.collection), list(request.slots)
        id = ReplicaId.of(request.replica)
        held = self._held.setdefault(id, _Held())
        async with held.changing:
            if held.replica is not None:
                if held.replica.fell.is_set() or held.log_id != request.log_id:
                    await self._end(held)
                else:
                    await held.replica.backfill(slots)
                    await _serve(held.replica, request.epoch, slots)
            if held.replica is None:
                held.replica = await self._shards.open(
                    collection, id.shard, id.replica, database=id.database,
                    slots=slots, epoch=request.epoch, log_id=request.log_id,
                )  # fmt: skip
                held.collection, held.log_id = collection, request.log_id
                log.info("replica opened collection=%s shard=%d", collection.name, id.shard)
            return parcels.state_of(held.replica)

    async def Close(self, request: internal.CloseRequest, deadline: Deadline) -> internal.CloseResponse:
        """Close a replica, if it is there."""
        held = self._held.get(ReplicaId.of(request.replica))
        if held is not None:
            async with held.changing:
                await self._end(held)
        return internal.CloseResponse()

    async def Search(self, request: internal.SearchRequest, deadline: Deadline) -> internal.SearchResponse:
        """See `Replica.search_rendered`."""
        replica = self._replica(request.replica)
        answer = await replica.search_rendered(
            parcels.queries_from(request, self._collection(request.replica).dim),
            request.k,
            filter=parcels.filter_from(request.filter),
            exact=request.exact,
            effort=parcels.effort_from(request),
            include=Include(request.attributes, request.text, request.vector),
            exclude=frozenset(request.exclude),
            epoch=parcels.epoch_from(request),
            deadline=deadline,
        )
        return parcels.answer_on_wire(answer)

    async def Vectors(self, request: internal.VectorsRequest, deadline: Deadline) -> internal.VectorsResponse:
        """See `Replica.vectors`."""
        replica, epoch = self._replica(request.replica), parcels.epoch_from(request)
        return parcels.vectors_on_wire(await replica.vectors(request.ids, epoch=epoch))

    async def Count(self, request: internal.CountRequest, deadline: Deadline) -> internal.CountResponse:
        """See `Replica.count`."""
        replica, epoch = self._replica(request.replica), parcels.epoch_from(request)
        documents = await replica.count(parcels.filter_from(request.filter), epoch=epoch)
        return internal.CountResponse(documents=documents)

    async def Matching(
        self, request: internal.MatchingRequest, deadline: Deadline
    ) -> internal.MatchingResponse:
        """See `Replica.matching`."""
        replica, epoch = self._replica(request.replica), parcels.epoch_from(request)
        filter = parcels.filter_from(request.filter)
        return parcels.matches_on_wire(await replica.matching(filter, request.limit, epoch=epoch))

    async def Backfill(self, request: internal.SlotsRequest, deadline: Deadline) -> internal.SlotsResponse:
        """See `Replica.backfill`."""
        replica = self._replica(request.replica)
        await replica.backfill(list(request.slots))
        return internal.SlotsResponse(followed=sorted(replica.followed()))

    async def Serve(self, request: internal.SlotsRequest, deadline: Deadline) -> internal.SlotsResponse:
        """See `Replica.serve`; PreconditionFailed in place of ValueError."""
        replica = self._replica(request.replica)
        await _serve(replica, request.epoch, list(request.slots))
        return internal.SlotsResponse(followed=sorted(replica.followed()))

    async def Release(self, request: internal.SlotsRequest, deadline: Deadline) -> internal.SlotsResponse:
        """See `Replica.release`."""
        replica = self._replica(request.replica)
        await replica.release(list(request.slots))
        return internal.SlotsResponse(followed=sorted(replica.followed()))

    async def Offer(self, request: internal.OfferRequest, deadline: Deadline) -> internal.OfferResponse:
        """Take committed batches; what does not fit on is read from the log."""
        replica = self._replica(request.replica)
        if not request.deltas:
            replica.wake()
        dim = self._collection(request.replica).dim
        for delta in request.deltas:
            replica.offer(parcels.delta_from(delta, dim))
        return internal.OfferResponse(position=replica.position)

    async def Watch(
        self, request: internal.WatchRequest, deadline: Deadline
    ) -> AsyncIterator[internal.ReplicaState]:
        """What a replica says of itself, until it falls or the call's time is up."""
        replica = self._replica(request.replica)
        clock = asyncio.get_running_loop().time
        told_s = -FIGURES_S
        while deadline.left_s() > 0 and not self._leaving:
            fell = replica.fell.is_set()
            if fell or clock() - told_s >= FIGURES_S:
                told_s = clock()
                yield parcels.state_of(replica)
            else:
                yield internal.ReplicaState(position=replica.position)
            if fell:
                return
            moved_s = clock()
            if await replica.wait_for(replica.position + 1, Deadline.after(FIGURES_S)):
                # A move after a while is told at once: somebody may wait for it who did not bring the rows.
                await asyncio.sleep(max(0.0, moved_s + MOVES_S - clock()))

    async def Forget(self, request: internal.ForgetRequest, deadline: Deadline) -> internal.ForgetResponse:
        """Close and remove a replica, or those of all collections but the ones named."""
        if request.HasField("replica"):
            id = ReplicaId.of(request.replica)
            if (held := self._held.get(id)) is not None and held.collection is not None:
                await self._forget(id, held)
                await self._shards.forget(held.collection, id.shard, id.replica, database=id.database)
            return internal.ForgetResponse()
        known = {(key.collection, key.generation) for key in request.all_but.known}
        for id, held in list(self._held.items()):
            if (id.collection, id.generation) not in known:
                await self._forget(id, held)
        await self._shards.keep_only(known)
        return internal.ForgetResponse()

    def leave(self) -> None:
        """Let nobody watch any longer, so that the server can stop."""
        self._leaving = True

    async def close(self) -> None:
        """Close every replica."""
        for held in self._held.values():
            async with held.changing:
                await self._end(held)

    def _replica(self, key: internal.ReplicaKey) -> Replica:
        held = self._held.get(ReplicaId.of(key))
        if held is None or held.replica is None:
            raise Unavailable("the replica is not open on this node")
        return held.replica

    def _collection(self, key: internal.ReplicaKey) -> Collection:
        collection = self._held[ReplicaId.of(key)].collection
        assert collection is not None, "its replica is open"
        return collection

    async def _forget(self, id: ReplicaId, held: _Held) -> None:
        async with held.changing:
            await self._end(held)
        self._held.pop(id, None)

    @staticmethod
    async def _end(held: _Held) -> None:
        replica, held.replica = held.replica, None
        if replica is not None:
            await replica.close()


async def _serve(replica: Replica, epoch: int, slots: Sequence[int]) -> None:
    try:
        await replica.serve(epoch, slots)
    except ValueError as error:
        raise PreconditionFailed(str(error)) from None
