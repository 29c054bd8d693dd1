import numpy as np
import pytest

from index_builder.segments import similarity
from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_cosine_vectors_have_length_one_and_zero_stays_zero() -> None:
    vectors = np.vstack([normal(3, 7), np.zeros((1, 7), np.float32)])
    prepared = similarity.prepare(vectors, Metric.COSINE)
    assert np.allclose(np.linalg.norm(prepared, axis=1), [1, 1, 1, 0], atol=1e-6)
    assert prepared.dtype == np.float32


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_length_does_not_matter_under_cosine_however_extreme(factor: float) -> None:
    vectors = normal(4, 5)
    scaled = (vectors.astype(np.float64) * factor).astype(np.float32)
    assert np.allclose(
        similarity.prepare(scaled, Metric.COSINE), similarity.prepare(vectors, Metric.COSINE), atol=1e-6
    )


def test_a_vector_is_prepared_alike_whatever_comes_with_it() -> None:
    vectors = np.vstack([normal(50, 3), np.zeros((1, 3)), normal(2, 3) * 1e-20]).astype(np.float32)
    together = similarity.prepare(vectors, Metric.COSINE)
    for row in range(len(vectors)):
        assert (similarity.prepare(vectors[row : row + 1], Metric.COSINE)[0] == together[row]).all()


@pytest.mark.parametrize("metric", [Metric.INNER_PRODUCT, Metric.L2])
def test_other_metrics_keep_vectors_as_they_are(metric: Metric) -> None:
    vectors = normal(3, 4)
    out = np.empty_like(vectors)
    assert similarity.prepare(vectors, metric) is vectors
    assert (similarity.prepare(vectors, metric, out=out) == vectors).all()


@pytest.mark.parametrize("dim", [2, 3, 64, 384, 1000])
@pytest.mark.parametrize("metric", list(Metric))
def test_a_score_does_not_depend_on_the_rows_beside_it(metric: Metric, dim: int) -> None:
    rows, query = normal(600, dim), normal(dim)
    together = similarity.scores(query, rows, metric)
    some = RNG.permutation(600)[:37]
    assert (similarity.scores(query, rows[some], metric) == together[some]).all()
    assert similarity.scores(query, rows[5:6], metric)[0] == together[5]


def test_l2_is_minus_the_squared_distance_even_far_from_the_origin() -> None:
    rows = np.array([[10_000.0, 1.0], [10_000.0, 1.5], [10_000.5, 1.0]], np.float32)
    assert similarity.scores(rows[0], rows, Metric.L2).tolist() == [0.0, -0.25, -0.25]


@pytest.mark.parametrize("n", [1, 5, 100, 4095, 4096, 4111, 20_000])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_best_is_the_head_of_the_sorted_values(n: int, k: int) -> None:
    values = RNG.integers(0, 1000, n).astype(np.float32)
    found = similarity.best(values, k)
    assert values[found].tolist() == sorted(values.tolist(), reverse=True)[:k]
    assert len(set(found.tolist())) == min(k, n)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("metric", list(Metric))
def test_a_scan_finds_the_best_allowed_rows_and_pads(share: float, metric: Metric) -> None:
    queries, rows = normal(3, 8), normal(300, 8)
    allowed = RNG.random(300) < share
    found, where = similarity.scan(queries, rows, RowSet(allowed), 20, metric)
    for i, query in enumerate(queries):
        usable = np.flatnonzero(allowed)
        values = similarity.scores(query, rows[usable], metric)
        n = min(20, len(usable))
        assert where[i, :n].tolist() == usable[np.argsort(-values)][:n].tolist()
        assert found[i, :n].tolist() == sorted(values.tolist(), reverse=True)[:n]
        assert (where[i, n:] == -1).all()
        assert (found[i, n:] == -np.inf).all()
