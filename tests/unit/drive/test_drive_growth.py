"""A leak is seen through noise and steps; noise and steps alone are no leak."""

import numpy as np
import pytest

from loadtests.drive.growth import Bound, growth

TIMES = np.arange(0.0, 1_200.0, 2.0)
BOUND = Bound(16.0, 0.05)


def noise(seed: int, spread: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, len(TIMES))


@pytest.mark.parametrize("spread", [0.0, 5.0, 50.0])
def test_noise_alone_is_no_growth(spread: float) -> None:
    for seed in range(20):
        assert not growth("memory", TIMES, 400 + noise(seed, spread), BOUND).beyond_noise


def test_filling_caches_are_no_growth() -> None:
    values = 400 + 200 * (1 - np.exp(-TIMES / 60)) + noise(1, 5)
    assert not growth("memory", TIMES, values, BOUND).beyond_noise


def test_spikes_are_no_growth() -> None:
    values = 400 + noise(2, 2)
    values[::7] += 300
    assert not growth("memory", TIMES, values, BOUND).beyond_noise


@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_a_leak_is_growth(spread: float) -> None:
    found = growth("memory", TIMES, 400 + 0.1 * TIMES + noise(3, spread), BOUND)
    assert found.grew == pytest.approx(80, rel=0.1)
    assert found.beyond_noise
    assert "memory" in str(found)


def test_a_leaked_handle_a_minute_is_growth() -> None:
    assert growth("handles", TIMES, 60 + TIMES // 60, Bound(8)).beyond_noise


def test_six_samples_are_needed() -> None:
    with pytest.raises(ValueError, match="5 samples"):
        growth("x", TIMES[:5], TIMES[:5], BOUND)
