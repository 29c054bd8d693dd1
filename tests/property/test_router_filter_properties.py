"""Filters: text and back, and columns against single documents, on anything at all."""

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shard_router.columns import Columns
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
    render,
)
from shard_router.model import Attributes, AttributeType

INT64 = st.integers(-(2**63), 2**63 - 1)
#: Few and close, so that a filter and a document often meet.
WORDS = st.sampled_from(["", "a", "ab", "b", "B", "é", "z", "日本", "\U0001f600", "\ud7ff", "\ue000"])
VALUES: dict[AttributeType, st.SearchStrategy[Any]] = {
    AttributeType.KEYWORD: WORDS,
    AttributeType.INT: st.integers(-2, 2) | INT64,
    AttributeType.FLOAT: st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0]) | st.floats(allow_nan=False),
    AttributeType.BOOL: st.booleans(),
    AttributeType.TIMESTAMP: st.integers(-2, 2) | INT64,
    AttributeType.KEYWORDS: st.lists(WORDS, max_size=3).map(tuple),
}
#: Two of a type, so that one of them is often missing from a whole block.
SCHEMA = {f"{kind}_{number}": kind for kind in AttributeType for number in (1, 2)}
NULL_TOO = st.sampled_from([math.nan])


def documents() -> st.SearchStrategy[Attributes]:
    stored = {name: VALUES[kind] for name, kind in SCHEMA.items()}
    stored["float_1"] |= NULL_TOO
    return st.fixed_dictionaries({}, optional=stored)


def conditions_on(name: str) -> st.SearchStrategy[Filter]:
    kind = SCHEMA[name]
    values = WORDS if kind is AttributeType.KEYWORDS else VALUES[kind]
    if kind is AttributeType.FLOAT:
        values = values.filter(math.isfinite)
    ordered = kind not in (AttributeType.BOOL, AttributeType.KEYWORDS)
    ops = st.sampled_from(list(Op) if ordered else [Op.EQ, Op.NE])
    conditions: list[st.SearchStrategy[Filter]] = [
        st.builds(Compare, st.just(name), ops, values),
        st.builds(In, st.just(name), st.lists(values, max_size=4).map(tuple)),
        st.just(Exists(name)),
    ]
    if ordered:
        bounds = st.lists(st.none() | values, min_size=4, max_size=4).filter(
            lambda given: any(bound is not None for bound in given)
        )
        conditions.append(bounds.map(lambda given: Range(name, *given)))
    return st.one_of(conditions)


def joined(conditions: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    return st.recursive(
        conditions,
        lambda inner: st.one_of(
            st.builds(All, st.lists(inner, max_size=3).map(tuple)),
            st.builds(AnyOf, st.lists(inner, max_size=3).map(tuple)),
            st.builds(Not, inner),
        ),
        max_leaves=8,
    )


FILTERS = joined(st.sampled_from(list(SCHEMA)).flatmap(conditions_on))

ANY_VALUE = st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
NAMES = st.text() | st.sampled_from(["and", "Or", "not", "in", "TRUE", "all", "range", "a.b", "`", "\\"])
ANY_FILTERS = joined(
    st.one_of(
        st.builds(Compare, NAMES, st.sampled_from(Op), ANY_VALUE),
        st.builds(In, NAMES, st.lists(ANY_VALUE, max_size=4).map(tuple)),
        st.builds(Exists, NAMES),
        st.builds(Range, NAMES, *[st.none() | ANY_VALUE] * 4),
    )
)


@settings(max_examples=200, deadline=None)
@given(ANY_FILTERS)
def test_every_filter_has_a_text_that_means_it(filter: Filter) -> None:
    again = parse(render(filter))
    # repr tells 1, 1.0 and True apart, which == does not.
    assert repr(again) == repr(filter)
    assert hash(again) == hash(filter)
    assert digest(again) == digest(filter)


@settings(max_examples=150, deadline=None)
@given(st.lists(documents(), max_size=12), FILTERS)
def test_columns_say_what_each_document_says(block: list[Attributes], filter: Filter) -> None:
    filter = check(filter, SCHEMA)
    expected = [matches(filter, document) for document in block]
    built = Columns.build(block, SCHEMA)
    stored = Columns.from_arrays(built.to_arrays(), SCHEMA, len(block))
    for columns in (built, stored):
        allowed = evaluate(filter, columns)
        assert allowed.dtype == bool
        assert allowed.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(documents(), max_size=12))
def test_columns_give_documents_back(block: list[Attributes]) -> None:
    columns = Columns.build(block, SCHEMA)
    for row, document in enumerate(block):
        wanted = {name: value for name, value in document.items() if value == value}
        assert columns.attributes_at(row) == wanted


@settings(max_examples=150, deadline=None)
@given(FILTERS)
def test_checking_twice_changes_nothing(filter: Filter) -> None:
    checked = check(filter, SCHEMA)
    assert repr(check(checked, SCHEMA)) == repr(checked)
