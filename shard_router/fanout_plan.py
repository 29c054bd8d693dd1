"""Which replica answers for which shard in one query."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shard_router.shard_map import ShardMap


@dataclass(frozen=True, slots=True)
class ShardCall:
    """One replica to ask. `slots` are those it is asked for; None means all that its shard owns."""

    shard: int
    replica: int
    slots: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class FanoutPlan:
    """The calls of one query, at most one a shard, and the shards that no replica can answer for."""

    epoch: int
    calls: tuple[ShardCall, ...]
    unreachable: tuple[int, ...] = ()


def plan_fanout(
    shard_map: ShardMap, loads: Mapping[int, Sequence[float | None]], rng: random.Random
) -> FanoutPlan:
    """One replica of every shard, the less loaded of two drawn at random (Mitzenmacher, 2001).

    `loads[shard][replica]` counts what is in flight there, None where it is down. A shard with no replica
    up, or not in `loads`, is unreachable. Shards ascend in the plan.
    """
    calls, unreachable = [], []
    for shard in shard_map.shards:
        up = [(load, replica) for replica, load in enumerate(loads.get(shard, ())) if load is not None]
        if up:
            calls.append(ShardCall(shard, _less_loaded(up, rng)))
        else:
            unreachable.append(shard)
    return FanoutPlan(shard_map.epoch, tuple(calls), tuple(unreachable))


def _less_loaded(up: Sequence[tuple[float, int]], rng: random.Random) -> int:
    """The replica of the smaller load among two of these (load, replica); chance decides between equals."""
    if len(up) == 1:
        return up[0][1]
    # Two draws of random() cost a tenth of sample().
    first = int(rng.random() * len(up))
    second = int(rng.random() * (len(up) - 1))
    second += second >= first
    (load, replica), (other_load, other_replica) = up[first], up[second]
    return replica if load <= other_load else other_replica
