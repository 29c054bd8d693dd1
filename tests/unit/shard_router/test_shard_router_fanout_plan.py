"""Which replicas a query asks."""

import random
from collections import Counter

from shard_router.fanout_plan import FanoutPlan, ShardCall, plan_fanout
from shard_router.shard_map import ShardMap

MAP = ShardMap(5, (0, 1, 2, 0, 1, 2))


def test_every_shard_is_asked_once_for_all_its_slots() -> None:
    plan = plan_fanout(MAP, {0: [0], 1: [3], 2: [None, 9]}, random.Random(1))
    assert plan == FanoutPlan(5, (ShardCall(0, 0), ShardCall(1, 0), ShardCall(2, 1)), ())
    assert {call.slots for call in plan.calls} == {None}


def test_a_shard_without_a_replica_up_is_unreachable() -> None:
    plan = plan_fanout(MAP, {0: [None, None], 1: [0.0]}, random.Random(1))
    assert plan == FanoutPlan(5, (ShardCall(1, 0),), (0, 2))


def test_of_two_replicas_the_less_loaded_answers() -> None:
    rng = random.Random(1)
    plans = [plan_fanout(MAP, {0: [4, 2], 1: [2, 4], 2: [1, None, 0]}, rng) for _ in range(50)]
    assert {tuple(call.replica for call in plan.calls) for plan in plans} == {(1, 0, 2)}


def test_equals_share_evenly() -> None:
    rng = random.Random(1)
    chosen = Counter(
        plan_fanout(ShardMap(1, (0,)), {0: [0, 0, 0]}, rng).calls[0].replica for _ in range(3_000)
    )
    assert all(900 < chosen[replica] < 1_100 for replica in range(3))


def test_the_most_loaded_of_many_is_never_asked() -> None:
    rng = random.Random(1)
    plans = [plan_fanout(ShardMap(1, (0,)), {0: [1, 2, 3, 9]}, rng) for _ in range(500)]
    chosen = Counter(plan.calls[0].replica for plan in plans)
    assert chosen[3] == 0
    assert chosen[0] > chosen[1] > chosen[2] > 0


def test_the_same_chance_makes_the_same_plan() -> None:
    loads = {shard: [0.0] * 4 for shard in range(3)}
    plans = {plan_fanout(MAP, loads, random.Random(7)) for _ in range(3)}
    assert len(plans) == 1
