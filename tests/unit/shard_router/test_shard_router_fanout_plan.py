"""Which replicas a query asks."""

import random
from collections import Counter

from shard_router.fanout_plan import (
    Ask,
    FanoutPlan,
    GiveUp,
    HedgeBudget,
    Latencies,
    ShardCall,
    ShardQuestion,
    Wait,
    plan_fanout,
    stale_pause_s,
)
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


def test_the_95th_percentile_is_of_the_latest_answers() -> None:
    latencies = Latencies()
    for _ in range(63):
        latencies.add(1.0)
    assert latencies.p95_ms is None
    for took_ms in range(1, 193):
        latencies.add(float(took_ms))
    assert latencies.p95_ms is not None
    assert 140 <= latencies.p95_ms <= 185
    for _ in range(320):
        latencies.add(3.0)
    assert latencies.p95_ms == 3.0


def test_second_questions_are_a_twentieth_of_the_first() -> None:
    budget = HedgeBudget()
    asked = 0
    for _ in range(2_000):
        budget.asked()
        asked += budget.spend()
    assert 100 <= asked <= 108


def test_a_late_answer_is_asked_for_once_more_at_the_least_loaded_other() -> None:
    question, budget = ShardQuestion(1, [5.0, 0.0, 2.0, None]), HedgeBudget()
    assert question.may_hedge
    assert question.late(budget) == Ask(2)
    assert not question.may_hedge
    assert question.late(budget) == Wait()
    # While the other is still asked, a failure asks nobody.
    assert question.failed(1, unavailable=True) == Wait()
    assert question.failed(2, unavailable=True) == Ask(0)
    assert question.failed(0, unavailable=True) == GiveUp()


def test_without_budget_or_another_nobody_else_is_asked() -> None:
    budget = HedgeBudget()
    while budget.spend():
        pass
    assert ShardQuestion(0, [0.0, 0.0]).late(budget) == Wait()
    assert not ShardQuestion(0, [0.0, None]).may_hedge
    assert ShardQuestion(0, [0.0, None]).late(HedgeBudget()) == Wait()


def test_an_unavailable_replica_is_retried_once_and_another_error_not_at_all() -> None:
    alone = ShardQuestion(0, [0.0])
    assert alone.failed(0, unavailable=True) == Ask(0)
    assert alone.failed(0, unavailable=True) == GiveUp()
    assert ShardQuestion(0, [0.0, 0.0]).failed(0, unavailable=True) == Ask(1)
    assert ShardQuestion(0, [0.0, 0.0]).failed(0, unavailable=False) == GiveUp()


def test_pauses_before_planning_again_grow_and_end_growing() -> None:
    pauses = [stale_pause_s(attempt) for attempt in range(1, 9)]
    assert pauses[0] == 0.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.05
