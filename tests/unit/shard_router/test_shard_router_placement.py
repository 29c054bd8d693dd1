"""Where copies lie is the same in every release."""

import json
from collections.abc import Mapping
from pathlib import Path

from shard_router.placement import place
from shard_router.resharding import Copy


def told(placed: Mapping[Copy, str]) -> dict[str, str]:
    return {f"{copy.shard}/{copy.replica}": node for copy, node in placed.items()}


def test_golden_placements() -> None:
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())["placement"]
    first = place(range(4), 2, golden["weights"], {})
    assert told(first) == golden["first"]
    after = place(range(4), 2, {"a": 1.0, "c": 2.0, "d": 1.0}, first)
    assert told(after) == golden["b leaves, d comes"]
