"""Which database keeps which slots: the stored collections rely on it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from memory_log import collection

from shard_router.databases import DatabaseMap, databases_of
from shard_router.hashing import slot_of


@pytest.mark.parametrize("names", ["home, east", "home, east, west"])
def test_maps_stay(names: str) -> None:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())["databases"][names]
    made = DatabaseMap(64, tuple(names.split(", ")))
    for number, name in enumerate(made.names):
        assert made.slots_of(name) == {slot for slot, owner in enumerate(golden) if owner == number}


def test_ids_are_cut_by_their_slots_in_order() -> None:
    made = databases_of(replace(collection(), databases=("home", "east")))
    ids = [f"d{i}" for i in range(100)]
    cut = made.cut(ids)
    assert sorted(place for places in cut.values() for place in places) == list(range(100))
    for name, places in cut.items():
        assert places == sorted(places)
        assert {slot_of(ids[place], 16) for place in places} <= made.slots_of(name)
    assert made.cut([]) == {}


def test_more_databases_than_slots_leave_some_without() -> None:
    made = DatabaseMap(1, ("home", "east"))
    assert sorted(len(made.slots_of(name)) for name in made.names) == [0, 1]
    assert len(made.cut(["a", "b"])) == 1


def test_there_is_no_map_without_a_database() -> None:
    with pytest.raises(ValueError, match="needs a node"):
        DatabaseMap(16, ())
