"""One change of a map, step by step: what is to be done, and what may not be done yet."""

import pytest

from shard_router.errors import PreconditionFailed
from shard_router.model import HOME
from shard_router.resharding import (
    Applied,
    AwaitApplied,
    Backfill,
    Backfilled,
    CancelAsked,
    Copy,
    Finish,
    Heard,
    Joined,
    Left,
    Overtaken,
    PositionRead,
    ReadPosition,
    Resharding,
    Stage,
    Store,
    Stored,
    Tell,
)
from shard_router.shard_map import Migrating, Retiring, ShardMap, Steady

OLD = Steady(ShardMap.create(8, 2))
TARGET = OLD.migrate(lambda shard_map: shard_map.add_shard(2))
SLOTS = TARGET.gains[2]
FIRST, SECOND = Copy(2, 0), Copy(2, 1)
OTHERS = (Copy(0, 0), Copy(1, 0))


def migrating(*copies: Copy) -> Resharding:
    """A machine whose copies are backfilling."""
    machine, first = Resharding.begin(TARGET, [*OTHERS, *copies])
    assert first == [Store(TARGET)]
    assert machine.handle(Stored()) == [Tell(TARGET)]
    assert machine.handle(Heard(TARGET.epoch)) == [Backfill(copy, SLOTS) for copy in copies]
    return machine


def test_a_shard_is_added_step_by_step() -> None:
    machine = migrating(FIRST)
    assert machine.handle(Backfilled(FIRST)) == [ReadPosition()]
    assert machine.handle(PositionRead({HOME: 17})) == [AwaitApplied(FIRST, 17)]
    retiring = Retiring(TARGET.epoch + 1, TARGET.old, TARGET.new)
    assert machine.handle(Applied(FIRST, 17)) == [Store(retiring)]
    assert machine.handle(Stored()) == [Tell(retiring)]
    steady = Steady(ShardMap(TARGET.epoch + 2, TARGET.new.owners))
    assert machine.handle(Heard(retiring.epoch)) == [Store(steady)]
    assert machine.handle(Stored()) == [Tell(steady)]
    assert machine.handle(Heard(steady.epoch)) == [Finish(moved=True)]
    assert machine.stage is Stage.FINISHED
    assert machine.progress[0] == machine.progress[1]


def test_the_position_is_read_only_when_every_copy_of_a_new_owner_is_whole() -> None:
    machine = migrating(FIRST, SECOND)
    assert machine.handle(Backfilled(SECOND)) == []
    assert machine.progress == (1, 5)
    assert machine.handle(Backfilled(FIRST)) == [ReadPosition()]
    assert machine.handle(PositionRead({HOME: 5})) == [AwaitApplied(FIRST, 5), AwaitApplied(SECOND, 5)]
    assert machine.handle(Applied(FIRST, 4)) == []
    assert machine.handle(Applied(SECOND, 5)) == []
    [store] = machine.handle(Applied(FIRST, 5))
    assert isinstance(store, Store)


def test_a_copy_that_comes_back_begins_again_and_one_that_is_down_is_not_waited_for() -> None:
    machine = migrating(FIRST, SECOND)
    machine.handle(Backfilled(FIRST))
    machine.handle(Backfilled(SECOND))
    machine.handle(PositionRead({HOME: 5}))
    assert machine.handle(Joined(SECOND)) == [Backfill(SECOND, SLOTS)]
    assert machine.handle(Applied(FIRST, 5)) == []
    # What was read before it came back is not what counts now.
    assert machine.handle(Left(SECOND)) == [ReadPosition()]
    assert machine.handle(PositionRead({HOME: 9})) == [AwaitApplied(FIRST, 9)]
    assert isinstance(machine.handle(Applied(FIRST, 9))[0], Store)


def test_a_position_that_is_read_again_has_to_be_passed_by_every_copy() -> None:
    machine = migrating(FIRST, SECOND)
    machine.handle(Backfilled(FIRST))
    machine.handle(Backfilled(SECOND))
    machine.handle(PositionRead({HOME: 5}))
    assert machine.handle(Applied(FIRST, 5)) == []
    # The old owner answers with later writes by the time the other copy is back.
    assert machine.handle(Joined(SECOND)) == [Backfill(SECOND, SLOTS)]
    assert machine.handle(Backfilled(SECOND)) == [ReadPosition()]
    assert machine.handle(PositionRead({HOME: 9})) == [AwaitApplied(FIRST, 9), AwaitApplied(SECOND, 9)]
    assert machine.handle(Applied(SECOND, 9)) == []
    [store] = machine.handle(Applied(FIRST, 9))
    assert isinstance(store, Store)


