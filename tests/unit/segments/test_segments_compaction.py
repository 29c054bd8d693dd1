from collections import Counter
from random import Random

from index_builder.segments import compaction
from index_builder.segments.compaction import FACTOR, Choice, Policy, SegmentFacts, choose, debt
from index_builder.segments.index_spec import IndexKind

FLAT, HNSW = IndexKind.FLAT, IndexKind.HNSW
POLICY = Policy("auto", dim=384)


def facts(*sizes: tuple[int, int], kind: IndexKind = FLAT, first: int = 0) -> list[SegmentFacts]:
    return [SegmentFacts(number, rows, live, kind) for number, (rows, live) in enumerate(sizes, first)]


def under_load(segments: list[SegmentFacts], policy: Policy = POLICY) -> Choice | None:
    return choose(segments, policy, calm=False)


def in_calm(segments: list[SegmentFacts], policy: Policy = POLICY) -> Choice | None:
    return choose(segments, policy, calm=True)


def test_segments_of_like_size_are_merged_once_there_are_enough() -> None:
    assert under_load(facts(*[(8192, 8192)] * (FACTOR - 1))) is None
    assert under_load(facts(*[(8192, 8192)] * (FACTOR + 1))) == (tuple(range(FACTOR)), FLAT)


def test_a_large_segment_is_not_rewritten_for_small_ones() -> None:
    sizes = [(65_536, 65_536), *[(8192, 8192)] * FACTOR]
    assert under_load(facts(*sizes)) == (tuple(range(1, FACTOR + 1)), FLAT)
    assert under_load(facts(*[(65_536, 65_536)] * 3, *[(8192, 8192)] * 5)) is None


def test_no_merge_makes_a_segment_too_large() -> None:
    eighth = POLICY.most_rows // FACTOR
    assert under_load(facts(*[(eighth, eighth)] * FACTOR)) is not None
    assert under_load(facts(*[(eighth + 1, eighth + 1)] * FACTOR)) is None
    assert Policy("auto", dim=4096).most_rows < Policy("auto", dim=8).most_rows == compaction.MOST_ROWS


def test_mostly_dead_segments_are_rewritten_as_one() -> None:
    assert under_load(facts((100, 50))) is None
    assert under_load(facts((100, 49), (100, 100), (100, 10), (100, 0))) == ((0, 2, 3), FLAT)
    assert under_load(facts((100, 0))) == ((0,), FLAT)
    # As far as they fit together.
    most = POLICY.most_rows
    assert in_calm(facts((2 * most, most - 9), (100, 10), (100, 9), kind=HNSW)) == ((0, 2), HNSW)
    assert in_calm(facts((3 * most, most + 1), kind=HNSW)) == ((0,), HNSW)


def test_flat_segments_that_suffice_become_a_graph_once_it_is_calm() -> None:
    segments = facts(*[(8192, 8192)] * 6)
    assert in_calm(segments) is None
    segments = facts(*[(8192, 8192)] * 7)
    assert under_load(segments) is None
    assert in_calm(segments) == (tuple(range(7)), HNSW)
    assert in_calm(segments, Policy("flat", dim=384)) is None
    assert in_calm(segments, Policy("auto", dim=384, device="cuda:0")) == (tuple(range(7)), IndexKind.IVF)
    assert in_calm(facts((5000, 5000)), Policy("hnsw", dim=384)) == ((0,), HNSW)


def test_a_bulk_load_ends_in_one_graph_beside_what_does_not_fit() -> None:
    third = POLICY.most_rows // 3
    segments = facts((third, third), (third, third), (2 * third, 2 * third), (9, 9))
    assert in_calm(segments) == ((0, 1, 3), HNSW)


def test_a_graph_is_not_made_anew_for_what_comes_after_it() -> None:
    graph = facts((300_000, 200_000), kind=HNSW)
    assert in_calm(graph + facts(*[(8192, 8192)] * 6, first=1)) is None
    assert in_calm(graph + facts(*[(8192, 8192)] * 7, first=1)) == (tuple(range(1, 8)), HNSW)
    graphs = facts(*[(60_000, 60_000)] * FACTOR, kind=HNSW)
    assert in_calm(graphs) == (tuple(range(FACTOR)), HNSW)
    assert under_load(graphs) is None


