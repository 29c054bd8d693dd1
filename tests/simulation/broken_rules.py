"""Rules of the pure modules and of who uses them, each broken on purpose: what the schedules have to find."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coordinator import Coordinator
from database import Database, Fenced
from replica import LEASE_S, Replica

from services.shard.holdings import Holdings
from shard_router.leases import GrantedLeases, HeldLease
from shard_router.model import HOME
from shard_router.resharding import Event, Heard, Instruction, PositionRead, Resharding, Tell
from shard_router.shard_map import Migrating, Retiring

Break = Callable[[pytest.MonkeyPatch], None]


def answers_at_any_epoch(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Holdings, "require", lambda self, epoch: None)


def drops_the_old_copy_at_once(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Migrating, "followed_by", lambda self, shard: tuple(self.new.slots_of(shard).tolist()))


def ignores_that_a_lease_has_lapsed(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(HeldLease, "valid", lambda self, now_s: True)


def answers_before_it_has_caught_up(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(HeldLease, "may_answer", lambda self, now_s: self.valid(now_s))


def waits_for_no_position(patched: pytest.MonkeyPatch) -> None:
    handle = Resharding.handle

    def hasty(self: Resharding, event: Event) -> list[Instruction]:
        return handle(self, PositionRead({HOME: 0}) if isinstance(event, PositionRead) else event)

    patched.setattr(Resharding, "handle", hasty)


def believes_a_backfill_at_once(patched: pytest.MonkeyPatch) -> None:
    follow = Holdings.follow

    def hasty(self: Holdings, slots: Any) -> list[int]:
        wanted = follow(self, slots)
        self.complete(wanted)
        return wanted

    patched.setattr(Holdings, "follow", hasty)


def old_owners_stop_following_at_the_switch(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Retiring, "followed_by", lambda self, shard: self.served_by(shard))


def commits_tell_no_epoch(patched: pytest.MonkeyPatch) -> None:
    write = Database.write

    async def silent(self: Database, ids: Any, deletes: bool) -> tuple[int, int]:
        return (await write(self, ids, deletes))[0], 0

    patched.setattr(Database, "write", silent)


def a_successor_forgets_leases(patched: pytest.MonkeyPatch) -> None:
    start = Coordinator.start

    def forgetful(self: Coordinator) -> None:
        start(self)
        self.leases = GrantedLeases(LEASE_S)

    patched.setattr(Coordinator, "start", forgetful)


def grants_end_before_what_is_held(patched: pytest.MonkeyPatch) -> None:
    def short(self: GrantedLeases, holder: Any, now_s: float) -> None:
        self._until_s[holder] = now_s + self.length_s / 2

    patched.setattr(GrantedLeases, "grant", short)


def forgets_deletes_during_a_backfill(patched: pytest.MonkeyPatch) -> None:
    # It always takes itself for one that backfills nothing.
    patched.setattr(Replica, "backfilling", property(lambda self: 0, lambda self, value: None), raising=False)


def does_not_notice_a_change_of_slots(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Holdings, "changes", property(lambda self: 0, lambda self, value: None), raising=False)


def tells_nobody_of_a_change(patched: pytest.MonkeyPatch) -> None:
    do = Coordinator._do

    async def silent(self: Coordinator, instruction: Instruction) -> Event | None:
        if isinstance(instruction, Tell):
            # Renewals still do.
            self.told = instruction.state
            return Heard(instruction.state.epoch)
        return await do(self, instruction)

    patched.setattr(Coordinator, "_do", silent)


def goes_on_without_the_claim(patched: pytest.MonkeyPatch) -> None:
    position = Database.position

    async def unchecked(self: Database, claim: int | None = None) -> int:
        try:
            return await position(self, claim)
        except Fenced:
            return self.counter

    patched.setattr(Database, "position", unchecked)


def takes_epochs_it_was_not_told_of_for_the_same(patched: pytest.MonkeyPatch) -> None:
    serve = Holdings.serve

    def believing(self: Holdings, epoch: int, slots: Any) -> None:
        since, served = self.since, self.served
        serve(self, epoch, slots)
        if np.array_equal(served, self.served):
            self.since = since

    patched.setattr(Holdings, "serve", believing)


def waits_for_the_first_position_alone(patched: pytest.MonkeyPatch) -> None:
    handle = Resharding.handle

    def satisfied(self: Resharding, event: Event) -> list[Instruction]:
        applied = set(self._applied) if isinstance(event, PositionRead) else set()
        instructions = handle(self, event)
        self._applied |= applied
        return instructions

    patched.setattr(Resharding, "handle", satisfied)


#: Each with a schedule that found it, which is tried first.
FOUND_BY: dict[Break, int] = {
    answers_at_any_epoch: 1,
    drops_the_old_copy_at_once: 0,
    ignores_that_a_lease_has_lapsed: 0,
    answers_before_it_has_caught_up: 5,
    waits_for_no_position: 28,
    believes_a_backfill_at_once: 11,
    old_owners_stop_following_at_the_switch: 13,
    commits_tell_no_epoch: 7,
    a_successor_forgets_leases: 9,
    grants_end_before_what_is_held: 27,
    forgets_deletes_during_a_backfill: 11,
    does_not_notice_a_change_of_slots: 0,
    tells_nobody_of_a_change: 79,
    goes_on_without_the_claim: 27,
    takes_epochs_it_was_not_told_of_for_the_same: 4,
    waits_for_the_first_position_alone: 1858,
}
