import random

import pytest

from services.cache.breaker import Breaker, Down, Trial, Up


class Middle(random.Random):
    """No spread: every pause is as long as it says."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(Middle(), budget=3, backoff_ms=100, max_backoff_ms=500)


def fail(breaker: Breaker, times: int, now_s: float = 0.0) -> list[bool]:
    return [breaker.failed(now_s) for _ in range(times)]


def test_opens_after_failures_in_a_row(breaker):
    assert fail(breaker, 3) == [False, False, True]
    assert breaker.state == Down(0.1)
    assert not breaker.allows


def outcomes(breaker: Breaker, successes: int, rounds: int) -> bool:
    """Whether it is still closed after so many rounds of successes and one failure."""
    for _ in range(rounds):
        for _ in range(successes):
            breaker.succeeded()
        breaker.failed(0.0)
    return breaker.allows


def test_a_failure_now_and_then_keeps_it_closed(breaker):
    assert outcomes(breaker, successes=11, rounds=1_000)


def test_failing_every_few_times_opens_it(breaker):
    assert outcomes(breaker, successes=4, rounds=3)
    assert not outcomes(breaker, successes=4, rounds=3)


def test_what_was_under_way_when_it_opened_changes_nothing(breaker):
    fail(breaker, 3)
    breaker.succeeded()
    assert fail(breaker, 3, now_s=9.0) == [False] * 3
    assert breaker.state == Down(0.1)


def test_a_probe_lets_operations_try_and_their_success_closes_it(breaker):
    fail(breaker, 3)
    breaker.probed(True, 0.1)
    assert breaker.state == Trial()
    assert breaker.allows
    breaker.succeeded()
    assert breaker.state == Up()
    fail(breaker, 3, now_s=1.0)
    assert breaker.state == Down(1.1)


def test_one_failure_on_trial_opens_it_for_twice_as_long(breaker):
    fail(breaker, 3)
    breaker.probed(True, 0.1)
    assert fail(breaker, 1, now_s=1.0) == [True]
    assert breaker.state == Down(1.2)


def test_pauses_double_up_to_the_longest(breaker):
    fail(breaker, 3)
    pauses = []
    for now_s in range(1, 5):
        breaker.probed(False, now_s)
        pauses.append(round(breaker.state.retry_at_s - now_s, 3))
    assert pauses == [0.2, 0.4, 0.5, 0.5]


def test_pauses_are_spread_so_that_gateways_do_not_probe_in_step():
    pauses = set()
    for seed in range(10):
        breaker = Breaker(random.Random(seed), budget=1)
        breaker.failed(0.0)
        pauses.add(breaker.state.retry_at_s)
    assert len(pauses) == 10
    assert all(0.08 <= pause <= 0.12 for pause in pauses)
