"""A copy of a shard in a simulated cluster: it follows the log, holds a lease, and answers for its slots."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from database import SLOTS, Fenced
from network import FOLLOW_S, Process

from services.shard.holdings import Holdings
from shard_router.errors import Unavailable
from shard_router.hashing import slot_of
from shard_router.leases import HeldLease
from shard_router.model import Hit, Version
from shard_router.resharding import Copy
from shard_router.shard_map import MapState

if TYPE_CHECKING:
    from cluster import Cluster
    from coordinator import Coordinator

LEASE_S = 0.5


class Replica(Process):
    """One copy of a shard, in memory only: a crash loses all of it."""

    def __init__(self, copy: Copy, cluster: "Cluster") -> None:
        super().__init__(cluster.rng)
        self.copy, self._cluster = copy, cluster
        #: Whom it takes for the coordinator, which somebody else may be by now.
        self.coordinator = cluster.coordinator
        self._cut_off_until_s, self._cut_off_from = 0.0, self.coordinator
        self.start()

    def start(self) -> None:
        self.rows: dict[str, int] = {}
        #: While anything is backfilled: what was deleted meanwhile.
        self.deleted: set[str] = set()
        self.backfilling = 0
        self.holdings = Holdings(SLOTS, (), 0)
        self.lease = HeldLease(LEASE_S)
        self.cursor = self.position = 0
        self.state: MapState | None = None
        self.spawn(self._follow())
        self.spawn(self._renew())

    def cut_off(self, seconds: float) -> None:
        """The coordinator that is one now and it do not reach each other for so long; everybody else does."""
        self._cut_off_until_s = asyncio.get_running_loop().time() + seconds
        self._cut_off_from = self._cluster.coordinator

    async def reached(self, coordinator: "Coordinator", work: Callable[[], Awaitable[Any]]) -> Any:
        """What it and a coordinator have to say to each other."""
        cut_off = asyncio.get_running_loop().time() < self._cut_off_until_s
        if cut_off and coordinator is self._cut_off_from:
            raise Unavailable("cut off")
        return await work()

    async def search(self, epoch: int, read_after: int) -> list[Hit]:
        await self.awake()
        if not await self.applied(read_after):
            raise Unavailable("behind")
        if not self.lease.may_answer(self.now()):
            raise Unavailable("no lease")
        self.holdings.require(epoch)
        served = self.holdings.served
        return [Hit(id, 1.0, Version(1, seq)) for id, seq in self.rows.items() if served[slot_of(id, SLOTS)]]

    async def applied(self, position: int) -> bool:
        await self.awake()
        for _ in range(20):
            if self.position >= position:
                return True
            await asyncio.sleep(FOLLOW_S / 2)
            await self.awake()
        return False

    async def hear(self, state: MapState) -> bool:
        """Whether this copy answers as that state wants it to."""
        await self.awake()
        return self.settle(state)

    def settle(self, state: MapState) -> bool:
        if self.state is not None and state.epoch < self.state.epoch:
            return True
        try:
            self.holdings.serve(state.epoch, state.served_by(self.copy.shard))
        except ValueError:
            return False
        self.state = state
        self.drop(set(range(SLOTS)).difference(state.followed_by(self.copy.shard)))
        return True

    def drop(self, slots: set[int]) -> None:
        self.holdings.release(sorted(slots))
        self.rows = {id: seq for id, seq in self.rows.items() if slot_of(id, SLOTS) not in slots}
        self.deleted = {id for id in self.deleted if slot_of(id, SLOTS) not in slots}

    async def backfill(self, slots: Sequence[int]) -> None:
        await self.awake()
        life, wanted = self.life, self.holdings.follow(slots)
        if not wanted:
            return
        begun, after, ends = self.holdings.changes, 0, False
        self.backfilling += 1
        while not ends:
            try:
                page, after, ends = await self._cluster.ask_database(
                    self, lambda after=after: self._cluster.database.tail(after, wanted)
                )
            except Unavailable:
                continue
            await asyncio.sleep(self.rng.uniform(0, self._cluster.conditions.page_s))
            await self.awake(life)
            if not self.holdings.kept(wanted, begun):
                break
            for id, row in page:
                here = id in self.rows or id in self.deleted or not self.holdings.followed[slot_of(id, SLOTS)]
                if not row.deleted and not here:
                    self.rows[id] = row.seq
        else:
            self.holdings.complete(wanted)
        self.backfilling -= 1
        if not self.backfilling:
            self.deleted.clear()

    async def _follow(self) -> None:
        life = self.life
        while True:
            changes, cursor, slots = self.holdings.changes, self.cursor, self.holdings.slots_followed()
            await asyncio.sleep(self.rng.uniform(0, self._cluster.conditions.queue_s))
            try:
                page, upto, ends = await self._cluster.ask_database(
                    self, lambda cursor=cursor, slots=slots: self._cluster.database.tail(cursor, slots)
                )
            except Unavailable:
                continue
            await self.awake(life)
            if changes != self.holdings.changes:
                continue
            for id, row in page:
                if row.deleted:
                    self.rows.pop(id, None)
                    if self.backfilling:
                        self.deleted.add(id)
                else:
                    self.rows[id] = row.seq
            self.cursor = upto
            if ends:
                self.position = upto
                self.lease.caught_up(upto)
                # Now and then somebody lags behind.
                conditions = self._cluster.conditions
                lags = self.rng.random() < conditions.lags
                await asyncio.sleep(self.rng.uniform(0, conditions.lag_s if lags else 2 * FOLLOW_S))

    async def _renew(self) -> None:
        life = self.life
        while True:
            sent_s = self.now()
            try:
                position, state = await self._cluster.network.call(
                    self, lambda: self.reached(self.coordinator, lambda: self.coordinator.renew(self.copy))
                )
            except (Unavailable, Fenced):
                self.coordinator = self._cluster.coordinator
                await asyncio.sleep(FOLLOW_S)
                continue
            await self.awake(life)
            # Whoever cannot answer as the map wants gets no lease from knowing of it: it catches up first.
            await self.backfill(state.served_by(self.copy.shard))
            if self.settle(state):
                self.lease.renewed(sent_s, self.now(), position)
                self.lease.caught_up(self.position)
                await asyncio.sleep(LEASE_S / 3)
