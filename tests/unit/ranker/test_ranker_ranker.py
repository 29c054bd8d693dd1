from itertools import pairwise

import numpy as np
import pytest

from services.ranker.ranker import Ranker
from shard_router.errors import InvalidField
from shard_router.model import AttributeType, Hit, Version

SCHEMA = {
    "stars": AttributeType.INT,
    "price": AttributeType.FLOAT,
    "free": AttributeType.BOOL,
    "released": AttributeType.TIMESTAMP,
    "brand": AttributeType.KEYWORD,
    "tags": AttributeType.KEYWORDS,
}


def hit(score: float, vector: tuple[float, ...] | None = None, **attributes: object) -> Hit:
    array = None if vector is None else np.array(vector, dtype=np.float32)
    return Hit(f"{score}", score, Version(1, 1), attributes, None, array)


def rank(candidates, weights=None, *, mmr_lambda=None, group_by=None, per_group=1, k=10):
    return Ranker().rank(
        candidates, weights or {}, mmr_lambda=mmr_lambda, group_by=group_by, per_group=per_group, k=k
    )


def test_no_weights_is_the_order_of_similarity():
    ranked = rank([hit(0.1), hit(0.9), hit(0.5)], k=2)
    assert ranked.order == [1, 2]
    np.testing.assert_allclose(ranked.scores, [0.9, 0.5])
    assert ranked.features == [{"similarity": pytest.approx(0.9)}, {"similarity": pytest.approx(0.5)}]


def test_weights_move_candidates_and_the_features_say_why():
    candidates = [hit(0.9, stars=1, free=False), hit(0.8, stars=5, free=True), hit(0.7)]
    ranked = rank(candidates, {"stars": 0.5, "free": 0.1})
    assert ranked.order == [1, 0, 2]
    assert ranked.features[0] == {"similarity": pytest.approx(0.8), "stars": 1.0, "free": 1.0}
    assert ranked.features[2] == {"similarity": pytest.approx(0.7), "stars": 0.0, "free": 0.0}
    np.testing.assert_allclose(ranked.scores, [1.4, 1.2, 0.7], rtol=1e-6)


def test_ties_keep_the_candidates_order():
    assert rank([hit(0.5), hit(0.5), hit(0.5)]).order == [0, 1, 2]


def test_groups_are_filled_by_the_next_best():
    candidates = [hit(s, brand=b) for s, b in [(0.9, "x"), (0.8, "x"), (0.7, "x"), (0.6, "y"), (0.5, "y")]]
    assert rank(candidates, group_by="brand", per_group=1).order == [0, 3]
    assert rank(candidates, group_by="brand", per_group=2, k=3).order == [0, 1, 3]


def test_mmr_spreads_what_the_groups_leave_and_the_answer_stays_full():
    """Two brands that resemble each other: groups leave four, MMR picks the two least alike."""
    candidates = [
        hit(0.90, (1, 0), brand="x"),
        hit(0.89, (1, 0), brand="x"),
        hit(0.88, (1, 0), brand="x"),
        hit(0.80, (0, 1), brand="y"),
        hit(0.79, (0.9, 0.1), brand="z"),
    ]
    ranked = rank(candidates, mmr_lambda=0.5, group_by="brand", per_group=2, k=3)
    assert ranked.order[:2] == [0, 3]
    assert len(ranked.order) == 3
    np.testing.assert_allclose(ranked.scores, [candidates[i].score for i in ranked.order])


def test_no_candidates_is_an_empty_answer():
    ranked = rank([], {"stars": 1.0}, mmr_lambda=0.5, group_by="brand")
    assert (ranked.order, ranked.features, len(ranked.scores)) == ([], [], 0)


def test_mmr_without_vectors_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="vector"):
        rank([hit(0.9)], mmr_lambda=0.5)


@pytest.mark.parametrize("value", ["5", ("5",)])
def test_an_attribute_that_is_no_number_is_named(value):
    with pytest.raises(InvalidField) as refusal:
        rank([hit(0.9), hit(0.8, stars=value)], {"stars": 1.0})
    assert refusal.value.field == "rank.features.stars"


@pytest.mark.parametrize("name", ["stars", "price", "free", "released", "similarity"])
def test_ordered_attributes_and_similarity_are_accepted(name):
    Ranker().check(SCHEMA, {name: -1.5}, mmr_lambda=0.0, group_by="tags", per_group=1)


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("rank.features.brand", {"weights": {"brand": 1.0}}),
        ("rank.features.tags", {"weights": {"tags": 1.0}}),
        ("rank.features.unknown", {"weights": {"unknown": 1.0}}),
        ("rank.features.stars", {"weights": {"stars": float("nan")}}),
        ("rank.features.similarity", {"weights": {"similarity": float("inf")}}),
        ("diversity.mmr_lambda", {"mmr_lambda": 1.1}),
        ("diversity.mmr_lambda", {"mmr_lambda": float("nan")}),
        ("diversity.group_by", {"group_by": "unknown"}),
        ("diversity.per_group", {"group_by": "brand", "per_group": 0}),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name_before_retrieval(field, asked):
    with pytest.raises(InvalidField) as refusal:
        Ranker().check(SCHEMA, **{"weights": {}, **asked})
    assert refusal.value.field == field


def test_counts_what_it_did():
    ticks = iter(range(100))
    ranker = Ranker(clock=lambda: float(next(ticks)))
    for count in (3, 4):
        ranked = ranker.rank([hit(0.1)] * count, {}, mmr_lambda=None, group_by=None, per_group=1, k=2)
        assert (ranked.score_ms, ranked.diversify_ms) == (1_000, 1_000)
    assert ranker.stats() == {"rankings_total": 2, "candidates_total": 7, "rank_took_total_ms": 6_000}


def test_a_thousand_candidates_of_twenty_features_come_out_in_order():
    rng = np.random.default_rng(3)
    names = [f"f{i}" for i in range(20)]
    table = rng.integers(0, 500, (1_000, 20)).tolist()
    candidates = [
        hit(float(s), **dict(zip(names, row, strict=True)))
        for s, row in zip(rng.random(1_000), table, strict=True)
    ]
    ranked = rank(candidates, dict.fromkeys(names, 0.1), k=1_000)
    assert sorted(ranked.order) == [*range(1_000)]
    assert all(a >= b for a, b in pairwise(ranked.scores))
    for features, score in zip(ranked.features[:50], ranked.scores[:50], strict=True):
        assert score == pytest.approx(
            features["similarity"] + 0.1 * sum(features[name] for name in names), rel=1e-5
        )
