"""A further gateway's side of a cluster: follows the head, and knows while it may rely on what it heard.

While its lease holds, every write that was acknowledged as visible is known here, and no copy is asked that
the head does not wait for. Once it is over, nothing kept is exact, and whoever searches first reads from the
database where the log stands; who can reach neither the head nor the database cannot answer, and says so.
"""

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1.siblings_pb2_grpc import SiblingsStub
from services import tasks
from services.cache.watermark import Watermark
from services.deadline import Deadline
from services.gateway.mirror import Mirror
from services.gateway.served import Assure, Served
from services.gateway.siblings import LEASE_S, RENEW_S, REST_S
from services.metadata.store import Store
from services.peers import Peer
from shard_router.errors import DeadlineExceeded, RingfortError, Unavailable

if TYPE_CHECKING:
    from protos.ringfort.internal.v1.siblings_pb2_grpc import SiblingsAsyncStub

log = logging.getLogger(__name__)

#: How soon something is tried again: following, asking for visibility, reaching copies.
_AGAIN_S, _LONGEST_PAUSE_S = 0.1, 1.0
#: How often it is looked whether a copy fell that the head may go on with.
_LOOK_S = 0.25
#: Beats of which it is remembered when they were sent.
_BEATS_MOST = 256
#: How long a search waits for the copies where the lease is over.
_ASSURE_S = 2.0
#: How long the head may take to hear that this gateway leaves.
_LEAVE_S = 1.0


