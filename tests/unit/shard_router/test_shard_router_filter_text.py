"""What filter text means, and what it says of text that means nothing."""

import pytest

from shard_router.errors import InvalidFilter
from shard_router.filters import All, AnyOf, Compare, Exists, Filter, In, Not, Op, Range, parse, render

A, B, C = (Compare(name, Op.EQ, 1) for name in "abc")


@pytest.mark.parametrize(
    ("text", "filter"),
    [
        ("a < 5", Compare("a", Op.LT, 5)),
        ("a<=-5", Compare("a", Op.LE, -5)),
        ("a > +5.5", Compare("a", Op.GT, 5.5)),
        ("a >= .5e1", Compare("a", Op.GE, 5.0)),
        ("a == 'x'", Compare("a", Op.EQ, "x")),
        ('a <> "x"', Compare("a", Op.NE, "x")),
        ("a != TRUE", Compare("a", Op.NE, True)),
        ("a = False", Compare("a", Op.EQ, False)),
        ("exists(a)", Exists("a")),
        ("a in (\"x\", 'y',)", In("a", ("x", "y"))),
        ("a in ()", In("a", ())),
        ("a NOT IN (1, 2.0)", Not(In("a", (1, 2.0)))),
        ("a=1 and b=1 AND c=1", All((A, B, C))),
        ("a=1 or b=1 and c=1", AnyOf((A, All((B, C))))),
        ("(a=1 or b=1) and c=1", All((AnyOf((A, B)), C))),
        ("a=1 and (b=1 and c=1)", All((A, All((B, C))))),
        ("not a=1 and b=1", All((Not(A), B))),
        ("not (a=1 and b=1)", Not(All((A, B)))),
        ("not not a=1", Not(Not(A))),
        ("((((a=1))))", A),
        ("all()", All(())),
        ("any(a=1)", AnyOf((A,))),
        ("all(a=1, b=1 or c=1)", All((A, AnyOf((B, C))))),
        ("range(a, >= 1, < 3)", Range("a", gte=1, lt=3)),
        ("range(a, <= 'm', > 'c')", Range("a", gt="c", lte="m")),
        ("`two words` = 1", Compare("two words", Op.EQ, 1)),
        ("`not` = 1", Compare("not", Op.EQ, 1)),
        ("all = 1 and range = 1 and in_stock = 1 and nothing = 1 and x.y = 1", None),
        (r'a = "tab\t quote\" back\\ \u00e9 \ud83d\ude00"', Compare("a", Op.EQ, 'tab\t quote" back\\ é 😀')),
        ("a = 'it\\'s \"it\"'", Compare("a", Op.EQ, 'it\'s "it"')),
        ("a =\n\t 1", A),
    ],
)
def test_text_means(text: str, filter: Filter | None) -> None:
    if filter is None:
        names = ("all", "range", "in_stock", "nothing", "x.y")
        filter = All(tuple(Compare(name, Op.EQ, 1) for name in names))
    assert repr(parse(text)) == repr(filter)
    assert parse(render(filter)) == filter


@pytest.mark.parametrize(
    ("filter", "text"),
    [
        (Compare("downloads_rank", Op.LT, 500), "downloads_rank < 500"),
        (All((A, AnyOf((B, C)))), "a = 1 and (b = 1 or c = 1)"),
        (AnyOf((All((A, B)), C)), "a = 1 and b = 1 or c = 1"),
        (Not(AnyOf((A, B))), "not (a = 1 or b = 1)"),
        (Not(In("a", ("é", "b\n"))), 'a not in ("é", "b\\n")'),
        (Range("a", gte=1.0, lt=1e22), "range(a, >= 1.0, < 1e+22)"),
        (Compare("In", Op.EQ, True), "`In` = true"),
        (Exists("a`b"), "exists(`a\\`b`)"),
        (All((A,)), "all(a = 1)"),
    ],
)
def test_canonical_text(filter: Filter, text: str) -> None:
    assert render(filter) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "ends too early, at character 1"),
        ("   ", "ends too early, at character 4"),
        ("a <", "ends too early, at character 4"),
        ("(a = 1", "ends too early, at character 7"),
        ("a < < 5", "unexpected '<' at character 5"),
        ("a = 1 b = 2", "unexpected 'b' at character 7"),
        ("a = 1)", "unexpected ')' at character 6"),
        ("a = 'x", 'unexpected "\'" at character 5'),
        ("é = 1", "unexpected 'é' at character 1"),
        ("a = b", "unexpected 'b' at character 5"),
        ("a = null", "unexpected 'null' at character 5"),
        ("range(a, = 1)", "unexpected '=' at character 10"),
        ("range(a, > 1, > 2)", "a second bound > at character 15"),
        ("a = 1e999", "too large a number at character 5"),
        ("a = " + "9" * 5_000, "too large a number at character 5"),
        (r"a = '\q'", "unknown escape in the text at character 5"),
        (r"a = '\u12'", "unknown escape in the text at character 5"),
        (r"a = '\ud800'", "unknown escape in the text at character 5"),
        ("a = '\ud800'", "half a surrogate pair at character 6"),
        ("a = '" + "x" * 16_384 + "'", "16390 bytes of text, at most 16384"),
        ("not " * 64 + "a = 1", "nested deeper than 64"),
        ("not " * 4_000 + "a = 1", "nested deeper than 64"),
    ],
)
def test_what_is_no_filter_is_refused_with_its_place(text: str, problem: str) -> None:
    with pytest.raises(InvalidFilter) as refused:
        parse(text, "retrieve.filter")
    assert problem in refused.value.problem
    assert refused.value.field == "retrieve.filter"


def test_the_deepest_nesting_is_accepted() -> None:
    text = "not " * 63 + "a = 1"
    assert render(parse(text)) == text


def test_parentheses_do_not_nest() -> None:
    assert parse("(" * 8_000 + "a=1" + ")" * 8_000) == A
