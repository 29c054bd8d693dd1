"""A cluster without I/O: a database, copies of shards, gateways and a coordinator on a bad network.

What they decide by are the pure modules that the service decides by: the states of the shard map, the
resharding machine, holdings, leases, the fan-out plan and the merge. Clocks run at speeds of their own;
processes crash and pause; messages are late, overtake each other and are lost.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from coordinator import Coordinator
from database import SLOTS, Database
from network import Conditions, Network, Process
from replica import Replica
from shard_gateway import Gateway

from shard_router.hashing import slot_of
from shard_router.resharding import Copy
from shard_router.shard_map import Migrating, Retiring, Steady


@dataclass
class Cluster:
    """All of it, and what is wished of it."""

    rng: random.Random
    shards: int
    copies_a_shard: int
    #: Shards that may ever be.
    most_shards: int
    conditions: Conditions
    changes: int = 0
    #: Whether one change follows upon another.
    restless: bool = True

    def __post_init__(self) -> None:
        self.network = Network(self.rng, self.conditions)
        self.database = Database(self.shards)
        self.replicas: dict[Copy, Replica] = {}
        self.coordinator = Coordinator(self)
        for shard in range(self.most_shards):
            for number in range(self.copies_a_shard):
                copy = Copy(shard, number)
                self.replicas[copy] = Replica(copy, self)
        self.gateways = [Gateway(self) for _ in range(2)]

    def copies(self) -> list[Copy]:
        """Every copy there is, whether its shard has slots or not."""
        return [Copy(s, n) for s in range(self.most_shards) for n in range(self.copies_a_shard)]

    def moving(self, id: str) -> bool:
        """Whether a document's slot is changing owners."""
        state = self.database.state
        return isinstance(state, Migrating | Retiring) and any(
            slot_of(id, SLOTS) in slots for slots in state.gains.values()
        )

    def wish(self, state: Steady) -> Migrating | None:
        """The next change that is asked for."""
        if not self.restless:
            return None
        unused = [shard for shard in range(self.most_shards) if shard not in state.shards]
        if len(state.shards) == 1 or (unused and self.rng.random() < 0.5):
            return state.migrate(lambda shard_map: shard_map.add_shard(unused[0]))
        drained = self.rng.choice(state.shards)
        return state.migrate(lambda shard_map: shard_map.drain_shard(drained))

    async def ask_database(self, caller: Process, work: Callable[[], Awaitable[Any]]) -> Any:
        return await self.network.call(caller, work)

    def crash_copy(self, copy: Copy) -> None:
        self.replicas[copy].crash()
        self.replicas[copy].start()

    def cut_off(self, share: float) -> None:
        """Cut about so many of the copies off from the coordinator, for a while."""
        for replica in self.replicas.values():
            if self.rng.random() < share:
                replica.cut_off(self.rng.uniform(0.2, 1.0))

    def take_over(self) -> None:
        """Another coordinator is sure that this one is dead, which it is now or later."""
        before, self.coordinator = self.coordinator, Coordinator(self)
        self.cut_off(0.5)
        if self.rng.random() < 0.5:
            before.crash()
        else:
            asyncio.get_running_loop().call_later(self.rng.uniform(0.5, 3.0), before.crash)
