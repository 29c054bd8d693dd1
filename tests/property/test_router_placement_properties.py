"""Copies lie apart, and move only as far as they have to."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_router.errors import PreconditionFailed
from shard_router.placement import place
from shard_router.resharding import Copy

NODES = st.sets(st.sampled_from([f"node-{i}" for i in range(8)]), min_size=1, max_size=6)


def equal(nodes: set[str]) -> dict[str, float]:
    return dict.fromkeys(nodes, 1.0)


@settings(max_examples=150, deadline=None)
@given(NODES, st.integers(1, 12), st.integers(1, 4))
def test_copies_of_a_shard_share_a_node_only_where_there_are_too_few(
    nodes: set[str], shards: int, replicas: int
) -> None:
    placed = place(range(shards), replicas, equal(nodes), {})
    assert set(placed) == {Copy(shard, replica) for shard in range(shards) for replica in range(replicas)}
    for shard in range(shards):
        held = Counter(node for copy, node in placed.items() if copy.shard == shard)
        assert max(held.values()) <= -(-replicas // len(nodes))
    assert placed == place(range(shards), replicas, equal(nodes), {})


@settings(max_examples=150, deadline=None)
@given(NODES, st.integers(1, 12), st.integers(1, 3), st.data())
def test_a_node_that_goes_moves_little_but_its_own_copies(
    nodes: set[str], shards: int, replicas: int, data: st.DataObject
) -> None:
    before = place(range(shards), replicas, equal(nodes), {})
    assert place(range(shards), replicas, equal(nodes), before) == before
    if len(nodes) > 1:
        gone = data.draw(st.sampled_from(sorted(nodes)))
        after = place(range(shards), replicas, equal(nodes - {gone}), before)
        moved = {copy for copy in before if before[copy] != after[copy]}
        homeless = {copy for copy, node in before.items() if node == gone}
        # Another moves only where a homeless one could go nowhere else without meeting its like.
        assert moved >= homeless
        assert len(moved) <= 2 * len(homeless)


@settings(max_examples=150, deadline=None)
@given(NODES, st.integers(1, 12), st.integers(1, 3))
def test_a_node_that_comes_takes_its_share_at_most(nodes: set[str], shards: int, replicas: int) -> None:
    before = place(range(shards), replicas, equal(nodes), {})
    after = place(range(shards), replicas, equal(nodes | {"new"}), before)
    moved = {copy for copy in before if before[copy] != after[copy]}
    share = -(-shards * replicas // (len(nodes) + 1))
    assert len(moved) <= share or replicas > len(nodes)
    held = Counter(before.values())
    assert all(held[before[copy]] > share for copy in moved) or replicas > len(nodes)
    if replicas <= len(nodes):
        assert len({(copy.shard, node) for copy, node in after.items()}) == len(after)


def test_heavier_nodes_get_more_and_without_nodes_nothing_is_placed() -> None:
    held = Counter(place(range(40), 1, {"big": 3.0, "small": 1.0}, {}).values())
    assert held == {"big": 30, "small": 10}
    with pytest.raises(PreconditionFailed):
        place([0], 1, {"off": 0.0}, {})
