import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ranker.scoring import group, mmr

#: Two near-equal pairs and one apart.
VECTORS = np.array([[1, 0], [0.99, 0.1], [0, 1], [0.1, 0.99], [-1, -1]], dtype=np.float32)
SCORES = np.array([1.0, 0.9, 0.8, 0.7, 0.0], dtype=np.float32)


def test_lambda_one_is_the_order_of_scores():
    scores = np.array([0.2, 0.9, 0.9, 0.5], dtype=np.float32)
    assert mmr(VECTORS[:4], scores, 4, 1.0).tolist() == [1, 2, 3, 0]


def test_lambda_zero_goes_to_the_farthest_next():
    assert mmr(VECTORS, SCORES, 3, 0.0).tolist() == [0, 4, 2]


def test_a_near_copy_yields_to_something_new():
    assert mmr(VECTORS, SCORES, 5, 0.5).tolist()[:2] == [0, 2]


def test_lengths_of_vectors_do_not_count():
    lengths = np.array([[3.0], [0.01], [100.0], [1.0], [7.0]], dtype=np.float32)
    assert mmr(VECTORS * lengths, SCORES, 5, 0.3).tolist() == mmr(VECTORS, SCORES, 5, 0.3).tolist()


def test_a_zero_vector_resembles_nothing():
    vectors = np.array([[1, 0], [1, 0], [0, 0]], dtype=np.float32)
    assert mmr(vectors, np.array([1.0, 0.9, 0.8]), 2, 0.5).tolist() == [0, 2]


@pytest.mark.parametrize(("k", "n"), [(0, 3), (10, 3), (3, 0)])
def test_asked_for_more_or_less_than_there_is(k, n):
    chosen = mmr(np.eye(3, dtype=np.float32)[:n], np.ones(n), k, 0.5)
    assert chosen.dtype == np.int64
    assert sorted(chosen.tolist()) == [*range(min(k, n))]


@given(st.integers(1, 12), st.integers(1, 14), st.floats(0, 1), st.integers(0, 999))
def test_is_the_greedy_choice_of_the_definition(n, k, lam, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = rng.random(n)
    spread = scores.max() - scores.min() or 1.0
    relevance = (scores - scores.min()) / spread
    chosen = mmr(vectors, scores, k, lam).tolist()
    assert len(chosen) == len(set(chosen)) == min(n, k)
    assert scores[chosen[0]] == scores.max()
    for step in range(1, len(chosen)):
        gains = {
            i: lam * relevance[i] - (1 - lam) * max(float(vectors[i] @ vectors[j]) for j in chosen[:step])
            for i in range(n)
            if i not in chosen[:step]
        }
        assert gains[chosen[step]] >= max(gains.values()) - 1e-5


def test_groups_are_limited_in_the_given_order():
    values = ["a", "a", "b", "a", "b", "c"]
    assert group(values, [5, 3, 0, 1, 2, 4], 1, 10) == [5, 3, 2]
    assert group(values, range(6), 2, 10) == [0, 1, 2, 4, 5]
    assert group(values, range(6), 2, 3) == [0, 1, 2]


def test_no_value_is_never_limited_and_lists_are_values():
    assert group([None, None, ("x",), ("x",)], range(4), 1, 10) == [0, 1, 2]
