"""A gateway of a simulated cluster: writes and searches by the map it knows."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from database import SLOTS, Fenced
from network import Process

from shard_router.errors import StaleEpoch, Unavailable
from shard_router.fanout_plan import Ask, GiveUp, ShardQuestion, plan_fanout, stale_pause_s
from shard_router.hashing import slot_of
from shard_router.merge import merge
from shard_router.model import Hit
from shard_router.resharding import Copy
from shard_router.shard_map import MapState

if TYPE_CHECKING:
    from cluster import Cluster

#: How long it waits for a write to be visible.
PATIENCE_S = 2.0


@dataclass
class Found:
    """A search's hits by id, and the slots that were answered for."""

    seqs: Mapping[str, int]
    slots: frozenset[int]
    epoch: int


class Gateway(Process):
    """Writes and searches by the map it knows."""

    def __init__(self, cluster: "Cluster") -> None:
        super().__init__(cluster.rng)
        self._cluster = cluster
        self.coordinator = cluster.coordinator
        self.state: MapState = cluster.database.state

    async def write(self, ids: Sequence[str], *, deletes: bool, visible: bool) -> tuple[int, bool]:
        """The position of the commit, and whether it is visible; Unavailable where that is not known."""
        database = self._cluster.database
        upto, epoch = await self._cluster.ask_database(self, lambda: database.write(ids, deletes))
        if not visible:
            return upto, False
        until_s = self.now() + PATIENCE_S
        while self.state.epoch < epoch:
            if self.now() > until_s:
                return upto, False
            await self.refresh()
        state, slots = self.state, {slot_of(id, SLOTS) for id in ids}
        for copy in self._cluster.copies():
            if slots.intersection(state.followed_by(copy.shard)):
                while not await self._applied(copy, upto):
                    if self.now() > until_s:
                        return upto, False
        return upto, True

    async def _applied(self, copy: Copy, position: int) -> bool:
        replica, limit_s = self._cluster.replicas[copy], self._cluster.conditions.apply_s
        try:
            if await self._cluster.network.call(self, lambda: replica.applied(position), limit_s):
                return True
        except Unavailable:
            pass
        try:
            return not await self._cluster.network.call(self, lambda: self.coordinator.leased(copy))
        except (Unavailable, Fenced):
            self.coordinator = self._cluster.coordinator
            return False

    async def refresh(self) -> None:
        try:
            state = await self._cluster.ask_database(self, self._cluster.database.read_state)
        except Unavailable:
            return
        if state.epoch > self.state.epoch:
            self.state = state

    async def search(self, read_after: int) -> Found:
        """What is found; StaleEpoch where the map goes on changing."""
        attempt = 0
        while True:
            state = self.state
            copies = range(self._cluster.copies_a_shard)
            plan = plan_fanout(
                state.answering, {shard: [0.0 for _ in copies] for shard in state.answering.shards}, self.rng
            )
            try:
                answers = await asyncio.gather(
                    *(self._ask(state, call.shard, call.replica, read_after) for call in plan.calls)
                )
            except StaleEpoch:
                attempt += 1
                if attempt > 20:
                    raise
                await self.refresh()
                await asyncio.sleep(stale_pause_s(attempt))
                continue
            answered = [
                call.shard for call, hits in zip(plan.calls, answers, strict=True) if hits is not None
            ]
            hits = merge([hits for hits in answers if hits is not None], 1000)
            slots = frozenset(slot for shard in answered for slot in state.served_by(shard))
            return Found({hit.id: hit.version.seq for hit in hits}, slots, state.epoch)

    async def _ask(self, state: MapState, shard: int, first: int, read_after: int) -> list[Hit] | None:
        question, number = ShardQuestion(first, [0.0] * self._cluster.copies_a_shard), first
        while True:
            replica = self._cluster.replicas[Copy(shard, number)]
            try:
                hits: list[Hit] = await self._cluster.network.call(
                    self, lambda replica=replica: replica.search(state.epoch, read_after)
                )
                return hits
            except Unavailable:
                match question.failed(number, unavailable=True):
                    case Ask(other):
                        number = other
                    case GiveUp():
                        return None
