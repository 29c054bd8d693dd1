from index_builder.segments.compaction import FACTOR, SegmentFacts
from services.shard.state import (
    QUIET_ROWS,
    QUIET_S,
    RETRY_FIRST_S,
    RETRY_MOST_S,
    Done,
    Failed,
    FileState,
    Freeze,
    Froze,
    Looked,
    Rewrite,
    Seal,
)

FULL_TIER = [SegmentFacts(number, 8192, 8192) for number in range(FACTOR)]


def looked(segments: list[SegmentFacts] | None = None, open_rows: int = 0, quiet_s: float = 0.0) -> Looked:
    return Looked(segments or [], open_rows, quiet_s)


def test_frozen_memtables_are_sealed_one_by_one_oldest_first() -> None:
    state = FileState()
    assert state.handle(Froze(4), 0) == Seal(4)
    assert state.handle(Froze(7), 0) is None
    assert state.handle(looked(), 0) is None
    assert state.handle(Done([]), 0) == Seal(7)
    assert state.handle(Done([]), 0) is None
    assert not state.frozen


def test_a_full_tier_is_rewritten_when_nothing_is_left_to_seal() -> None:
    state = FileState()
    state.handle(Froze(9), 0)
    state.handle(Froze(10), 0)
    assert state.handle(Done(FULL_TIER), 0) == Seal(10)
    assert state.handle(Done(FULL_TIER), 0) == Rewrite(tuple(range(FACTOR)))
    assert state.handle(Froze(11), 0) is None
    assert state.handle(Done([]), 0) == Seal(11)


def test_a_segment_that_decays_is_noticed_when_time_passes() -> None:
    assert FileState().handle(looked([SegmentFacts(3, 100, 20)]), 0) == Rewrite((3,))


def test_after_a_failure_it_tries_again_later_and_later_and_then_at_once() -> None:
    state = FileState()
    now_s, pauses = 0.0, []
    assert state.handle(Froze(1), now_s) == Seal(1)
    for _ in range(9):
        assert state.handle(Failed(), now_s) is None
        began_s = now_s
        while state.handle(looked(), now_s) is None:
            now_s += 0.5
        pauses.append(now_s - began_s)
    assert pauses[:3] == [RETRY_FIRST_S, 2 * RETRY_FIRST_S, 4 * RETRY_FIRST_S]
    assert pauses[-1] == RETRY_MOST_S
    assert state.frozen == type(state.frozen)([1])
    assert state.handle(Done([]), now_s) is None
    assert state.handle(Froze(2), now_s) == Seal(2)


def test_a_memtable_that_is_left_alone_is_frozen_early() -> None:
    state = FileState()
    assert state.handle(looked(open_rows=QUIET_ROWS - 1, quiet_s=QUIET_S), 0) is None
    assert state.handle(looked(open_rows=QUIET_ROWS, quiet_s=QUIET_S / 2), 0) is None
    assert state.handle(looked(open_rows=QUIET_ROWS, quiet_s=QUIET_S), 0) == Freeze()
    assert state.handle(Froze(1), 0) == Seal(1)
    assert state.handle(looked(open_rows=QUIET_ROWS, quiet_s=QUIET_S), 0) is None
