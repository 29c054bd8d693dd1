"""What filters mean: types, nulls and order, for one document and for columns alike."""

import pytest

from shard_router.columns import Columns
from shard_router.errors import InvalidFilter
from shard_router.filters import (
    All,
    AnyOf,
    Compare,
    Exists,
    Filter,
    In,
    Not,
    Op,
    Range,
    check,
    digest,
    evaluate,
    matches,
    parse,
)
from shard_router.model import Attributes, AttributeType

SCHEMA = {
    "name": AttributeType.KEYWORD,
    "rank": AttributeType.INT,
    "score": AttributeType.FLOAT,
    "yanked": AttributeType.BOOL,
    "released": AttributeType.TIMESTAMP,
    "tags": AttributeType.KEYWORDS,
    "unused": AttributeType.INT,
}
DAY_US = 86_400_000_000
DOCUMENTS: list[Attributes] = [
    {"name": "ray", "rank": 1, "score": 0.5, "yanked": False, "released": 0, "tags": ("ml", "rpc")},
    {"name": "faiss", "rank": 2, "score": 1.0, "yanked": True, "released": DAY_US, "tags": ()},
    {"name": "Ray", "rank": 2**60 + 1, "score": -1.0, "released": 2 * DAY_US, "tags": ("ml",)},
    {},
]


def rows(filter: Filter) -> list[int]:
    """The documents a filter finds; `matches` and `evaluate` have to agree on them."""
    found = [row for row, document in enumerate(DOCUMENTS) if matches(filter, document)]
    assert evaluate(filter, Columns.build(DOCUMENTS, SCHEMA)).nonzero()[0].tolist() == found
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('name = "ray"', [0]),
        ('name = "r"', []),
        ('name != "ray"', [1, 2]),
        ('name != "r"', [0, 1, 2]),
        ('name < "faiss"', [2]),
        ('name <= "faiss"', [1, 2]),
        ('name > "faiss"', [0]),
        ('name >= "faiss"', [0, 1]),
        ('name >= "fa"', [0, 1]),
        ('name < ""', []),
        ('name in ("faiss", "Ray", "numpy")', [1, 2]),
        ('name in ("faiss", "ray")', [0, 1]),
        ('name in ("numpy")', []),
        ("name in ()", []),
        ('range(name, >= "S", < "g")', [1]),
        ("rank < 2", [0]),
        ("rank != 2", [0, 2]),
        (f"rank = {2**60 + 1}", [2]),
        (f"rank = {2**60}", []),
        ("rank in (2, 3)", [1]),
        ("rank >= 1 and rank < 3", [0, 1]),
        ("range(rank, > 1, <= 2)", [1]),
        ("score = 1", [1]),
        ("score != 1", [0, 2]),
        ("score < 0.75", [0, 2]),
        ("score in (1, -1)", [1, 2]),
        ("yanked = true", [1]),
        ("yanked != true", [0]),
        ("yanked in (true, false)", [0, 1]),
        ('released = "1970-01-02"', [1]),
        ('released >= "1970-01-01T23:00:00-01:00"', [1, 2]),
        ('released < "1970-01-01T00:00:00.000001Z"', [0]),
        (f"released > {DAY_US}", [2]),
        ('tags = "ml"', [0, 2]),
        ('tags = "sql"', []),
        ('tags != "rpc"', [1, 2]),
        ('tags in ("rpc", "sql")', [0]),
        ('tags in ("rpc", "ml")', [0, 2]),
        ("exists(tags)", [0, 1, 2]),
        ("exists(yanked)", [0, 1]),
        ("exists(unused)", []),
        ("unused != 1", []),
        ("not unused = 1", [0, 1, 2, 3]),
        ("not rank < 2", [1, 2, 3]),
        ("rank not in (1, 2)", [2, 3]),
        ("not exists(name)", [3]),
        ("rank = 1 or yanked = true", [0, 1]),
        ("all()", [0, 1, 2, 3]),
        ("any()", []),
    ],
)
def test_a_filter_finds(text: str, expected: list[int]) -> None:
    assert rows(check(parse(text), SCHEMA)) == expected


@pytest.mark.parametrize("text", ["score != 1", "score in (1)", "range(score, < 1)", "exists(score)"])
def test_nan_is_null(text: str) -> None:
    filter, document = check(parse(text), SCHEMA), {"score": float("nan")}
    assert not matches(filter, document)
    assert not evaluate(filter, Columns.build([document, {}], SCHEMA)).any()


