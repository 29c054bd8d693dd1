"""Filters as text: `downloads_rank < 500 and name in ("ray", "faiss")`.

The words and, or, not, in, true and false are known in any case; an attribute that is named like one,
or is no plain name, stands in backquotes. Strings take either quote and the escapes of JSON. `all(…)`,
`any(…)` and `range(a, >= 1, < 3)` say what the operators cannot, so that every filter has a text.
"""

import json
import math
import re
from functools import cache
from types import UnionType
from typing import cast

from lark import Lark, Token, Transformer, UnexpectedCharacters, UnexpectedInput, UnexpectedToken, v_args

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

MAX_TEXT_BYTES = 16 * 1024

_GRAMMAR = r"""
?disjunction: conjunction
    | conjunction (_OR conjunction)+        -> any_of
?conjunction: negation
    | negation (_AND negation)+             -> all_of
?negation: condition
    | _NOT negation                         -> negate
?condition: "(" disjunction ")"
    | _ALL "(" _filters? ")"                -> all_of
    | _ANY "(" _filters? ")"                -> any_of
    | _EXISTS "(" attribute ")"             -> exists
    | _RANGE "(" attribute ("," bound)* ")" -> range_of
    | attribute (EQUALITY | ORDER) value    -> compare
    | attribute _IN "(" _values? ")"        -> within
    | attribute _NOT _IN "(" _values? ")"   -> not_within
_filters: disjunction ("," disjunction)* ","?
_values: value ("," value)* ","?
bound: ORDER value
attribute: NAME -> plain_name
    | QUOTED_NAME -> quoted
?value: STRING -> quoted
    | NUMBER -> number
    | _TRUE -> true
    | _FALSE -> false

_AND.2: /and(?![\w.])/i
_OR.2: /or(?![\w.])/i
_NOT.2: /not(?![\w.])/i
_IN.2: /in(?![\w.])/i
_TRUE.2: /true(?![\w.])/i
_FALSE.2: /false(?![\w.])/i
_ALL.2: /all(?=\s*\()/i
_ANY.2: /any(?=\s*\()/i
_EXISTS.2: /exists(?=\s*\()/i
_RANGE.2: /range(?=\s*\()/i
EQUALITY.2: "==" | "=" | "!=" | "<>"
ORDER: "<=" | "<" | ">=" | ">"
NAME: /[A-Za-z_][A-Za-z0-9_.]*/
QUOTED_NAME: /`([^`\\]|\\.)*`/s
STRING: /"([^"\\]|\\.)*"|'([^'\\]|\\.)*'/s
NUMBER: /[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?/

%ignore /\s+/
"""

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_WORDS = frozenset({"and", "or", "not", "in", "true", "false"})
_SPELLINGS = {"==": "=", "<>": "!="}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = dict(zip("nrtbf\"'`\\/", "\n\r\t\b\f\"'`\\/", strict=True))
_BOUNDS = {">=": "gte", ">": "gt", "<=": "lte", "<": "lt"}


def parse(text: str, field: str = "filter") -> Filter:
    """The filter that a text means, unchecked against any schema.

    InvalidFilter, with the character where reading stopped (counted from 1), for anything that is no
    filter, is longer than 16 KiB, or nests deeper than 64.
    """
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as problem:
        raise InvalidFilter(field, f"half a surrogate pair at character {problem.start + 1}") from None
    if size_bytes > MAX_TEXT_BYTES:
        raise InvalidFilter(field, f"{size_bytes} bytes of text, at most {MAX_TEXT_BYTES} are read")
    try:
        filter = cast(Filter, _grammar().parse(text))
    except UnexpectedInput as problem:
        raise InvalidFilter(field, _what_is_wrong(problem, text)) from None
    except _UnreadableTokenError as problem:
        raise InvalidFilter(field, str(problem)) from None
    if too_deep(filter):
        raise InvalidFilter(field, f"nested deeper than {MAX_DEPTH}")
    return filter


