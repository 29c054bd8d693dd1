"""A shard's replica on another process: ShardEndpoint over gRPC.

What it says of itself is heard all the time and kept here, so that looking costs no call. When its process
cannot be heard any more it has fallen, as one that lost its log: calls are Unavailable at once, and whoever
opened it opens another, which is not asked before it has caught up.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort
from protos.ringfort.internal import v1 as internal
from services import tasks
from services.deadline import Deadline
from services.gateway.coalescer import Coalescer
from services.peers import Peer
from services.shard import parcels
from services.shard.layout import SegmentStatus
from services.shard.parcels import Asked
from services.shard.rendering import RenderedHits
from services.shard.replica import ShardAnswer
from shard_router.errors import (
    DeadlineExceeded,
    DimensionMismatch,
    PreconditionFailed,
    RingfortError,
    Unavailable,
)
from shard_router.filters import Filter
from shard_router.model import HOME, Collection, Hit, Include, LogDelta, Version

if TYPE_CHECKING:
    from protos.ringfort.internal.v1.shard_node_pb2_grpc import ShardNodeAsyncStub

log = logging.getLogger(__name__)

ShardPeer: TypeAlias = "Peer[ShardNodeAsyncStub]"

#: Opening may mean reading a whole log.
OPEN_S = 600.0
#: A read that is no search.
READ_S = 10.0
#: A replica is watched in calls of this length.
_WATCH_S = 3_600.0
#: Committed batches that wait to be handed over; beyond it the replica reads the log.
_OFFERS_MOST, _OFFER_ROWS_MOST = 64, 16_384


class RemoteShard:
    """One replica of a shard, on a node."""

    def __init__(
        self, peer: ShardPeer, collection: Collection, shard: int, replica: int, database: str
    ) -> None:
        """Use `open`; this only puts the parts together."""
        self._peer, self._collection = peer, collection
        self._key = parcels.key_of(collection, shard, replica, database)
        part = "" if database == HOME else f" in {database}"
        self._name = f"replica {replica} of shard {shard} of {collection.name}{part}"
        self._searches: Coalescer[Asked, np.ndarray, ShardAnswer[RenderedHits]] = Coalescer(
            self._send, f"{self._name} on {peer.name}"
        )
        self._state = internal.ReplicaState()
        self._followed: frozenset[int] = frozenset()
        self._position = 0
        #: Why it cannot be asked any more; empty while it can.
        self._away = ""
        #: Set, and replaced, whenever the position or whether it can be asked changes.
        self._news = asyncio.Event()
        self._offers: deque[LogDelta] = deque()
        self._hinted = False
        self._offered = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._handing: asyncio.Task[None] | None = None
        self.fell = asyncio.Event()
        #: Somebody else opened it, and closes it.
        self._attached = False

    @classmethod
    async def attach(
        cls,
        peer: ShardPeer,
        collection: Collection,
        shard: int,
        replica: int,
        database: str,
        deadline: Deadline,
    ) -> "RemoteShard":
        """A replica that somebody else has opened on that node; Unavailable where it cannot be heard."""
        remote = cls(peer, collection, shard, replica, database)
        remote._attached = True
        remote._begin()
        try:
            async with asyncio.timeout(deadline.left_s()):
                while not remote._state.full:
                    if remote._away:
                        raise Unavailable(f"{remote._name} on {peer.name} is away: {remote._away}")
                    await remote._news.wait()
        except TimeoutError:
            await remote.close()
            raise Unavailable(f"{remote._name} on {peer.name} is not heard in time") from None
        except BaseException:
            await remote.close()
            raise
        return remote

    @classmethod
    async def open(
        cls,
        peer: ShardPeer,
        collection: Collection,
        shard: int,
        replica: int,
        *,
        database: str = HOME,
        slots: Sequence[int],
        epoch: int,
        log_id: str,
    ) -> "RemoteShard":
        """A replica on that node, which can answer by then; raises what opening it there raises."""
        remote = cls(peer, collection, shard, replica, database)
        request = parcels.open_request(collection, remote._key, slots, epoch, log_id)
        with peer.calling() as stub:
            state = await stub.Open(request, timeout=OPEN_S, metadata=peer.metadata)
        remote._hear(state)
        remote._begin()
        return remote

    @property
    def endpoint(self) -> str:
        """Its node, and where that answers."""
        return f"{self._peer.name} {self._peer.address}".strip()

    @property
    def position(self) -> int:
        """What of the log it said last that it has applied."""
        return self._position

    def followed(self) -> frozenset[int]:
        """The slots that it said last it follows."""
        return self._followed

    async def backfill(self, slots: Sequence[int]) -> None:
        """Have it follow these slots too; returns when all of their documents are there."""
        await self._ask_slots("Backfill", slots, timeout_s=OPEN_S)

    async def serve(self, epoch: int, slots: Sequence[int]) -> None:
        """Have it answer for exactly these slots from that epoch on; ValueError where it lacks one.

        Where its node is away it has fallen, and answers nothing.
        """
        try:
            await self._ask_slots("Serve", slots, epoch=epoch)
        except PreconditionFailed as error:
            raise ValueError(str(error)) from error
        except (Unavailable, DeadlineExceeded) as error:
            self._fall(str(error))

    async def release(self, slots: Sequence[int]) -> None:
        """Have it follow these slots no more; where its node is away it has fallen."""
        try:
            await self._ask_slots("Release", slots)
        except (Unavailable, DeadlineExceeded) as error:
            self._fall(str(error))

    def offer(self, delta: LogDelta) -> bool:
        """Hand a committed batch over, in the background; False where it has to read the log instead."""
        rows = sum(len(waiting.rows) for waiting in self._offers)
        full = len(self._offers) >= _OFFERS_MOST or rows + len(delta.rows) > _OFFER_ROWS_MOST
        if self._away or (full and rows):
            return False
        self._offers.append(delta)
        self._offered.set()
        return True

    def wake(self) -> None:
        """There is something new in the log."""
        self._hinted = True
        self._offered.set()

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether it said before the deadline that everything up to `position` is applied."""
        while position > self._position:
            left_s = deadline.left_s()
            if left_s <= 0 or self.fell.is_set():
                return False
            try:
                async with asyncio.timeout(left_s):
                    await self._news.wait()
            except TimeoutError:
                return False
        return True

    async def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool = False,
        effort: Effort = DEFAULT_EFFORT,
        include: Include = Include(),  # noqa: B008 - immutable
        exclude: frozenset[str] = frozenset(),
        epoch: int | None = None,
        deadline: Deadline,
    ) -> ShardAnswer[list[Hit]]:
        """As `search_rendered`, with the hits as values."""
        answer = await self.search_rendered(
            queries, k, filter=filter, exact=exact, effort=effort, include=include, exclude=exclude,
            epoch=epoch, deadline=deadline,
        )  # fmt: skip
        schema = self._collection.schema
        values = [hits.values(include, schema) for hits in answer.hits]
        return ShardAnswer(answer.position, values, answer.took_ms, answer.complete)

    def search_rendered(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool = False,
        effort: Effort = DEFAULT_EFFORT,
        include: Include = Include(),  # noqa: B008 - immutable
        exclude: frozenset[str] = frozenset(),
        epoch: int | None = None,
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[RenderedHits]]:
        """The best k of each query, float32 [n, dim]; searches that ask alike travel together."""
        # Here, so that one caller's mistake does not fail those it would travel with.
        if queries.shape[1] != self._collection.dim:
            raise DimensionMismatch("query", queries.shape[1], self._collection.dim)
        asked = Asked(k, parcels.filter_text(filter), exact, effort, include, exclude, epoch)
        queries = np.ascontiguousarray(queries, np.float32)
        return self._searches.ask(asked, queries, len(queries), deadline)

    async def count(self, filter: Filter | None, *, epoch: int | None = None) -> int:
        """How many live documents pass."""
        request = internal.CountRequest(replica=self._key, filter=parcels.filter_text(filter), epoch=epoch)
        with self._calling() as stub:
            answer = await stub.Count(request, timeout=READ_S, metadata=self._peer.metadata)
        return int(answer.documents)

    async def matching(
        self, filter: Filter | None, limit: int, *, epoch: int | None = None
    ) -> list[tuple[str, Version]]:
        """Ids and versions of at most `limit` live documents that pass."""
        text = parcels.filter_text(filter)
        request = internal.MatchingRequest(replica=self._key, filter=text, limit=limit, epoch=epoch)
        with self._calling() as stub:
            answer = await stub.Matching(request, timeout=READ_S, metadata=self._peer.metadata)
        return parcels.matches_from(answer)

    async def vectors(self, ids: Sequence[str], *, epoch: int | None = None) -> dict[str, np.ndarray]:
        """The vectors of those documents that are there, float32 [dim], read-only."""
        request = internal.VectorsRequest(replica=self._key, ids=ids, epoch=epoch)
        with self._calling() as stub:
            answer = await stub.Vectors(request, timeout=READ_S, metadata=self._peer.metadata)
        return parcels.vectors_from(answer, self._collection.dim)

    async def close(self) -> None:
        """Ask it nothing more, and have its node close it where that can be reached, unless others ask it."""
        self._away = "it is closing"
        await tasks.end(self._keeping, self._handing)
        await self._searches.close()
        if self._attached:
            return
        try:
            with self._peer.calling() as stub:
                request = internal.CloseRequest(replica=self._key)
                await stub.Close(request, timeout=READ_S, metadata=self._peer.metadata)
        except RingfortError as error:
            log.debug("%s is left open on its node: %s", self._name, error)

    def describe(self) -> Mapping[str, float]:
        """What it said last, in figures."""
        figures = dict.fromkeys(("documents", "segments", "memtable_rows", "pending_rows"), 0.0)
        return {**figures, **self._state.figures, "position": self._position}

    def condition(self) -> tuple[str, str]:
        """What it said last; `away` where it cannot be heard any more."""
        return ("away", self._away) if self._away else (self._state.condition, self._state.detail)

    def segments(self) -> Sequence[SegmentStatus]:
        """What it said last of its segments."""
        return parcels.segments_from(self._state)

    def stats(self) -> Mapping[str, float]:
        """What it said last; gauges of its node's process."""
        return dict(self._state.stats)

    def _begin(self) -> None:
        self._keeping = asyncio.create_task(self._keep(), name=f"keep {self._name}")
        self._handing = asyncio.create_task(self._hand_over(), name=f"offer to {self._name}")

    async def _send(
        self, asked: Asked, queries: Sequence[np.ndarray], deadline: Deadline
    ) -> Sequence[ShardAnswer[RenderedHits]]:
        """One call for many callers' queries."""
        matrix = queries[0] if len(queries) == 1 else np.concatenate(queries)
        request = parcels.search_request(self._key, asked, matrix)
        with self._calling() as stub:
            response = await stub.Search(
                request, timeout=deadline.require(self._name), metadata=self._peer.metadata
            )
        answer = parcels.answer_from(response)
        self._move_to(answer.position)
        answers, at = [], 0
        for rows in map(len, queries):
            answers.append(answer._replace(hits=answer.hits[at : at + rows]))
            at += rows
        return answers

    def _calling(self) -> "AbstractContextManager[ShardNodeAsyncStub]":
        if self._away:
            raise Unavailable(f"{self._name} on {self._peer.name} is away: {self._away}")
        return self._peer.calling()

    async def _ask_slots(
        self, method: str, slots: Sequence[int], *, epoch: int = 0, timeout_s: float = READ_S
    ) -> None:
        request = internal.SlotsRequest(replica=self._key, slots=slots, epoch=epoch)
        with self._calling() as stub:
            answer = await getattr(stub, method)(request, timeout=timeout_s, metadata=self._peer.metadata)
        self._followed = frozenset(answer.followed)

    async def _keep(self) -> None:
        """Hear what the replica says, for as long as it can be heard."""
        while not self.fell.is_set():
            try:
                await self._watch()
            except DeadlineExceeded:
                pass
            except RingfortError as error:
                self._fall(str(error))
            except Exception as error:
                log.exception("%s on %s is not heard", self._name, self._peer.name)
                self._fall(str(error))

    async def _watch(self) -> None:
        """Hear what the replica says, until it falls or its node ends the call."""
        with self._peer.calling() as stub:
            request = internal.WatchRequest(replica=self._key)
            states = stub.Watch(request, timeout=_WATCH_S, metadata=self._peer.metadata)
            try:
                async for state in states:
                    self._hear(state)
                    if state.fell:
                        self._fall(state.detail)
                        return
            finally:
                states.cancel()

    async def _hand_over(self) -> None:
        """Hand committed batches over as they come; those that came while a call was under way together."""
        while True:
            await self._offered.wait()
            self._offered.clear()
            deltas, hinted = list(self._offers), self._hinted
            self._offers.clear()
            self._hinted = False
            if self._away or not (deltas or hinted):
                continue  # what it missed it reads from the log
            offered = [parcels.delta_on_wire(delta) for delta in deltas]
            request = internal.OfferRequest(replica=self._key, deltas=offered)
            try:
                with self._calling() as stub:
                    answer = await stub.Offer(request, timeout=READ_S, metadata=self._peer.metadata)
                self._move_to(answer.position)
            except RingfortError as error:
                log.debug("%s reads the log for itself: %s", self._name, error)
            except Exception:
                log.exception("%s could not be handed what was committed", self._name)

    def _hear(self, state: internal.ReplicaState) -> None:
        if state.full:
            first, self._state = not self._state.full, state
            self._followed = frozenset(state.followed)
            if first:
                self._tell()
        self._move_to(state.position)

    def _move_to(self, position: int) -> None:
        if position > self._position:
            self._position = position
            self._tell()

    def _fall(self, why: str) -> None:
        if not self._away:
            log.warning("%s on %s is away: %s", self._name, self._peer.name, why)
            self._away = why or "it is away"
            self.fell.set()
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
