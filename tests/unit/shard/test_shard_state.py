from index_builder.segments.compaction import FACTOR, Policy, SegmentFacts
from index_builder.segments.index_spec import IndexKind
from services.shard.state import (
    LOAD_OVER_S,
    QUIET_ROWS,
    QUIET_S,
    RETRY_FIRST_S,
    RETRY_MOST_S,
    REWRITE_TRIES,
    Done,
    Failed,
    FileState,
    Freeze,
    Froze,
    Looked,
    Rewrite,
    Seal,
)

FULL_TIER = [SegmentFacts(number, 100, 100) for number in range(FACTOR)]
POLICY = Policy("auto", dim=3, graph_rows=1000)
ENOUGH = [SegmentFacts(number, 400, 400) for number in range(3)]


def looked(segments: list[SegmentFacts] | None = None, open_rows: int = 0, quiet_s: float = 0.0) -> Looked:
    return Looked(segments or [], open_rows, quiet_s)


def test_frozen_memtables_are_sealed_one_by_one_oldest_first() -> None:
    state = FileState(POLICY)
    assert state.handle(Froze(4), 0) == [Seal(4)]
    assert state.handle(Froze(7), 0) == []
    assert state.handle(looked(), 0) == []
    assert state.handle(Done(Seal(4), []), 0) == [Seal(7)]
    assert state.handle(Done(Seal(7), []), 0) == []
    assert not state.frozen


def test_a_full_tier_is_rewritten_when_nothing_is_left_to_seal_and_seals_go_on_beside_it() -> None:
    state = FileState(POLICY)
    state.handle(Froze(9), 0)
    state.handle(Froze(10), 0)
    assert state.handle(Done(Seal(9), FULL_TIER), 0) == [Seal(10)]
    merge = Rewrite(tuple(range(FACTOR)))
    assert state.handle(Done(Seal(10), FULL_TIER), 0) == [merge]
    assert state.handle(Froze(11), 0) == [Seal(11)]
    assert state.handle(looked(FULL_TIER), 0) == []
    assert state.handle(Done(Seal(11), FULL_TIER), 0) == [], "one rewrite at a time"
    assert state.handle(Done(merge, FULL_TIER), 0) == [merge]


def test_a_segment_that_decays_is_noticed_when_time_passes() -> None:
    assert FileState(POLICY).handle(looked([SegmentFacts(3, 100, 20)]), 0) == [Rewrite((3,))]


def test_a_graph_waits_until_nothing_is_written() -> None:
    state, graph = FileState(POLICY), Rewrite((0, 1, 2), IndexKind.HNSW)
    state.handle(Froze(1), 0)
    assert state.handle(Done(Seal(1), ENOUGH), 0) == []
    assert state.handle(looked(ENOUGH, quiet_s=QUIET_S / 2), 1) == []
    assert state.debt(ENOUGH) == 1200
    assert state.handle(looked(ENOUGH, quiet_s=QUIET_S), 3) == [graph]
    assert state.handle(Froze(2), 4) == [Seal(2)], "a load that goes on is sealed beside it"
    assert state.handle(Done(graph, ENOUGH), 5) == [], "and begins no other graph"


def test_a_trickle_of_writes_is_no_bulk_load() -> None:
    state = FileState(POLICY)
    state.handle(Froze(1), 0)
    state.handle(Done(Seal(1), ENOUGH), 0)
    assert state.handle(looked(ENOUGH), LOAD_OVER_S - 1) == []
    assert state.handle(looked(ENOUGH), LOAD_OVER_S) == [Rewrite((0, 1, 2), IndexKind.HNSW)]


def test_after_a_failure_it_tries_again_later_and_later_and_then_at_once() -> None:
    state = FileState(POLICY)
    now_s, pauses = 0.0, []
    assert state.handle(Froze(1), now_s) == [Seal(1)]
    for _ in range(9):
        assert state.handle(Failed(Seal(1)), now_s) == []
        began_s = now_s
        while not state.handle(looked(), now_s):
            now_s += 0.5
        pauses.append(now_s - began_s)
    assert pauses[:3] == [RETRY_FIRST_S, 2 * RETRY_FIRST_S, 4 * RETRY_FIRST_S]
    assert pauses[-1] == RETRY_MOST_S
    assert list(state.frozen) == [1]
    assert state.handle(Done(Seal(1), []), now_s) == []
    assert state.handle(Froze(2), now_s) == [Seal(2)]


def test_a_rewrite_that_fails_holds_up_no_seal() -> None:
    state = FileState(POLICY)
    [merge] = state.handle(looked(FULL_TIER), 0)
    assert isinstance(merge, Rewrite)
    assert state.handle(Failed(merge), 0) == []
    assert state.handle(looked(FULL_TIER), 0) == []
    assert state.handle(Froze(1), 0) == [Seal(1)]
    assert state.handle(Done(Seal(1), FULL_TIER), RETRY_FIRST_S) == [merge]


def test_a_rewrite_that_fails_again_and_again_is_given_up_and_others_go_on() -> None:
    state, now_s = FileState(POLICY), 0.0
    for tried in range(REWRITE_TRIES):
        [merge] = state.handle(looked(FULL_TIER), now_s)
        assert isinstance(merge, Rewrite)
        assert state.debt(FULL_TIER) > 0
        assert not state.left, f"after {tried} failures"
        assert state.handle(Failed(merge), now_s) == []
        now_s += RETRY_MOST_S
    assert state.left == set(range(FACTOR))
    assert state.handle(looked(FULL_TIER), now_s) == []
    assert state.debt(FULL_TIER) == 0
    others = [SegmentFacts(number + 100, 100, 100) for number in range(FACTOR)]
    assert state.handle(looked(FULL_TIER + others), now_s) == [Rewrite(tuple(range(100, 100 + FACTOR)))]


def test_a_rewrite_that_finds_no_room_is_never_given_up() -> None:
    state, now_s = FileState(POLICY), 0.0
    for _ in range(3 * REWRITE_TRIES):
        [merge] = state.handle(looked(FULL_TIER), now_s)
        assert isinstance(merge, Rewrite)
        state.handle(Failed(merge, for_room=True), now_s)
        now_s += RETRY_MOST_S
    assert not state.left


def test_a_memtable_that_is_left_alone_is_frozen_early() -> None:
    state = FileState(POLICY)
    assert state.handle(looked(open_rows=QUIET_ROWS - 1, quiet_s=QUIET_S), 0) == []
    assert state.handle(looked(open_rows=QUIET_ROWS, quiet_s=QUIET_S / 2), 0) == []
    assert state.handle(looked(open_rows=QUIET_ROWS, quiet_s=QUIET_S), 0) == [Freeze()]
    assert state.handle(Froze(1, filled=False), 0) == [Seal(1)]
    assert state.handle(looked(open_rows=QUIET_ROWS, quiet_s=QUIET_S), 0) == []
    assert state.handle(Done(Seal(1), ENOUGH), 0) == [Rewrite((0, 1, 2), IndexKind.HNSW)], "it is calm"
