"""The policy against traces: what L1 takes off Redis, and how soon it follows a hot set that moves."""

import numpy as np

from loadtests.traces import FirstTier, recovery, zipf


def test_nine_tenths_on_a_tenth_with_room_for_a_tenth():
    before, after = recovery(20_000, 50_000, np.random.default_rng(1))
    assert before >= 0.80
    # The last tenth of 50,000 reads after the move.
    assert after[-1] >= before - 0.05
    assert after[0] < before - 0.05  # it did move


def test_zipf_with_room_for_a_hundredth():
    rng = np.random.default_rng(2)
    trace = zipf(100_000, 400_000, rng)
    tier = FirstTier(1_000)
    tier.relief(trace[:200_000])
    assert tier.relief(trace[200_000:]) >= 0.58
