"""Whatever crashes, pauses and gets lost while shards come and go: acknowledged is acknowledged.

Each seed is a schedule of its own, and the same seed the same schedule: `SEED=17` runs that one alone,
`SEEDS=5000` so many.
"""

import asyncio
import os
import random
from dataclasses import dataclass, field, replace

import pytest
from broken_rules import FOUND_BY, Break
from cluster import Cluster
from database import SLOTS
from network import Conditions
from shard_gateway import Gateway
from virtual_loop import run

from shard_router.errors import StaleEpoch, Unavailable
from shard_router.hashing import slot_of
from shard_router.shard_map import Steady

SEEDS = int(os.environ.get("SEEDS", "60"))
LENGTH_S, CLIENTS = 8.0, 9


@dataclass
class Known:
    """What its one writer was promised of a document."""

    #: The last write acknowledged as visible.
    seq: int = 0
    deleted: bool = True
    #: Whether something else may have become of it since, and whether that may be a delete.
    unsure: bool = False
    may_be_deleted: bool = False
    #: Grows with every write that is begun.
    writes: int = 0


@dataclass
class World:
    """A schedule: clients who check what they are told, and chaos."""

    seed: int
    known: dict[str, Known] = field(default_factory=dict)
    #: The latest version of each document that a search has found.
    seen: dict[str, int] = field(default_factory=dict)
    searches: int = 0
    whole: int = 0
    visible: int = 0
    ends: bool = False

    async def play(self) -> Cluster:
        self.rng = random.Random(self.seed)
        shards, copies, most_shards = self.rng.randint(1, 2), self.rng.randint(1, 2), self.rng.randint(2, 3)
        self.cluster = Cluster(self.rng, shards, copies, most_shards, Conditions.drawn(self.rng))
        clients = [asyncio.ensure_future(self._write(n)) for n in range(CLIENTS)]
        clients += [asyncio.ensure_future(self._search()) for _ in range(3)]
        chaos = asyncio.ensure_future(self._chaos())
        await asyncio.sleep(LENGTH_S)
        self.ends = True
        self.cluster.restless = False
        chaos.cancel()
        await asyncio.gather(*clients)
        await self._settled()
        return self.cluster

    def _writing(self) -> Gateway:
        gateways = self.cluster.gateways
        return gateways[0] if self.cluster.conditions.apart else self.rng.choice(gateways)

    def _reading(self) -> Gateway:
        gateways = self.cluster.gateways
        return gateways[1] if self.cluster.conditions.apart else self.rng.choice(gateways)

    async def _write(self, client: int) -> None:
        ids = [f"{client}-{n}" for n in range(5)]
        for id in ids:
            self.known[id] = Known()
        while not self.ends:
            # Where something is going on, above all.
            moving = [id for id in ids if self.cluster.moving(id)]
            id = self.rng.choice(moving if moving and self.rng.random() < 0.5 else ids)
            known, deletes, visible = self.known[id], self.rng.random() < 0.35, self.rng.random() < 0.85
            known.writes += 1
            known.unsure, known.may_be_deleted = True, known.may_be_deleted or deletes
            try:
                seq, seen = await self._writing().write([id], deletes=deletes, visible=visible)
            except (Unavailable, asyncio.CancelledError):
                # It may still arrive; after a while nothing is on its way any more, and the truth tells.
                await asyncio.sleep(1.0)
                row = self.cluster.database.rows.get(id)
                seq, deletes, seen = (row.seq, row.deleted, False) if row else (0, True, False)
            if not seen and seq:
                seen = await self._read_own(id, seq, deletes)
            if seen:
                self.visible += 1
                self.known[id] = Known(seq, deletes, writes=known.writes)
                await self._look()
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    async def _read_own(self, id: str, seq: int, deleted: bool) -> bool:
        """A read after the write's token shows it; whether there was one."""
        for _ in range(3):
            try:
                found = await self._reading().search(seq)
            except (Unavailable, StaleEpoch, asyncio.CancelledError):
                continue
            if slot_of(id, SLOTS) in found.slots:
                expected = None if deleted else seq
                assert found.seqs.get(id) == expected, f"{id} at {seq} is not read by its own writer"
        # It is not visible to everybody for that.
        return False

    async def _search(self) -> None:
        while not self.ends:
            await self._look()
            await asyncio.sleep(self.rng.uniform(0, 0.03))

    async def _look(self) -> None:
        """A search, which finds whatever was visible before it began."""
        before, seen = {id: replace(known) for id, known in self.known.items()}, dict(self.seen)
        passed = dict(self.cluster.database.passed)
        try:
            found = await self._reading().search(0)
        except (Unavailable, StaleEpoch, asyncio.CancelledError):
            await asyncio.sleep(0.01)
            return
        self.searches += 1
        self.whole += len(found.slots) == SLOTS
        for id, known in before.items():
            seq = found.seqs.get(id)
            if known.writes != self.known[id].writes or known.unsure:
                unsure = True
                may_be_deleted = known.may_be_deleted or self.known[id].may_be_deleted
                may_be_deleted = may_be_deleted or known.writes + 1 < self.known[id].writes
                may_be_deleted = may_be_deleted or self.known[id].deleted
            else:
                unsure = may_be_deleted = False
            answered = slot_of(id, SLOTS) in found.slots
            self._judge(id, known, seq, unsure, may_be_deleted, answered)
            # Who answers first stands anywhere; its successor no earlier than it was waited for.
            if answered:
                position, since = passed.get(slot_of(id, SLOTS), (0, 0))
                gone = seq is None and (known.deleted or may_be_deleted)
                again = gone or (seq or 0) >= seen.get(id, 0)
                kept = again or found.epoch < since or seen[id] > position
                assert kept, f"{id}, seen at {seen[id]}, is found at {seq}"
                self.seen[id] = max(self.seen.get(id, 0), seq or 0)

    def _judge(
        self, id: str, known: Known, seq: int | None, unsure: bool, may_be_deleted: bool, answered: bool
    ) -> None:
        told = f"{id}, last visible at {known.seq}"
        if seq is None:
            if answered and not known.deleted:
                assert may_be_deleted, f"{told}, is missed"
        elif known.deleted:
            found_later = unsure and seq > known.seq
            assert found_later, f"{told} as deleted, is found at {seq}"
        else:
            assert seq == known.seq or (unsure and seq > known.seq), f"{told}, is found at {seq}"

    async def _chaos(self) -> None:
        cluster = self.cluster
        while True:
            await asyncio.sleep(self.rng.expovariate(cluster.conditions.chaos))
            match self.rng.randrange(10):
                case 0 | 1:
                    cluster.crash_copy(self.rng.choice(cluster.copies()))
                case 2 | 3:
                    cluster.replicas[self.rng.choice(cluster.copies())].pause(self.rng.uniform(0.1, 1.5))
                case 4:
                    cluster.take_over()
                case 5:
                    cluster.coordinator.pause(self.rng.uniform(0.1, 1.0))
                case 6:
                    gateway = self.rng.choice(cluster.gateways)
                    gateway.crash()
                    if self.rng.random() < 0.5:
                        gateway.pause(self.rng.uniform(0.1, 1.0))
                case 7 | 8:
                    cluster.cut_off(0.3)
                case 9:
                    cluster.coordinator.cancel()

    async def _settled(self) -> None:
        """When nothing fails any more, everything comes to rest, and the whole truth is found."""
        cluster = self.cluster
        cluster.conditions.lost = cluster.conditions.late = cluster.conditions.disturbed = 0.0
        async with asyncio.timeout(60):
            while not isinstance(cluster.database.state, Steady):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            # Late writes of clients that have given up, and who still has to catch up.
            await asyncio.sleep(1.0)
            gateway = cluster.gateways[0]
            await gateway.refresh()
            found = await gateway.search(cluster.database.counter)
            while len(found.slots) < SLOTS:
                await asyncio.sleep(0.1)
                found = await gateway.search(cluster.database.counter)
        truth = {id: row.seq for id, row in cluster.database.rows.items() if not row.deleted}
        assert found.seqs == truth
        sizes = [len(cluster.database.state.served_by(shard)) for shard in cluster.database.state.shards]
        assert max(sizes) - min(sizes) <= 1
        for id, known in self.known.items():
            assert known.seq <= (cluster.database.rows[id].seq if known.seq else 0)


