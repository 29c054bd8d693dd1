"""Slots are spread evenly over databases, whatever the order of their names."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shard_router.databases import DatabaseMap
from shard_router.hashing import slot_of
from shard_router.ring import Ring, even

NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,12}", fullmatch=True), min_size=1, max_size=6, unique=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), NAMES, st.randoms(use_true_random=False))
def test_every_slot_has_one_database_and_they_are_even(slots: int, names: list[str], rng: object) -> None:
    made = DatabaseMap(slots, tuple(names))
    sizes = [len(made.slots_of(name)) for name in names]
    assert sum(sizes) == slots
    assert max(sizes) - min(sizes) <= 1
    assert frozenset[int]().union(*(made.slots_of(name) for name in names)) == set(range(slots))
    rng.shuffle(names)  # type: ignore[attr-defined]  # a random.Random
    again = DatabaseMap(slots, tuple(names))
    assert {name: made.slots_of(name) for name in names} == {name: again.slots_of(name) for name in names}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), NAMES, st.lists(st.text(max_size=8), max_size=40))
def test_a_cut_loses_and_invents_nothing(slots: int, names: list[str], ids: list[str]) -> None:
    made = DatabaseMap(slots, tuple(names))
    cut = made.cut(ids)
    assert sorted(place for places in cut.values() for place in places) == list(range(len(ids)))
    for name, places in cut.items():
        assert places == sorted(places)
        assert all(slot_of(ids[place], slots) in made.slots_of(name) for place in places)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=60, unique=True), NAMES)
def test_a_key_goes_to_the_first_of_its_order_that_has_room(keys: list[str], names: list[str]) -> None:
    owners, ring = even(keys, names), Ring(dict.fromkeys(names, 1.0))
    share = len(keys) // len(names)
    for at, (key, owner) in enumerate(zip(keys, owners, strict=True)):
        passed = ring.preference(key)[: ring.preference(key).index(owner)]
        assert all(owners[:at].count(other) >= share for other in passed)
