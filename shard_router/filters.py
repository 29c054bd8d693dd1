"""Filters on attributes: what they mean, for one document and for a whole block of columns.

A comparison with a null attribute is false whatever the operator, `!=`, `in` and ranges included; `Not`
is plain negation. On `keywords`, `=` means "contains", `!=` "is there and does not contain" and `in`
"contains one of". Order is by number, and on keywords by code point.
"""

import operator
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from shard_router import hashing
from shard_router.columns import (
    BoolColumn,
    Column,
    Columns,
    Dictionary,
    FloatColumn,
    IntColumn,
    KeywordColumn,
    KeywordsColumn,
)
from shard_router.errors import InvalidFilter
from shard_router.filter_nodes import (
    MAX_DEPTH,
    All,
    AnyOf,
    Compare,
    Exists,
    Filter,
    FilterValue,
    In,
    Not,
    Op,
    Range,
    too_deep,
)
from shard_router.filter_text import parse, render
from shard_router.model import Attributes, AttributeType, Schema

__all__ = [
    "All",
    "AnyOf",
    "Compare",
    "Exists",
    "Filter",
    "FilterValue",
    "In",
    "Not",
    "Op",
    "Range",
    "check",
    "digest",
    "evaluate",
    "matches",
    "parse",
    "render",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Neither a text's code nor null.
_NO_CODE = -2
#: By identity: equal filters of other types (1, 1.0 and true) have other digests. The filter is kept beside
#: its digest, so that no other takes its identity.
_digests: dict[int, tuple["Filter", bytes]] = {}
_DIGESTS_KEPT = 1_024
_EQUALITY = frozenset({Op.EQ, Op.NE})
_UNORDERED = frozenset({AttributeType.BOOL, AttributeType.KEYWORDS})
_COMPARE: dict[Op, Callable[..., Any]] = {
    Op.EQ: operator.eq,
    Op.NE: operator.ne,
    Op.LT: operator.lt,
    Op.LE: operator.le,
    Op.GT: operator.gt,
    Op.GE: operator.ge,
}


def digest(filter: Filter) -> bytes:
    """16 bytes that name a checked filter, the same in every process; kept while it is asked for."""
    known = _digests.get(id(filter))
    if known is not None and known[0] is filter:
        return known[1]
    made = hashing.digest(b"filter", render(filter).encode())
    if len(_digests) >= _DIGESTS_KEPT:
        _digests.clear()
    _digests[id(filter)] = filter, made
    return made


def check(filter: Filter, schema: Schema, field: str = "filter") -> Filter:
    """The filter with every value in its attribute's type, ready for `matches` and `evaluate`.

    Integers become floats where the attribute is one, and ISO 8601 texts microseconds (UTC where they
    name no zone). InvalidFilter names an unknown attribute, a value of another type, an order asked of
    bool or keywords, a range without a bound, and nesting beyond 64.
    """
    if too_deep(filter):
        raise InvalidFilter(field, f"nested deeper than {MAX_DEPTH}")
    return _check(filter, schema, field)


def matches(filter: Filter, attributes: Attributes) -> bool:
    """Whether a checked filter holds for one document's attributes."""
    match filter:
        case All(filters):
            return all(matches(part, attributes) for part in filters)
        case AnyOf(filters):
            return any(matches(part, attributes) for part in filters)
        case Not(inner):
            return not matches(inner, attributes)
    value = attributes.get(filter.attribute)
    if value is None or value != value:
        return False
    match filter:
        case Compare(_, op, wanted) if isinstance(value, tuple):
            return (wanted in value) == (op is Op.EQ)
        case Compare(_, op, wanted):
            return bool(_COMPARE[op](value, wanted))
        case In(_, values) if isinstance(value, tuple):
            return not set(values).isdisjoint(value)
        case In(_, values):
            return value in values
        case Range():
            return all(_COMPARE[op](value, bound) for op, bound in filter.bounds())
        case Exists():
            return True


def evaluate(filter: Filter, columns: Columns) -> np.ndarray:
    """What `matches` says of every row, bool [rows]; a fresh array. The filter is checked."""
    match filter:
        case All(filters):
            allowed = np.ones(columns.rows, dtype=np.bool_)
            for part in filters:
                allowed &= evaluate(part, columns)
            return allowed
        case AnyOf(filters):
            allowed = np.zeros(columns.rows, dtype=np.bool_)
            for part in filters:
                allowed |= evaluate(part, columns)
            return allowed
        case Not(inner):
            allowed = evaluate(inner, columns)
            return np.logical_not(allowed, out=allowed)
    column = columns.column(filter.attribute)
    if column is None:
        return np.zeros(columns.rows, dtype=np.bool_)
    match filter:
        case Compare(_, op, value):
            return _compare(column, op, value)
        case In(_, values):
            return _is_in(column, values)
        case Range():
            allowed = np.ones(columns.rows, dtype=np.bool_)
            for op, bound in filter.bounds():
                allowed &= _compare(column, op, bound)
            return allowed
        case Exists():
            return column.present()


def _compare(column: Column, op: Op, value: FilterValue) -> np.ndarray:
    """Which rows stand to the value as `op` says, bool [rows]."""
    match column:
        case KeywordColumn(codes, dictionary):
            return _compare_codes(codes, op, *dictionary.rank(str(value)))
        case KeywordsColumn(_, _, presence):
            found = _contains(column, (value,))
            return found if op is Op.EQ else presence & ~found
        case BoolColumn(values):
            return np.asarray(values == (value if op is Op.EQ else not value))
        case IntColumn(values, presence):
            return np.asarray(_COMPARE[op](values, value) & presence)
        case FloatColumn(values):
            found = np.asarray(_COMPARE[op](values, value))
            # Every other comparison with NaN is false of itself.
            return found & column.present() if op is Op.NE else found


def _compare_codes(codes: np.ndarray, op: Op, rank: int, here: bool) -> np.ndarray:
    """`_compare` for codes of a sorted dictionary, where `rank` texts come before the value."""
    # Unsigned, null (-1) is the largest code of all.
    unsigned = codes.view(np.uint32)
    match op:
        case Op.EQ:
            found = codes == (rank if here else _NO_CODE)
        case Op.NE:
            found = (codes != (rank if here else _NO_CODE)) & (codes >= 0)
        case Op.LT:
            found = unsigned < rank
        case Op.LE:
            found = unsigned < rank + here
        case Op.GT:
            found = codes >= rank + here
        case Op.GE:
            found = codes >= rank
    return np.asarray(found)


def _is_in(column: Column, values: tuple[FilterValue, ...]) -> np.ndarray:
    """Which rows have one of the values, bool [rows]."""
    match column:
        case KeywordColumn(codes, dictionary):
            return _coded(codes, dictionary, values)
        case KeywordsColumn():
            return _contains(column, values)
        case IntColumn(numbers, presence):
            return np.asarray(np.isin(numbers, np.array(values, dtype=np.int64)) & presence)
        case BoolColumn(numbers) | FloatColumn(numbers):
            return np.isin(numbers, np.array(values, dtype=numbers.dtype))


def _contains(column: KeywordsColumn, values: tuple[FilterValue, ...]) -> np.ndarray:
    """Which rows of lists contain one of the values, bool [rows]."""
    found = np.zeros(len(column), dtype=np.bool_)
    found[column.rows_of(np.flatnonzero(_coded(column.codes, column.dictionary, values)))] = True
    return found


def _coded(codes: np.ndarray, dictionary: Dictionary, values: tuple[FilterValue, ...]) -> np.ndarray:
    """Which codes are of one of the values, bool [codes]; null (-1) never is."""
    wanted = dictionary.codes(map(str, values))
    if len(wanted) == 1:
        return np.asarray(codes == wanted[0])
    # One spare entry at the end, where -1 looks.
    table = np.zeros(len(dictionary) + 1, dtype=np.bool_)
    table[wanted] = True
    return np.asarray(table[codes])


def _check(filter: Filter, schema: Schema, field: str) -> Filter:
    match filter:
        case All(filters) | AnyOf(filters):
            return type(filter)(tuple(_check(part, schema, field) for part in filters))
        case Not(inner):
            return Not(_check(inner, schema, field))
    attribute = filter.attribute
    kind = schema.get(attribute)
    if kind is None:
        raise InvalidFilter(field, f"there is no attribute {attribute!r}")

    def coerce(value: FilterValue, ordered: bool) -> FilterValue:
        if ordered and kind in _UNORDERED:
            raise InvalidFilter(field, f"{attribute!r} is of type {kind}, which has no order")
        coerced = _coerce(value, kind)
        if coerced is None:
            raise InvalidFilter(field, f"{attribute!r} is of type {kind}, and {_shown(value)} is not")
        return coerced

    match filter:
        case Compare(_, op, value):
            return Compare(attribute, op, coerce(value, ordered=op not in _EQUALITY))
        case In(_, values):
            return In(attribute, tuple(coerce(value, ordered=False) for value in values))
        case Range():
            bounds = {op: coerce(value, ordered=True) for op, value in filter.bounds()}
            if not bounds:
                raise InvalidFilter(field, f"the range of {attribute!r} has no bound")
            return Range(attribute, *map(bounds.get, (Op.GE, Op.GT, Op.LE, Op.LT)))
        case Exists():
            return filter


def _coerce(value: FilterValue, kind: AttributeType) -> FilterValue | None:
    """The value as one of that type, None where it is not."""
    match kind, value:
        case AttributeType.KEYWORD | AttributeType.KEYWORDS, str():
            return value
        case AttributeType.BOOL, bool():
            return value
        case _, bool():
            return None
        case AttributeType.FLOAT, int() | float() if abs(value) <= sys.float_info.max:
            return float(value)
        case AttributeType.INT, float() if value.is_integer():
            return _coerce(int(value), kind)
        case AttributeType.INT | AttributeType.TIMESTAMP, int() if -(2**63) <= value < 2**63:
            return value
        case AttributeType.TIMESTAMP, str():
            return _microseconds(value)
    return None


def _microseconds(text: str) -> int | None:
    """Microseconds since 1970 UTC of an ISO 8601 text, None where it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
