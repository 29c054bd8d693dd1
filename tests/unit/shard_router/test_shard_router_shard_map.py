"""Shard maps: the stored ones, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from shard_router.errors import AlreadyExists, InvalidField, NotFound, PreconditionFailed
from shard_router.shard_map import ShardMap


def test_maps_stay() -> None:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())["shard_map"]
    created = ShardMap.create(128, 3)
    grown = created.add_shard(3)
    assert list(created.owners) == golden["create(128, 3)"]
    assert list(grown.owners) == golden["add_shard(3)"]
    assert list(grown.drain_shard(0).owners) == golden["drain_shard(0)"]


def test_slots_of_a_shard() -> None:
    shard_map = ShardMap(7, (2, 0, 2, 0, 2))
    assert shard_map.shards == (0, 2)
    assert shard_map.slots_of(2).tolist() == [0, 2, 4]
    assert shard_map.slots_of(2).dtype == np.int32
    assert shard_map.slots_of(1).tolist() == []


def test_every_change_is_an_epoch() -> None:
    created = ShardMap.create(8, 2)
    assert (created.epoch, created.add_shard(9).epoch, created.drain_shard(1).epoch) == (1, 2, 2)


def test_a_new_shard_steals_from_the_fullest_of_an_uneven_map() -> None:
    shard_map = ShardMap(1, (0,) * 9 + (1,) * 3)
    grown = shard_map.add_shard(2)
    assert [len(grown.slots_of(shard)) for shard in (0, 1, 2)] == [5, 3, 4]


def test_a_drained_shard_fills_the_emptiest_first() -> None:
    drained = ShardMap(1, (0,) * 5 + (1,) * 2 + (2,) * 3).drain_shard(2)
    assert [len(drained.slots_of(shard)) for shard in (0, 1)] == [5, 5]


@pytest.mark.parametrize("shards", [-1, 0, 5])
def test_every_shard_gets_a_slot_or_the_number_is_refused(shards: int) -> None:
    with pytest.raises(InvalidField) as refused:
        ShardMap.create(4, shards)
    assert refused.value.field == "shards"


def test_what_cannot_change_is_refused() -> None:
    full = ShardMap.create(2, 2)
    with pytest.raises(AlreadyExists):
        full.add_shard(1)
    with pytest.raises(PreconditionFailed):
        full.add_shard(2)
    with pytest.raises(NotFound):
        full.drain_shard(2)
    with pytest.raises(PreconditionFailed):
        full.drain_shard(0).drain_shard(1)
