"""The ring's order, and how little of it moves."""

import json
from collections import Counter
from pathlib import Path

import pytest

from shard_router.ring import Ring

KEYS = [f"key-{i}" for i in range(4_000)]


def test_the_order_stays() -> None:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())["ring"]
    ring = Ring(golden["weights"])
    assert {key: list(ring.preference(key)) for key in golden["preference"]} == golden["preference"]


def test_the_owner_is_the_first_preference_and_every_node_appears_once() -> None:
    ring = Ring({"a": 1.0, "b": 2.0, "c": 0.1})
    for key in KEYS[:200]:
        preference = ring.preference(key)
        assert preference[0] == ring.owner(key)
        assert sorted(preference) == ["a", "b", "c"]


def test_a_node_more_only_takes() -> None:
    before, after = Ring({"a": 1, "b": 1, "c": 1}), Ring({"a": 1, "b": 1, "c": 1, "d": 1})
    moved = [key for key in KEYS if before.owner(key) != after.owner(key)]
    assert {after.owner(key) for key in moved} == {"d"}
    assert 0.15 < len(moved) / len(KEYS) < 0.35


def test_weights_are_shares() -> None:
    ring = Ring({"small": 1.0, "large": 3.0}, virtual_nodes=512)
    share = Counter(map(ring.owner, KEYS))["large"] / len(KEYS)
    assert 0.65 < share < 0.85


def test_a_node_of_weight_zero_is_not_on_the_ring() -> None:
    assert Ring({"a": 1.0, "b": 0.0}).preference("key") == ("a",)


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}])
def test_a_ring_needs_a_node(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        Ring(weights)
