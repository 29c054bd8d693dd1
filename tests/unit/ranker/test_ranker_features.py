import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.ranker.features import blend, percentile

NULL = float("nan")
values = st.lists(st.one_of(st.just(NULL), st.integers(-3, 3), st.floats(allow_nan=False)), max_size=30)


def shares(*values: float) -> list[float]:
    return percentile(np.array(values, dtype=np.float64)).tolist()


def test_the_best_beats_all_others_and_the_worst_none():
    assert shares(10, 30, 20) == [0.0, 1.0, 0.5]


def test_equal_values_share_their_mean():
    assert shares(1, 5, 5, 9) == [0.0, 0.5, 0.5, 1.0]
    assert shares(7, 7, 7) == [0.5, 0.5, 0.5]


def test_null_beats_nobody_and_every_value_beats_it():
    assert shares(NULL, -5, 5) == [0.0, 0.5, 1.0]
    assert shares(NULL, 4, NULL) == [0.0, 1.0, 0.0]
    assert shares(NULL, NULL) == [0.0, 0.0]


def test_one_or_no_candidate():
    assert shares(3) == [0.5]
    assert shares(NULL) == [0.0]
    assert shares() == []


@given(values)
def test_is_the_share_of_others_beaten_with_ties_at_half(values):
    expected = [
        0.0
        if v != v
        else sum(1.0 if w != w or w < v else 0.5 for j, w in enumerate(values) if j != i and not w > v)
        / (len(values) - 1)
        if len(values) > 1
        else 0.5
        for i, v in enumerate(values)
    ]
    np.testing.assert_allclose(shares(*values), expected)


def test_similarity_counts_one_unless_it_is_named():
    similarity = np.array([0.9, 0.1], dtype=np.float32)
    scores, features = blend(similarity, {}, {})
    np.testing.assert_array_equal(scores, similarity)
    assert scores.dtype == np.float32
    assert features.keys() == {"similarity"}
    scores, _ = blend(similarity, {}, {"similarity": -2.0})
    np.testing.assert_allclose(scores, [-1.8, -0.2], rtol=1e-6)


def test_scores_are_weighted_sums_of_the_features_they_report():
    similarity = np.array([0.5, 0.6, 0.7], dtype=np.float32)
    numbers = {"stars": np.array([3.0, 1.0, NULL]), "age": np.array([1.0, 2.0, 2.0]), "spare": np.zeros(3)}
    scores, features = blend(similarity, numbers, {"stars": 0.5, "age": -1.0})
    assert features.keys() == {"similarity", "stars", "age"}
    np.testing.assert_allclose(features["stars"], [1.0, 0.5, 0.0])
    np.testing.assert_allclose(features["age"], [0.0, 0.75, 0.75])
    np.testing.assert_allclose(scores, [1.0, 0.1, -0.05], atol=1e-6)