def played(seed: int) -> World:
    world = World(seed)
    try:
        run(world.play())
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"SEED={seed}: {error}") from error
    return world


def seeds() -> range | list[int]:
    return [int(os.environ["SEED"])] if "SEED" in os.environ else range(SEEDS)


def test_nothing_acknowledged_is_lost_missed_or_resurrected() -> None:
    worlds = [played(seed) for seed in seeds()]
    if len(worlds) >= 50:
        # Not because nothing happened.
        assert sum(world.whole for world in worlds) > 10 * len(worlds)
        assert sum(world.visible for world in worlds) > 4 * len(worlds)
        assert sum(world.cluster.changes for world in worlds) > len(worlds) / 2


def test_a_seed_is_the_same_schedule_every_time() -> None:
    def told(seed: int) -> tuple[object, ...]:
        world = played(seed)
        return world.searches, world.visible, world.cluster.database.counter, world.known

    assert told(3) == told(3) != told(4)


@pytest.mark.parametrize("broken", FOUND_BY)
def test_a_broken_rule_is_found(broken: Break) -> None:
    with pytest.MonkeyPatch.context() as patched:
        broken(patched)
        with pytest.raises(AssertionError, match="SEED="):
            [played(seed) for seed in (FOUND_BY[broken], *range(60))]
