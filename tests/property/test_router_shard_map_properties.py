"""Shard maps stay even, and only what has to move moves."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shard_router.ring import Ring
from shard_router.shard_map import ShardMap

#: True adds a shard, False drains one.
CHANGES = st.lists(st.booleans(), max_size=6)


def spread(shard_map: ShardMap) -> int:
    sizes = Counter(shard_map.owners).values()
    return max(sizes) - min(sizes)


def moved(before: ShardMap, after: ShardMap) -> list[tuple[int, int]]:
    return [(old, new) for old, new in zip(before.owners, after.owners, strict=True) if old != new]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 128), st.data())
def test_a_new_map_is_even_and_always_the_same(slots: int, data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, min(slots, 20)))
    shard_map = ShardMap.create(slots, shards)
    assert shard_map.shards == tuple(range(shards))
    assert len(shard_map.owners) == slots
    assert spread(shard_map) <= 1
    assert shard_map == ShardMap.create(slots, shards)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 96), st.integers(1, 6), CHANGES, st.randoms(use_true_random=False))
def test_every_change_moves_the_least_and_leaves_the_map_even(
    slots: int, shards: int, changes: list[bool], rng: random.Random
) -> None:
    shard_map, unused = ShardMap.create(slots, shards), shards
    for add in changes:
        count = len(shard_map.shards)
        if add and count < slots:
            after = shard_map.add_shard(unused)
            movements = moved(shard_map, after)
            assert {new for _, new in movements} == {unused}
            assert len(movements) <= -(-slots // (count + 1))
            unused += 1
        elif not add and count > 1:
            drained = shard_map.shards[rng.randrange(count)]
            after = shard_map.drain_shard(drained)
            movements = moved(shard_map, after)
            assert {old for old, _ in movements} == {drained}
            assert len(movements) == len(shard_map.slots_of(drained))
        else:
            continue
        assert after.epoch == shard_map.epoch + 1
        assert spread(after) <= 1
        shard_map = after
    assert sorted(slot for shard in shard_map.shards for slot in shard_map.slots_of(shard)) == list(
        range(slots)
    )


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(min_size=1), min_size=2, max_size=6), st.lists(st.text(), max_size=50), st.data())
def test_a_node_leaving_the_ring_moves_only_its_own_keys(
    nodes: set[str], keys: list[str], data: st.DataObject
) -> None:
    leaving = data.draw(st.sampled_from(sorted(nodes)))
    before = Ring(dict.fromkeys(nodes, 1.0), virtual_nodes=16)
    after = Ring(dict.fromkeys(nodes - {leaving}, 1.0), virtual_nodes=16)
    for key in keys:
        preference = before.preference(key)
        assert after.preference(key) == tuple(node for node in preference if node != leaving)