def test_without_a_copy_of_the_new_owner_nothing_goes_on() -> None:
    machine = migrating(FIRST)
    assert machine.handle(Left(FIRST)) == []
    assert machine.handle(Joined(FIRST)) == [Backfill(FIRST, SLOTS)]
    assert machine.handle(Backfilled(FIRST)) == [ReadPosition()]


def test_every_log_has_to_be_passed_by_a_copy_that_follows_it() -> None:
    east = Copy(2, 0, "east")
    machine, _ = Resharding.begin(TARGET, [*OTHERS, FIRST], (HOME, "east"))
    machine.handle(Stored())
    assert machine.handle(Heard(TARGET.epoch)) == [Backfill(FIRST, SLOTS)]
    assert machine.handle(Backfilled(FIRST)) == [], "nobody has what lies in the other database"
    assert machine.handle(Joined(east)) == [Backfill(east, SLOTS)]
    assert machine.handle(Backfilled(east)) == [ReadPosition()]
    assert set(machine.handle(PositionRead({HOME: 5, "east": 50}))) == {
        AwaitApplied(FIRST, 5),
        AwaitApplied(east, 50),
    }
    assert machine.handle(Applied(east, 49)) == []
    assert machine.handle(Applied(FIRST, 5)) == []
    assert isinstance(machine.handle(Applied(east, 50))[0], Store)


def test_events_of_another_stage_change_nothing() -> None:
    machine = migrating(FIRST)
    before = (machine.stage, machine.state)
    for event in (
        Stored(),
        Heard(TARGET.epoch),
        PositionRead({HOME: 3}),
        Applied(FIRST, 3),
        Backfilled(Copy(0, 0)),
    ):
        assert machine.handle(event) == []
        assert (machine.stage, machine.state) == before


def test_it_can_be_cancelled_until_the_new_owners_are_about_to_answer() -> None:
    machine = migrating(FIRST)
    back = Steady(ShardMap(TARGET.epoch + 1, TARGET.old.owners))
    assert machine.handle(CancelAsked()) == [Store(back)]
    with pytest.raises(PreconditionFailed):
        machine.handle(CancelAsked())
    assert machine.handle(Stored()) == [Tell(back)]
    assert machine.handle(Heard(back.epoch)) == [Finish(moved=False)]
    late = migrating(FIRST)
    late.handle(Backfilled(FIRST))
    late.handle(PositionRead({HOME: 0}))
    late.handle(Applied(FIRST, 0))
    with pytest.raises(PreconditionFailed):
        late.handle(CancelAsked())


@pytest.mark.parametrize("state", [TARGET, TARGET.cut_over(), TARGET.cut_over().settle(), TARGET.cancel()])
def test_another_goes_on_from_whatever_is_stored(state: object) -> None:
    assert isinstance(state, Steady | Migrating | Retiring)
    machine, first = Resharding.resume(state, [*OTHERS, FIRST])
    assert first == [Tell(state)]
    # And so does one that was overtaken.
    overtaken, _ = Resharding.begin(TARGET, [*OTHERS, FIRST])
    assert overtaken.handle(Overtaken(state)) == [Tell(state)]
    assert overtaken.handle(Heard(state.epoch)) == machine.handle(Heard(state.epoch)) != []


def test_every_slot_has_one_owner_who_answers_in_every_state() -> None:
    for state in (OLD, TARGET, TARGET.cut_over(), TARGET.cut_over().settle(), TARGET.cancel()):
        served = [slot for shard in state.shards for slot in state.served_by(shard)]
        assert sorted(served) == list(range(8))
        for shard in state.shards:
            assert set(state.served_by(shard)) <= set(state.followed_by(shard))
    assert set(TARGET.followed_by(2)) == set(SLOTS)
    assert TARGET.served_by(2) == ()
    assert TARGET.cut_over().served_by(2) == SLOTS
    assert {slot for slots in TARGET.losses.values() for slot in slots} == set(SLOTS)