def render(filter: Filter) -> str:
    """The one canonical text of a filter: parse(render(filter)) == filter. Numbers are to be finite."""
    match filter:
        case All(filters) if len(filters) > 1:
            return " and ".join(_operand(part, AnyOf | All) for part in filters)
        case AnyOf(filters) if len(filters) > 1:
            return " or ".join(_operand(part, AnyOf) for part in filters)
        case All(filters):
            return f"all({', '.join(map(render, filters))})"
        case AnyOf(filters):
            return f"any({', '.join(map(render, filters))})"
        case Not(In(attribute, values)):
            return f"{_name(attribute)} not in ({', '.join(map(_value, values))})"
        case Not(inner):
            return f"not {_operand(inner, AnyOf | All)}"
        case Compare(attribute, op, value):
            return f"{_name(attribute)} {op} {_value(value)}"
        case In(attribute, values):
            return f"{_name(attribute)} in ({', '.join(map(_value, values))})"
        case Exists(attribute):
            return f"exists({_name(attribute)})"
        case Range(attribute):
            bounds = (f"{op} {_value(value)}" for op, value in filter.bounds())
            return f"range({', '.join((_name(attribute), *bounds))})"


def _operand(filter: Filter, looser: type | UnionType) -> str:
    """The text of an operand, in parentheses where it is one that binds no tighter."""
    if isinstance(filter, All | AnyOf) and isinstance(filter, looser) and len(filter.filters) > 1:
        return f"({render(filter)})"
    return render(filter)


def _name(attribute: str) -> str:
    if _PLAIN_NAME.fullmatch(attribute) and attribute.lower() not in _WORDS:
        return attribute
    return "`" + json.dumps(attribute, ensure_ascii=False)[1:-1].replace("`", "\\`") + "`"


def _value(value: FilterValue) -> str:
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


class _UnreadableTokenError(Exception):
    """A token has the right shape and no meaning."""

    def __init__(self, token: Token, problem: str) -> None:
        super().__init__(f"{problem} at character {(token.start_pos or 0) + 1}")


@v_args(inline=True)
class _Nodes(Transformer[Token, Filter]):
    """Builds the nodes while the text is read; no tree lies between."""

    def any_of(self, *filters: Filter) -> Filter:
        return AnyOf(filters)

    def all_of(self, *filters: Filter) -> Filter:
        return All(filters)

    def negate(self, filter: Filter) -> Filter:
        return Not(filter)

    def exists(self, attribute: str) -> Filter:
        return Exists(attribute)

    def range_of(self, attribute: str, *bounds: tuple[Token, FilterValue]) -> Filter:
        given: dict[str, FilterValue] = {}
        for op, value in bounds:
            if _BOUNDS[op] in given:
                raise _UnreadableTokenError(op, f"a second bound {op}")
            given[_BOUNDS[op]] = value
        return Range(attribute, **given)

    def compare(self, attribute: str, op: Token, value: FilterValue) -> Filter:
        return Compare(attribute, Op(_SPELLINGS.get(op, op)), value)

    def within(self, attribute: str, *values: FilterValue) -> Filter:
        return In(attribute, values)

    def not_within(self, attribute: str, *values: FilterValue) -> Filter:
        return Not(In(attribute, values))

    def bound(self, op: Token, value: FilterValue) -> tuple[Token, FilterValue]:
        return op, value

    def plain_name(self, token: Token) -> str:
        return str(token)

    def quoted(self, token: Token) -> str:
        try:
            text = _ESCAPE.sub(_unescape, token[1:-1])
            # Joins the two halves of an escaped surrogate pair, and refuses a lone half.
            return text.encode("utf-16", "surrogatepass").decode("utf-16") if "\\u" in token else text
        except (KeyError, UnicodeDecodeError):
            raise _UnreadableTokenError(token, "an unknown escape in the text") from None

    def number(self, token: Token) -> FilterValue:
        try:
            value = int(token) if token.lstrip("+-").isdigit() else float(token)
        except ValueError:
            value = math.inf
        if math.isinf(value):
            raise _UnreadableTokenError(token, "too large a number")
        return value

    def true(self) -> FilterValue:
        return True

    def false(self) -> FilterValue:
        return False


def _unescape(match: re.Match[str]) -> str:
    escape = match[1]
    return chr(int(escape[1:], 16)) if len(escape) > 1 else _ESCAPED[escape]


@cache
def _grammar() -> Lark:
    # Compiled when the first text comes: a service whose callers send messages never pays for it.
    return Lark(_GRAMMAR, start="disjunction", parser="lalr", transformer=_Nodes(), propagate_positions=False)


def _what_is_wrong(problem: UnexpectedInput, text: str) -> str:
    match problem:
        case UnexpectedToken(token=token) if token.type != "$END":
            return f"unexpected {str(token)[:40]!r} at character {(token.start_pos or 0) + 1}"
        case UnexpectedCharacters(pos_in_stream=int(position)):
            return f"unexpected {text[position]!r} at character {position + 1}"
        case _:
            return f"it ends too early, at character {len(text) + 1}"
