"""The head's side of a cluster with several gateways: tells the others what there is, and waits for them.

All that a gateway goes by has a version that grows: the positions of logs that were told to be visible, who
answers for which slot, which copies may be asked, which models there are. News goes to every gateway in
order, on one call, and each news renews its lease; so whoever has heard of a version has heard of all before.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from protos.ringfort.internal import v1 as internal
from services import tasks
from services.deadline import Deadline
from services.gateway import news
from services.gateway.catalog import Catalog
from services.gateway.endpoints import ShardEndpoint
from services.gateway.holders import Holders
from services.gateway.served import Served
from shard_router.errors import InvalidField
from shard_router.model import Collection
from shard_router.resharding import Copy
from shard_router.shard_map import MapState

log = logging.getLogger(__name__)

#: How long a gateway may rely on what it heard, and how often it renews that.
LEASE_S, RENEW_S = 3.0, 0.5
#: Kept of a caller's time to answer in, where it is waited for gateways.
REST_S = 0.05
#: How long a change of what there is waits for gateways to have carried it out.
SETTLE_S = 5.0

#: Carries out a call that was handed on: service, method, tenant, request.
CarryOut = Callable[[str, str, str, bytes, Deadline], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A generation, as it was when it was last told of."""

    collection: Collection
    state: MapState
    #: The copies that may be asked.
    copies: dict[Copy, ShardEndpoint]
    logs: frozenset[str]

    @classmethod
    def of(cls, served: Served) -> "_Seen":
        """As it is now."""
        copies = {copy: replica for copy, replica in served.copies() if not replica.fell.is_set()}
        return cls(served.collection, served.state, copies, frozenset(served.positions))

    def is_still(self, other: "_Seen") -> bool:
        """Whether nothing has changed but, perhaps, positions."""
        same = self.collection is other.collection and self.state is other.state
        return same and self.copies == other.copies and self.logs == other.logs


@dataclass(slots=True)
class _Told:
    """What was last told of a collection, and in which version."""

    live: _Seen
    beside: _Seen | None
    #: All of that as messages, and the version that told of it.
    shape: internal.Shape
    beside_shape: internal.Shape | None
    shaped: int
    #: By log, what was told to be visible, and the version that told of it last.
    positions: dict[str, int]
    moved: int

    def is_still(self, live: _Seen, beside: _Seen | None) -> bool:
        """Whether nothing has changed but, perhaps, positions."""
        if self.beside is None or beside is None:
            return self.live.is_still(live) and self.beside is beside
        return self.live.is_still(live) and self.beside.is_still(beside)