def test_what_is_much_beside_a_graph_is_linked_into_it() -> None:
    old, graph = facts((8192, 8192)), facts((120_000, 80_000), kind=HNSW, first=1)
    larger = facts((200_000, 200_000), kind=HNSW, first=2)
    new = facts((8192, 8192), (3616, 3616), first=3)
    assert in_calm([*old, *graph, *larger, *new]) == ((0, 1, 3, 4), HNSW)
    assert under_load([*old, *graph, *larger, *new]) is None
    # A row less, and it is little.
    assert in_calm([*old, *graph, *larger, *facts((8192, 8192), (3615, 3615), first=3)]) is None
    full = facts((POLICY.most_rows, POLICY.most_rows - 40_000), kind=HNSW)
    assert in_calm(full + facts(*[(8192, 8192)] * 5, first=1), Policy("auto", dim=384)) is None


def test_a_graph_that_decays_waits_for_calm_unless_it_is_all_dead() -> None:
    graph = facts((300_000, 140_000), kind=HNSW)
    assert under_load(graph) is None
    assert in_calm(graph) == ((0,), HNSW)
    assert in_calm(facts((300_000, 40_000), kind=HNSW)) == ((0,), FLAT)
    assert under_load(facts((300_000, 0), kind=HNSW)) == ((0,), FLAT)


def test_what_was_meant_to_be_a_graph_and_came_out_flat_is_not_tried_again() -> None:
    # Its facts say what it was written to be.
    assert in_calm(facts((60_000, 60_000), kind=HNSW)) is None


def test_a_steady_load_ends_in_few_segments_and_bounded_work() -> None:
    segments: dict[int, int] = {}
    written, number = 0, 0
    for _ in range(FACTOR**3):
        segments[number] = 100
        number += 1
        while choice := under_load([SegmentFacts(n, rows, rows) for n, rows in segments.items()]):
            rows = sum(segments.pop(n) for n in choice.numbers)
            segments[number] = rows
            written += rows
            number += 1
    assert len(segments) <= 3 * (FACTOR - 1)
    assert written <= 3 * 100 * FACTOR**3


def test_documents_written_again_and_again_end_in_few_segments_and_bounded_work() -> None:
    """Also where sealing leaves little time for rewrites, and what is sealed soon dies."""
    rng = Random(0)
    documents, sealed, seals = 1_000, 32, 2_000
    segment_of: dict[int, int] = {}
    rows: dict[int, int] = {}
    written = 0
    for number in range(0, 2 * seals, 2):
        segment_of.update(dict.fromkeys(rng.sample(range(documents), sealed), number))
        rows[number] = sealed
        live = Counter(segment_of.values())
        if number % 8:
            continue
        if choice := under_load([SegmentFacts(n, of, live[n]) for n, of in sorted(rows.items())]):
            segment_of |= {id: number + 1 for id, at in segment_of.items() if at in choice.numbers}
            rows[number + 1] = sum(live[n] for n in choice.numbers)
            written += rows[number + 1]
            rows = {n: of for n, of in rows.items() if n not in choice.numbers and of}
        assert len(rows) <= documents // sealed + FACTOR
    assert written <= 3 * sealed * seals


def test_the_debt_is_all_that_will_be_rewritten() -> None:
    assert debt([], POLICY) == debt(facts(*[(8192, 8192)] * 6), POLICY) == 0
    assert debt(facts(*[(8192, 8192)] * 7), POLICY) == 7 * 8192
    # The decayed one first, then all of them as a graph.
    assert debt(facts((8192, 4000), *[(8192, 8192)] * 7), POLICY) == 4000 + 4000 + 7 * 8192
    assert debt(facts((8192, 0)), POLICY) == 1
    assert debt(facts((60_000, 60_000), kind=HNSW), POLICY) == 0