def test_evaluate_hands_over_a_fresh_array() -> None:
    columns = Columns.build(DOCUMENTS, SCHEMA)
    for text in ("exists(tags)", "exists(rank)", "all()", "unused = 1"):
        filter = check(parse(text), SCHEMA)
        before = evaluate(filter, columns).tolist()
        evaluate(filter, columns)[:] = [not value for value in before]
        assert evaluate(filter, columns).tolist() == before


@pytest.mark.parametrize(
    ("filter", "checked"),
    [
        (Compare("score", Op.LT, 5), Compare("score", Op.LT, 5.0)),
        (Compare("rank", Op.LT, 5.0), Compare("rank", Op.LT, 5)),
        (In("score", (1, 2.5)), In("score", (1.0, 2.5))),
        (
            Range("released", gte="1970-01-01T00:00:00.000001Z", lt="1970-01-02"),
            Range("released", gte=1, lt=DAY_US),
        ),
        (Not(AnyOf((Compare("released", Op.EQ, "1969-12-31T23:59:59.999999"),))), None),
    ],
)
def test_check_gives_values_their_attributes_type(filter: Filter, checked: Filter | None) -> None:
    wanted = checked or Not(AnyOf((Compare("released", Op.EQ, -1),)))
    assert repr(check(filter, SCHEMA)) == repr(wanted)
    assert check(wanted, SCHEMA) == wanted


@pytest.mark.parametrize(
    ("filter", "problem"),
    [
        (Exists("stars"), "there is no attribute 'stars'"),
        (All((Not(Compare("stars", Op.EQ, 1)),)), "there is no attribute 'stars'"),
        (Compare("rank", Op.EQ, "1"), "'rank' is of type int, and '1' is not"),
        (Compare("rank", Op.EQ, 1.5), "'rank' is of type int, and 1.5 is not"),
        (Compare("rank", Op.EQ, True), "'rank' is of type int, and True is not"),
        (Compare("rank", Op.EQ, 2**63), "'rank' is of type int, and 9223372036854775808 is not"),
        (Compare("score", Op.EQ, float("nan")), "'score' is of type float, and nan is not"),
        (Compare("score", Op.LT, float("inf")), "'score' is of type float, and inf is not"),
        (Compare("score", Op.LT, 10**400), "'score' is of type float, and 1000"),
        (Compare("score", Op.LT, False), "'score' is of type float, and False is not"),
        (Compare("yanked", Op.EQ, 1), "'yanked' is of type bool, and 1 is not"),
        (Compare("yanked", Op.LT, True), "'yanked' is of type bool, which has no order"),
        (Range("tags", gte="a"), "'tags' is of type keywords, which has no order"),
        (Compare("name", Op.EQ, 1), "'name' is of type keyword, and 1 is not"),
        (In("tags", ("a", 1)), "'tags' is of type keywords, and 1 is not"),
        (Compare("released", Op.LT, "yesterday"), "'released' is of type timestamp, and 'yesterday' is not"),
        (Compare("released", Op.LT, 0.5), "'released' is of type timestamp, and 0.5 is not"),
        (Range("rank"), "the range of 'rank' has no bound"),
    ],
)
def test_check_refuses_what_does_not_fit(filter: Filter, problem: str) -> None:
    with pytest.raises(InvalidFilter) as refused:
        check(filter, SCHEMA, "retrieve.filter")
    assert refused.value.field == "retrieve.filter"
    assert refused.value.problem.startswith(problem)
    assert len(refused.value.problem) < 120


def test_nesting_is_bounded() -> None:
    filter: Filter = Exists("rank")
    for _ in range(63):
        filter = Not(filter)
    assert check(filter, SCHEMA) == filter
    for deeper in (Not(filter), All((filter,)), AnyOf((Exists("name"), filter))):
        with pytest.raises(InvalidFilter, match="nested deeper than 64"):
            check(deeper, SCHEMA)


def test_filters_are_told_apart_by_their_digest() -> None:
    texts = (
        "rank = 1",
        "rank = 2",
        "score = 1.0",
        'name = "1"',
        "not rank = 1",
        "all(rank = 1)",
        "rank in (1)",
    )
    digests = {digest(check(parse(text), SCHEMA)) for text in texts}
    assert len(digests) == len(texts)
    assert digest(parse("rank=1")) == digest(parse(" (rank == 1) "))


def test_columns_of_an_undeclared_attribute_are_refused() -> None:
    with pytest.raises(KeyError, match="stars"):
        evaluate(Exists("stars"), Columns.build(DOCUMENTS, SCHEMA))
