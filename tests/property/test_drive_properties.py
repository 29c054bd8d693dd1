"""Schedules keep their rate and their order, keys their shares, histograms their quantiles."""

import math
import random
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.drive import arrivals
from loadtests.drive.keys import Hot, Uniform, Zipf, chooser
from loadtests.drive.saturation import CLOSE_ENOUGH, STEPS_MOST, Step, next_rate, saturation
from loadtests.drive.tally import Latencies, Tallies

RATES = st.floats(0.5, 200)
SECONDS = st.floats(0.5, 20)


@settings(deadline=None)
@given(SECONDS, RATES, st.floats(0, 20), st.floats(0.1, 5), st.floats(1, 10))
def test_pieces_cover_the_run_with_one_spike_in_it(
    seconds: float, rate: float, at_s: float, for_s: float, factor: float
) -> None:
    found = arrivals.pieces(seconds, rate, [(at_s, for_s, factor)])
    assert sum(piece.seconds for piece in found) == pytest.approx(seconds)
    within = max(0.0, min(at_s + for_s, seconds) - min(at_s, seconds))
    calls = sum(piece.seconds * piece.rate for piece in found)
    assert calls == pytest.approx(rate * (seconds - within) + rate * factor * within)


@settings(deadline=None)
@given(SECONDS, RATES, st.integers(1, 4))
def test_constant_arrivals_of_all_sharers_are_evenly_apart(seconds: float, rate: float, shares: int) -> None:
    rates = arrivals.pieces(seconds, rate)
    all_s = sorted(
        at_s for share in range(shares) for at_s in arrivals.schedule(arrivals.constant(share, shares), rates)
    )
    assert abs(len(all_s) - seconds * rate) <= 1
    assert np.diff(all_s) == pytest.approx(1 / rate)
    assert all(0 <= at_s <= seconds for at_s in all_s)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_poisson_arrivals_rise_and_keep_their_rate_through_a_spike(seed: int, shares: int) -> None:
    rates = arrivals.pieces(30.0, 40.0, [(10.0, 10.0, 10.0)])
    all_s: list[float] = []
    for share in range(shares):
        one_s = list(arrivals.schedule(arrivals.poisson(random.Random(seed + share), shares), rates))
        assert one_s == sorted(one_s)
        all_s += one_s
    spike = sum(10 <= at_s < 20 for at_s in all_s)
    # Seven standard deviations: once in 10^11.
    assert abs(spike - 4_000) < 7 * math.sqrt(4_000)
    assert abs(len(all_s) - spike - 800) < 7 * math.sqrt(800)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(list(islice(arrivals.poisson(random.Random(4)), 20_000)))
    assert gaps.mean() == pytest.approx(1, abs=0.05)
    assert gaps.std() == pytest.approx(1, abs=0.05)
    assert (gaps > 1).mean() == pytest.approx(math.exp(-1), abs=0.02)


@settings(deadline=None)
@given(
    st.sampled_from([Uniform(), Zipf(0.8), Zipf(2.0), Hot(0.9, 0.1), Hot(0.5, 1.0), Hot(0.9, 0.3, 2.0)]),
    st.integers(1, 50),
    st.integers(0, 2**32),
    st.floats(0, 1e4),
)
def test_a_key_is_always_one_of_the_population(
    keys: Uniform | Zipf | Hot, population: int, seed: int, at_s: float
) -> None:
    choose = chooser(keys, population, random.Random(seed))
    assert all(0 <= choose(at_s) < population for _ in range(50))


def test_keys_have_the_shares_they_are_named_for() -> None:
    draws, population = 40_000, 100
    zipf = chooser(Zipf(1.0), population, random.Random(1))
    counts = np.bincount([zipf(0.0) for _ in range(draws)], minlength=population)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)
    hot = Hot(0.9, 0.1, move_every_s=5.0)
    choose = chooser(hot, population, random.Random(1))
    for at_s, first in ((0.0, 0), (4.9, 0), (5.0, 10), (50.0, 0)):
        assert hot.first(at_s, population) == first
        found = np.array([choose(at_s) for _ in range(10_000)])
        assert ((found - first) % population < 10).mean() == pytest.approx(0.9, abs=0.02)


@settings(deadline=None)
@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=200), st.sampled_from([50.0, 90.0, 99.0, 100.0]))
def test_a_quantile_is_a_value_that_so_many_keep_within(seconds: list[float], percent: float) -> None:
    latencies = Latencies()
    for each in seconds:
        latencies.add(each)
    told = latencies.quantile_ms(percent)
    # HdrHistogram takes the nearest rank.
    rank = max(1, int(percent / 100 * len(seconds) + 0.5))
    true = sorted(seconds)[rank - 1] * 1e3
    assert told == pytest.approx(true, rel=2e-3, abs=2e-3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(1e-4, 10)), max_size=60), st.integers(1, 4))
def test_the_parts_of_several_processes_add_up(calls: list[tuple[str, float]], parts: int) -> None:
    whole, split = Tallies(), [Tallies() for _ in range(parts)]
    for number, (name, seconds) in enumerate(calls):
        for tallies in (whole, split[number % parts]):
            tallies.of(name).answered("OK" if number % 3 else "UNAVAILABLE", seconds, seconds / 2)
            tallies.second(number / 7).latency.add(seconds)
            tallies.lateness.add(seconds)
    joined = Tallies()
    for part in split:
        joined.merge_encoded(part.encoded())
    assert joined.all().codes == whole.all().codes
    assert joined.all().latency.told() == whole.all().latency.told()
    assert joined.lateness.told() == whole.lateness.told()
    for number, second in whole.seconds.items():
        assert joined.seconds[number].latency.count == second.latency.count


@settings(deadline=None)
@given(st.floats(1, 1e5), st.floats(1, 1e4))
def test_saturation_is_found_to_within_a_tenth(true_rate: float, first: float) -> None:
    steps: list[Step] = []
    while (rate := next_rate(steps, first, 100.0)) is not None:
        holds = rate <= true_rate
        steps.append(Step(rate, 1.0 if holds else 0.5, 10.0))
    found = saturation(steps, 100.0)
    if len(steps) < STEPS_MOST:
        assert true_rate / (1 + CLOSE_ENOUGH) <= found <= true_rate
    assert len(steps) <= STEPS_MOST


def test_a_rate_whose_tail_is_beyond_the_limit_is_not_sustained() -> None:
    steps = [Step(10, 1.0, 50), Step(20, 1.0, 150), Step(40, 1.0, 20)]
    assert saturation(steps, 100) == 10
    assert saturation(steps, 200) == 40
