"""Which shard owns which slot, and how that changes with as little movement as possible.

A change of the map is a way through types: Steady, Migrating, Retiring, Steady. Each has an epoch of its own,
and at each every slot has exactly one owner who answers.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shard_router.errors import AlreadyExists, InvalidField, NotFound, PreconditionFailed
from shard_router.ring import Ring, even


@dataclass(frozen=True)
class ShardMap:
    """The owner of every slot at one epoch: `owners[slot]` is a shard.

    Maps made here are within one slot of even. The same calls make the same map on every machine and in
    every release, but the stored map is the authoritative one.
    """

    epoch: int
    owners: tuple[int, ...]

    @classmethod
    def create(cls, slots: int, shards: int) -> "ShardMap":
        """The first map, epoch 1, of shards 0 to shards - 1, which the ring makes even.

        InvalidField("shards") unless there are 1 to `slots` of them.
        """
        if not 1 <= shards <= slots:
            raise InvalidField("shards", f"{shards} shards for {slots} slots; 1 to {slots} can have one each")
        owners = even([f"slot-{slot}" for slot in range(slots)], map(str, range(shards)))
        return cls(epoch=1, owners=tuple(map(int, owners)))

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """Every shard that owns a slot, ascending."""
        return tuple(sorted(set(self.owners)))

    def slots_of(self, shard: int) -> np.ndarray:
        """The slots a shard owns, ascending, int32; empty for an unknown shard."""
        return np.flatnonzero(np.array(self.owners) == shard).astype(np.int32)

    def add_shard(self, shard: int) -> "ShardMap":
        """The next epoch's map with one shard more; nothing moves between the others.

        The new shard steals its even share, floor(slots / shards), one slot at a time from the fullest:
        the one whose ring order names it earliest. AlreadyExists, or PreconditionFailed where the slots do
        not go round.
        """
        if shard in self.shards:
            raise AlreadyExists("shard", str(shard), field="shard")
        share = len(self.owners) // (len(self.shards) + 1)
        if share == 0:
            raise PreconditionFailed(f"all {len(self.owners)} slots have a shard of their own already")
        order = _RingOrder((*self.shards, shard))
        by_preference = sorted(range(len(self.owners)), key=lambda slot: (order.of(slot).index(shard), slot))
        owners = list(self.owners)
        for _ in range(share):
            sizes = Counter(owners)
            del sizes[shard]
            fullest = max(sizes.values())
            owners[next(slot for slot in by_preference if sizes[owners[slot]] == fullest)] = shard
        return ShardMap(self.epoch + 1, tuple(owners))

    def drain_shard(self, shard: int) -> "ShardMap":
        """The next epoch's map without one shard; nothing moves between the others.

        Each of its slots goes to the emptiest shard, among equals the first in ring order. NotFound, or
        PreconditionFailed for the last shard.
        """
        if shard not in self.shards:
            raise NotFound("shard", str(shard))
        sizes = Counter(owner for owner in self.owners if owner != shard)
        if not sizes:
            raise PreconditionFailed(f"shard {shard} is the last one")
        order = _RingOrder(sizes)
        owners = list(self.owners)
        for slot in self.slots_of(shard).tolist():
            emptiest = min(sizes.values())
            owners[slot] = next(other for other in order.of(slot) if sizes[other] == emptiest)
            sizes[owners[slot]] += 1
        return ShardMap(self.epoch + 1, tuple(owners))


class _RingOrder:
    """The order in which each slot prefers the shards."""

    def __init__(self, shards: Iterable[int]) -> None:
        self._ring = Ring({str(shard): 1.0 for shard in shards})

    def of(self, slot: int) -> tuple[int, ...]:
        return tuple(map(int, self._ring.preference(f"slot-{slot}")))


@dataclass(frozen=True)
class Steady:
    """Every slot has one owner, who follows and answers for it."""

    answering: ShardMap

    @property
    def epoch(self) -> int:
        """The number of this state."""
        return self.answering.epoch

    @property
    def shards(self) -> tuple[int, ...]:
        """Every shard that has copies, ascending."""
        return self.answering.shards

    def served_by(self, shard: int) -> tuple[int, ...]:
        """The slots a shard answers for, ascending."""
        return tuple(self.answering.slots_of(shard).tolist())

    def followed_by(self, shard: int) -> tuple[int, ...]:
        """The slots a shard has to keep up with, ascending."""
        return self.served_by(shard)

    def migrate(self, change: Callable[[ShardMap], ShardMap]) -> "Migrating":
        """The next state, on the way to what `change` makes of the map."""
        new = change(self.answering)
        return Migrating(self.epoch + 1, self.answering, new)


@dataclass(frozen=True)
class _Between:
    """Some slots change owners; the old and the new one both follow them."""

    epoch: int
    old: ShardMap
    new: ShardMap

    @property
    def shards(self) -> tuple[int, ...]:
        """Every shard that has copies, ascending."""
        return tuple(sorted({*self.old.shards, *self.new.shards}))

    def followed_by(self, shard: int) -> tuple[int, ...]:
        """The slots a shard has to keep up with, ascending."""
        pairs = zip(self.old.owners, self.new.owners, strict=True)
        return tuple(slot for slot, owners in enumerate(pairs) if shard in owners)

    @property
    def gains(self) -> dict[int, tuple[int, ...]]:
        """By new owner, the slots it gets."""
        return self._moves(lambda old, new: new)

    @property
    def losses(self) -> dict[int, tuple[int, ...]]:
        """By old owner, the slots it gives."""
        return self._moves(lambda old, new: old)

    def _moves(self, whose: Callable[[int, int], int]) -> dict[int, tuple[int, ...]]:
        moves: dict[int, list[int]] = {}
        for slot, (old, new) in enumerate(zip(self.old.owners, self.new.owners, strict=True)):
            if old != new:
                moves.setdefault(whose(old, new), []).append(slot)
        return {shard: tuple(slots) for shard, slots in sorted(moves.items())}


@dataclass(frozen=True)
class Migrating(_Between):
    """The old owners answer; the new ones are catching up."""

    @property
    def answering(self) -> ShardMap:
        """Who answers."""
        return self.old

    def served_by(self, shard: int) -> tuple[int, ...]:
        """The slots a shard answers for, ascending."""
        return tuple(self.old.slots_of(shard).tolist())

    def cut_over(self) -> "Retiring":
        """The next state: the new owners answer."""
        return Retiring(self.epoch + 1, self.old, self.new)

    def cancel(self) -> Steady:
        """The next state, if nothing is to move after all."""
        return Steady(ShardMap(self.epoch + 1, self.old.owners))


@dataclass(frozen=True)
class Retiring(_Between):
    """The new owners answer; the old ones follow until everybody knows, and then drop what they had."""

    @property
    def answering(self) -> ShardMap:
        """Who answers."""
        return self.new

    def served_by(self, shard: int) -> tuple[int, ...]:
        """The slots a shard answers for, ascending."""
        return tuple(self.new.slots_of(shard).tolist())

    def settle(self) -> Steady:
        """The last state."""
        return Steady(ShardMap(self.epoch + 1, self.new.owners))


#: What is stored, by epoch. Every step from one to the next is a compare-and-set on the epoch.
MapState = Steady | Migrating | Retiring
