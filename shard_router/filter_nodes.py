"""What a filter is made of: conditions on attributes, and the ways to join them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

#: What an attribute is compared with; timestamps are int microseconds once checked.
FilterValue = str | int | float | bool


class Op(StrEnum):
    """A comparison; on `keywords` EQ means "contains" and NE "does not contain"."""

    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="


@dataclass(frozen=True, slots=True)
class All:
    """Every part holds; true where there is none."""

    filters: "tuple[Filter, ...]"


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Some part holds; false where there is none."""

    filters: "tuple[Filter, ...]"


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold; so `Not` of a comparison with null is true."""

    filter: "Filter"


@dataclass(frozen=True, slots=True)
class Compare:
    """The attribute stands to the value as `op` says; false where it is null."""

    attribute: str
    op: Op
    value: FilterValue


@dataclass(frozen=True, slots=True)
class In:
    """The attribute is (on `keywords`: contains) one of the values; false where it is null."""

    attribute: str
    values: tuple[FilterValue, ...]


@dataclass(frozen=True, slots=True)
class Exists:
    """The attribute is not null."""

    attribute: str


@dataclass(frozen=True, slots=True)
class Range:
    """The attribute lies within every bound given; false where it is null."""

    attribute: str
    gte: FilterValue | None = None
    gt: FilterValue | None = None
    lte: FilterValue | None = None
    lt: FilterValue | None = None

    def bounds(self) -> Iterator[tuple[Op, FilterValue]]:
        """The bounds given, as comparisons that all have to hold."""
        bounds = ((Op.GE, self.gte), (Op.GT, self.gt), (Op.LE, self.lte), (Op.LT, self.lt))
        return ((op, value) for op, value in bounds if value is not None)


Filter = All | AnyOf | Not | Compare | In | Exists | Range

#: Deepest nesting of All, AnyOf and Not that is accepted; what walks a filter may recurse.
MAX_DEPTH = 64


def too_deep(filter: Filter) -> bool:
    """Whether the filter nests deeper than MAX_DEPTH; itself safe on any depth."""
    level: list[Filter] = [filter]
    for _ in range(MAX_DEPTH):
        level = [part for node in level for part in parts(node)]
        if not level:
            return False
    return True


def parts(filter: Filter) -> tuple[Filter, ...]:
    """The filters that this one joins; none for a condition."""
    match filter:
        case All(filters) | AnyOf(filters):
            return filters
        case Not(inner):
            return (inner,)
        case _:
            return ()
