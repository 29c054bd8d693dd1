"""Whatever crashes, pauses and gets lost while shards come and go: acknowledged is acknowledged.

Each seed is a schedule of its own, and the same seed the same schedule: `SEED=17` runs that one alone,
`SEEDS=5000` so many.
"""

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from cluster import SLOTS, Cluster, Gateway
from virtual_loop import run

from services.shard.holdings import Holdings
from shard_router.errors import StaleEpoch, Unavailable
from shard_router.hashing import slot_of
from shard_router.shard_map import Migrating, Steady

SEEDS = int(os.environ.get("SEEDS", "60"))
LENGTH_S = 2.5


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
    #: With one copy a shard: the latest version of each document that a search has found.
    seen: dict[str, int] = field(default_factory=dict)
    searches: int = 0
    whole: int = 0
    visible: int = 0
    ends: bool = False

    async def play(self) -> Cluster:
        self.rng = random.Random(self.seed)
        self.cluster = Cluster(self.rng, self.rng.randint(1, 2), self.rng.randint(1, 2))
        self.cluster.wishes = [self.rng.random() < 0.5 for _ in range(self.rng.randint(1, 4))]
        clients = [asyncio.ensure_future(self._write(n)) for n in range(3)]
        clients += [asyncio.ensure_future(self._search()) for _ in range(2)]
        chaos = asyncio.ensure_future(self._chaos())
        await asyncio.sleep(LENGTH_S)
        self.ends = True
        chaos.cancel()
        await asyncio.gather(*clients)
        await self._settled()
        return self.cluster

    def _gateway(self) -> Gateway:
        return self.rng.choice(self.cluster.gateways)

    async def _write(self, client: int) -> None:
        ids = [f"{client}-{n}" for n in range(6)]
        for id in ids:
            self.known[id] = Known()
        while not self.ends:
            id = self.rng.choice(ids)
            known, deletes, visible = self.known[id], self.rng.random() < 0.35, self.rng.random() < 0.7
            known.writes += 1
            known.unsure, known.may_be_deleted = True, known.may_be_deleted or deletes
            try:
                seq, seen = await self._gateway().write([id], deletes=deletes, visible=visible)
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
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    async def _read_own(self, id: str, seq: int, deleted: bool) -> bool:
        """A read after the write's token shows it; whether there was one."""
        for _ in range(3):
            try:
                found = await self._gateway().search(seq)
            except (Unavailable, StaleEpoch, asyncio.CancelledError):
                continue
            if slot_of(id, SLOTS) in found.slots:
                expected = None if deleted else seq
                assert found.seqs.get(id) == expected, f"{id} at {seq} is not read by its own writer"
        # It is not visible to everybody for that.
        return False

    async def _search(self) -> None:
        while not self.ends:
            before, seen = {id: replace(known) for id, known in self.known.items()}, dict(self.seen)
            try:
                found = await self._gateway().search(0)
            except (Unavailable, StaleEpoch, asyncio.CancelledError):
                await asyncio.sleep(0.01)
                continue
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
                # Copies of one shard may stand at different positions; but one after the other may not.
                if self.cluster.copies_a_shard == 1 and answered:
                    gone = seq is None and (known.deleted or may_be_deleted)
                    found_again = gone or (seq or 0) >= seen.get(id, 0)
                    assert found_again, f"{id}, seen at {seen[id]}, is found at {seq}"
                    self.seen[id] = max(self.seen.get(id, 0), seq or 0)
            await asyncio.sleep(self.rng.uniform(0, 0.03))

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
            await asyncio.sleep(self.rng.expovariate(4.0))
            match self.rng.randrange(8):
                case 0 | 1:
                    cluster.crash_copy(self.rng.choice(cluster.copies()))
                case 2 | 3:
                    cluster.replicas[self.rng.choice(cluster.copies())].pause(self.rng.uniform(0.1, 1.5))
                case 4:
                    cluster.crash_coordinator()
                case 5:
                    cluster.coordinator.pause(self.rng.uniform(0.1, 1.0))
                case 6:
                    gateway = self._gateway()
                    gateway.crash()
                    if self.rng.random() < 0.5:
                        gateway.pause(self.rng.uniform(0.1, 1.0))
                case 7:
                    cluster.coordinator.cancel()

    async def _settled(self) -> None:
        """When nothing fails any more, everything comes to rest, and the whole truth is found."""
        cluster = self.cluster
        cluster.network.lost = cluster.network.late = 0.0
        async with asyncio.timeout(60):
            while cluster.wishes or not isinstance(cluster.database.state, Steady):  # noqa: ASYNC110
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
    except AssertionError as error:
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


def answers_at_any_epoch(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Holdings, "require", lambda self, epoch: None)


def drops_the_old_copy_at_once(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Migrating, "followed_by", lambda self, shard: tuple(self.new.slots_of(shard).tolist()))


@pytest.mark.parametrize("broken", [answers_at_any_epoch, drops_the_old_copy_at_once])
def test_a_broken_rule_is_found(broken: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        broken(patched)
        with pytest.raises(AssertionError, match="SEED="):
            [played(seed) for seed in range(60)]