class Following:
    """What the head says, and what of it can be relied on."""

    def __init__(
        self,
        head: str,
        token: str,
        store: Store,
        *,
        clock: Callable[[], float],
        lease_s: float = LEASE_S,
    ) -> None:
        """head: HOST:PORT of its Siblings."""
        self._peer: Peer[SiblingsAsyncStub] = Peer("the head", SiblingsStub, token)
        self._peer.move(head)
        self._store = store
        self._clock, self._lease_s = clock, lease_s
        #: Who this is: a process that takes its place is somebody else.
        self._name = uuid.uuid4().hex
        self._mirror: Mirror
        #: Learns what the registry of models has.
        self._learn: Callable[[], Awaitable[None]]
        self._beat = 0
        #: When the last beats were sent.
        self._sent_s: OrderedDict[int, float] = OrderedDict()
        self._until_s = float("-inf")
        #: By collection.
        self._marks: dict[int, Watermark] = {}
        self._heard = self._settled = 0
        self._registry, self._registry_known = 0, -1
        self._leaving = False
        #: Set when there is something to say to the head, or to be done.
        self._speak, self._work = asyncio.Event(), asyncio.Event()
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lapses = 0

    def begin(self, mirror: Mirror, learn: Callable[[], Awaitable[None]]) -> None:
        """Follow the head from now on; `learn` learns what the registry of models has."""
        self._mirror, self._learn = mirror, learn
        self._tasks = [
            asyncio.create_task(self._follow_on(), name="following"),
            asyncio.create_task(self._settle_on(), name="settling"),
        ]

    async def ready(self, deadline: Deadline) -> None:
        """Return when everything was done that the head said first; Unavailable when it is late."""
        try:
            async with asyncio.timeout(deadline.left_s()):
                await self._ready.wait()
        except TimeoutError:
            raise Unavailable("the head does not say in time what there is") from None

    async def close(self) -> None:
        """Give the lease back, where the head can be reached, and follow no more."""
        self._until_s = float("-inf")
        self._leaving = True
        self._speak.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=_LEAVE_S)
        await tasks.end(*self._tasks)
        await self._peer.close()

    @property
    def leased(self) -> bool:
        """Whether what was heard can be relied on."""
        return self._clock() < self._until_s

    def known(self, served: Served) -> Mapping[str, int] | None:
        """log_id -> the position that an exact answer has to include; None where nobody here can say."""
        mark = self._marks.get(served.collection.uid)
        known = None if mark is None else mark.known(self._clock())
        here = served.positions
        if known is None or known.keys() != here.keys():
            return None
        return {log_id: max(known[log_id], position) for log_id, position in here.items()}

    def assure(self, served: Served) -> Assure:
        """Makes sure, before a collection's copies are asked, that they have what was told to be visible."""

        async def assure(deadline: Deadline) -> None:
            if self._clock() < self._until_s:
                return
            positions = await self._store.positions(served.collection)
            served.look()
            within = Deadline(min(deadline.at_s, deadline.clock() + _ASSURE_S), deadline.clock)
            copies = list(served.copies())
            waits = (replica.wait_for(positions[copy.database], within) for copy, replica in copies)
            reached = await asyncio.gather(*waits)
            if not all(
                had or replica.fell.is_set() for (_, replica), had in zip(copies, reached, strict=True)
            ):
                raise Unavailable("the head cannot be heard, and a copy has not all that may be visible")

        return assure

    async def visible(self, served: Served, positions: Mapping[str, int], deadline: Deadline) -> bool:
        """See `Siblings.visible`: the head is asked, again and again while it is away."""
        deadline = Deadline(deadline.at_s - REST_S, deadline.clock)
        request = internal.VisibleRequest(collection=served.collection.uid, positions=positions)
        while (left_s := deadline.left_s()) > 0:
            try:
                with self._peer.calling() as stub:
                    return (await stub.Visible(request, timeout=left_s, metadata=self._peer.metadata)).visible
            except Unavailable:
                await asyncio.sleep(min(_AGAIN_S, left_s))
            except DeadlineExceeded:
                break
        return False

    async def hand_on(
        self, service: str, method: str, tenant: str, request: bytes, deadline: Deadline
    ) -> bytes:
        """What the head answers a call with that it alone carries out."""
        message = internal.HandOnRequest(service=service, method=method, tenant=tenant, request=request)
        with self._peer.calling() as stub:
            answer = await stub.HandOn(
                message, timeout=deadline.require("the head"), metadata=self._peer.metadata
            )
        return bytes(answer.response)

    async def load(self, model: str, deadline: Deadline) -> None:
        """Have the head run a model's processes."""
        with self._peer.calling() as stub:
            await stub.Load(
                internal.LoadRequest(model=model),
                timeout=deadline.require("loading the model"),
                metadata=self._peer.metadata,
            )

    def stats(self) -> dict[str, float]:
        """Whether it holds a lease, and how often it lost one."""
        return {"leased": float(self.leased), "lapses_total": float(self._lapses)}

    async def _follow_on(self) -> None:
        """Follow, and again whenever that ended, until this gateway leaves."""
        told_s = float("-inf")
        while not self._leaving:
            try:
                await self._follow()
            except RingfortError as error:
                if self._clock() - told_s > self._lease_s:
                    told_s = self._clock()
                    log.warning("the head cannot be followed: %s", error)
            except Exception:
                log.exception("the head cannot be followed")
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self) -> None:
        with self._peer.calling() as stub:
            told = stub.Follow(self._beats(), metadata=self._peer.metadata)
            try:
                async for each in told:
                    self._hear(each)
            finally:
                told.cancel()

    async def _beats(self) -> AsyncIterator[internal.FollowRequest]:
        """What is said to the head: at once where there is something to say, and now and then."""
        while True:
            self._speak.clear()
            leaving = self._leaving
            self._beat += 1
            # Before it is sent: the lease counts from here.
            self._sent_s[self._beat] = self._clock()
            while len(self._sent_s) > _BEATS_MOST:
                self._sent_s.popitem(last=False)
            yield internal.FollowRequest(
                gateway=self._name, beat=self._beat, heard=self._heard, settled=self._settled, leaving=leaving
            )
            if leaving:
                return
            try:
                async with asyncio.timeout(RENEW_S):
                    await self._speak.wait()
            except TimeoutError:
                pass

    def _hear(self, told: internal.News) -> None:
        """Go by news. It renews the lease, from when the beat was sent that it answers."""
        sent_s = self._sent_s.get(told.beat)
        if sent_s is None or self._leaving:
            return
        self._mirror.hear(told)
        if told.whole:
            self._registry_known = -1
            here = {each.collection for each in told.collections}
            self._marks = {uid: mark for uid, mark in self._marks.items() if uid in here}
        moved = {each.collection: each.positions for each in told.collections}
        for uid, positions in moved.items():
            mark = self._marks.get(uid)
            if mark is None or mark.positions.keys() != positions.keys():
                # Of other logs: news come in order, so what was told of the former ones is over.
                self._marks[uid] = Watermark(self._lease_s)
            self._marks[uid].renewed(sent_s, dict(positions))
        for uid, mark in self._marks.items():
            if uid not in moved:
                mark.renewed(sent_s, mark.positions)
        if not self.leased:
            self._lapses += self._ready.is_set()
        self._until_s = max(self._until_s, sent_s + self._lease_s)
        if told.registry != self._registry:
            self._registry, self._registry_known = told.registry, -1
        if told.version != self._heard:
            self._heard = told.version
            self._speak.set()
            self._work.set()

    async def _settle_on(self) -> None:
        """Do what the news ask for, again and again until it is done; and look after copies that fall."""
        pause_s = _LOOK_S
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._work.wait()
            except TimeoutError:
                if self._settled == self._heard and self._mirror.settled:
                    pause_s = _LOOK_S
                    continue
            pause_s = _AGAIN_S if self._work.is_set() else min(2 * pause_s, _LONGEST_PAUSE_S)
            self._work.clear()
            version = self._heard
            try:
                if self._registry_known != self._registry:
                    registry = self._registry
                    await self._learn()
                    self._registry_known = registry
                await self._mirror.settle()
            except Exception as error:
                known = isinstance(error, RingfortError | OSError)
                log.warning("news cannot be settled yet: %s", error, exc_info=not known)
                continue
            if version > self._settled:
                self._settled = version
                self._speak.set()
            self._ready.set()