class Siblings:
    """The service Siblings of protos/ringfort/internal."""

    def __init__(
        self,
        catalog: Catalog,
        carry_out: CarryOut,
        load: Callable[[str, Deadline], Awaitable[None]],
        *,
        clock: Callable[[], float],
        lease_s: float = LEASE_S,
    ) -> None:
        """`carry_out` does what is handed on; `load` has a model, by NAME@VERSION, running."""
        self._catalog = catalog
        self._carry_out, self._load = carry_out, load
        self._clock = clock
        self._holders = Holders(lease_s, clock())
        self._version = 1
        #: News that begin before this version have to tell everything, for something has gone.
        self._whole = 1
        self._told: dict[int, _Told] = {}
        self._log_id = ""
        self._registry = 0
        #: Counts the copies that were opened, and by collection the numbers of those that may be asked.
        self._opened = 0
        self._numbers: dict[int, dict[ShardEndpoint, int]] = {}
        #: Set, and replaced, whenever there is something to tell, or somebody said something.
        self._news, self._said = asyncio.Event(), asyncio.Event()
        #: Those whose copies are listened to.
        self._listening: set[Served] = set()
        self._changed = asyncio.Event()
        self._looking = asyncio.create_task(self._look_on(), name="siblings")
        self._waits = self._lapsed_waits = 0
        catalog.share(self.settled)

    async def close(self) -> None:
        """Tell nobody anything any more."""
        await tasks.end(self._looking)

    async def Follow(
        self, requests: AsyncIterator[internal.FollowRequest], deadline: Deadline
    ) -> AsyncIterator[internal.News]:
        """Tell the caller everything, and then what changes, until its call ends."""
        first = await anext(requests)
        if not first.gateway:
            raise InvalidField("gateway", "is missing")
        heard = _Heard(first, self._clock())
        listening = asyncio.ensure_future(self._listen(first.gateway, requests, heard))
        sent, granted_s = 0, float("-inf")
        try:
            while not listening.done():
                coming = self._news
                now_s = self._clock()
                # What it says between its beats needs no answer of its own.
                if self._version > sent or now_s - granted_s >= RENEW_S / 2:
                    self._look()
                    told = self._since(sent)
                    told.beat = heard.beat
                    sent, granted_s = told.version, now_s
                    # From here on it is waited for, before it can rely on that.
                    self._holders.grant(first.gateway, heard.came_s, now_s)
                    yield told
                    continue
                waiting = [asyncio.ensure_future(each.wait()) for each in (coming, heard.beaten)]
                await asyncio.wait((listening, *waiting), return_when=asyncio.FIRST_COMPLETED)
                heard.beaten.clear()
                await tasks.end(*waiting)
            listening.result()
        finally:
            await tasks.end(listening)

    async def Visible(self, request: internal.VisibleRequest, deadline: Deadline) -> internal.VisibleResponse:
        """See `visible`; not so where the collection is not there, or another log of it."""
        served = self._catalog.of(request.collection)
        if served is None:
            return internal.VisibleResponse()
        return internal.VisibleResponse(visible=await self.visible(served, dict(request.positions), deadline))

    async def HandOn(self, request: internal.HandOnRequest, deadline: Deadline) -> internal.HandOnResponse:
        """Carry out what another gateway was asked for."""
        return internal.HandOnResponse(
            response=await self._carry_out(
                request.service, request.method, request.tenant, request.request, deadline
            )
        )

    async def Load(self, request: internal.LoadRequest, deadline: Deadline) -> internal.LoadResponse:
        """Have processes of a model running; the errors of `Models.embed`."""
        await self._load(request.model, deadline)
        return internal.LoadResponse()

    async def visible(self, served: Served, positions: Mapping[str, int], deadline: Deadline) -> bool:
        """Whether, before the deadline, every read that begins anywhere sees all up to `positions` (by log).

        Every copy that may be asked has applied it, and every gateway that holds a lease knows of it, and of
        the copies that may not be asked any more.
        """
        deadline = Deadline(deadline.at_s - REST_S, deadline.clock)
        while True:
            now = self._catalog.of(served.collection.uid)
            if now is None:
                return False
            # Before anything is waited for: a copy that joins from now on has it.
            now.heard(positions)
            if not self._move(now, positions) or not await now.wait_for(positions, deadline):
                return False
            if self._is_served(now):
                break  # else it was dropped, or another generation is live, which has what was written before
        # In the same turn of the event loop: who fell was not waited for, and may not be asked by anybody.
        self._look_at(now)
        told = self._told[now.collection.uid]
        return await self._heard_by_all(max(told.moved, told.shaped), deadline)

    async def settled(self) -> None:
        """Return when everybody goes by what there is now and has done what that asks for.

        Whoever does not go by it before its lease is over is not waited for; whoever goes by it and cannot
        do what it asks for is given up after a while.
        """
        self._look()
        version = self._version
        await self._heard_by_all(version, Deadline.after(float("inf"), self._clock))
        if not await self._heard_by_all(version, Deadline.after(SETTLE_S, self._clock), settled=True):
            log.warning("a gateway has not carried out yet what has changed")

    async def registry_changed(self) -> None:
        """The registry of models has changed; returns when everybody knows."""
        self._registry += 1
        self._tell()
        await self.settled()

    def leased(self) -> set[str]:
        """The gateways that hold a lease."""
        return self._holders.leased(self._clock())

    def stats(self) -> dict[str, float]:
        """Gateways beside this one, and how writes waited for them."""
        return {
            "leased": float(len(self.leased())),
            "waits_total": float(self._waits),
            "waits_for_a_lapse_total": float(self._lapsed_waits),
        }

    async def _heard_by_all(self, version: int, deadline: Deadline, *, settled: bool = False) -> bool:
        """Whether before the deadline everybody who holds a lease has heard of a version."""
        self._waits += 1
        while True:
            said, now_s = self._said, self._clock()
            until_s = self._holders.wait_until_s(version, now_s, settled=settled)
            if until_s is None:
                return True
            left_s = deadline.left_s()
            if left_s <= 0:
                return False
            try:
                async with asyncio.timeout(min(left_s, until_s - now_s)):
                    await said.wait()
            except TimeoutError:
                self._lapsed_waits += until_s - now_s <= left_s

    async def _listen(
        self, gateway: str, requests: AsyncIterator[internal.FollowRequest], heard: "_Heard"
    ) -> None:
        async for request in requests:
            if request.leaving:
                self._holders.leave(gateway)
                self._speak()
                return
            self._holders.heard(gateway, request.heard, request.settled)
            heard.beat, heard.came_s = request.beat, self._clock()
            heard.beaten.set()
            self._speak()

    def _speak(self) -> None:
        said, self._said = self._said, asyncio.Event()
        said.set()

    def _tell(self) -> int:
        """Something has changed: the version that tells of it."""
        self._version += 1
        coming, self._news = self._news, asyncio.Event()
        coming.set()
        return self._version

    def _is_served(self, served: Served) -> bool:
        """Whether it was not dropped meanwhile, nor opened anew."""
        return self._catalog.of(served.collection.uid) is served

    def _move(self, served: Served, positions: Mapping[str, int]) -> bool:
        """Tell of these positions, where they are news; False where they are of no meaning any more."""
        if not self._is_served(served):
            return False
        self._look_at(served)
        told = self._told[served.collection.uid]
        if not positions.keys() <= told.positions.keys():
            return False
        news = {log_id: at for log_id, at in positions.items() if at > told.positions[log_id]}
        if news:
            told.positions |= news
            told.moved = self._tell()
        return True

    def _look(self) -> None:
        """Find what has changed since it was last told."""
        here = {served.collection.uid: served for served in self._catalog.all()}
        if self._log_id != self._catalog.log_id:
            self._log_id = self._catalog.log_id
            self._tell()
        gone = self._told.keys() - here.keys()
        if gone:
            for uid in gone:
                del self._told[uid]
                del self._numbers[uid]
            self._whole = self._tell()
        beside = {uid: self._catalog.beside(uid) for uid in here}
        every = {*here.values(), *(each for each in beside.values() if each is not None)}
        self._listening &= every
        for served in every - self._listening:
            self._listening.add(served)
            served.on_copy.append(lambda _, __: self._changed.set())
        for served in here.values():
            self._look_at(served)

    def _look_at(self, served: Served) -> None:
        uid = served.collection.uid
        told, other = self._told.get(uid), self._catalog.beside(uid)
        live, beside = _Seen.of(served), None if other is None else _Seen.of(other)
        if told is not None and told.is_still(live, beside):
            return
        known_numbers, numbers = self._numbers.get(uid, {}), dict[ShardEndpoint, int]()
        for seen in (live, beside):
            for replica in () if seen is None else seen.copies.values():
                if replica not in known_numbers:
                    self._opened += 1
                numbers[replica] = known_numbers.get(replica, self._opened)
        self._numbers[uid] = numbers
        known: Mapping[str, int] = {} if told is None else told.positions
        # All that was visible before anybody was told of anything.
        positions = {log_id: known.get(log_id, at) for log_id, at in served.positions.items()}
        moved = version = self._tell()
        if told is not None and known.keys() == positions.keys():
            moved = told.moved
        self._told[uid] = _Told(
            live,
            beside,
            _shape(served, live, numbers),
            None if other is None or beside is None else _shape(other, beside, numbers),
            version,
            positions,
            moved,
        )

    def _since(self, version: int) -> internal.News:
        """All that has changed since a version."""
        whole = version < self._whole
        return internal.News(
            version=self._version,
            log_id=self._log_id,
            whole=whole,
            registry=self._registry,
            collections=[
                internal.CollectionNews(
                    collection=uid,
                    positions=told.positions,
                    shape=told.shape if whole or told.shaped > version else None,
                    beside=told.beside_shape if whole or told.shaped > version else None,
                )
                for uid, told in self._told.items()
                if whole or max(told.shaped, told.moved) > version
            ],
        )

    async def _look_on(self) -> None:
        """Tell of copies that join and leave as soon as they do."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                self._look()
            except Exception:
                log.exception("what has changed cannot be told to other gateways")


def _shape(served: Served, seen: _Seen, numbers: Mapping[ShardEndpoint, int]) -> internal.Shape:
    return news.shape_of(served, {copy: numbers[replica] for copy, replica in seen.copies.items()})


class _Heard:
    """What a gateway has sent last."""

    def __init__(self, first: internal.FollowRequest, came_s: float) -> None:
        self.beat, self.came_s = first.beat, came_s
        self.beaten = asyncio.Event()
