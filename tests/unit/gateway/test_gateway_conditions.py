"""Filters are read once while they are asked for."""

import pytest
from memory_log import collection

from protos.ringfort import v1 as pb
from services.gateway.conditions import Conditions
from shard_router import filters
from shard_router.errors import InvalidFilter
from shard_router.model import AttributeType

RANKED = collection(schema={"rank": AttributeType.INT})


def test_the_same_message_is_the_same_filter() -> None:
    conditions = Conditions()
    first = conditions.checked(pb.Filter(text="rank < 5"), RANKED)
    assert first == filters.check(filters.parse("rank < 5"), RANKED.schema)
    assert conditions.checked(pb.Filter(text="rank < 5"), RANKED) is first
    assert conditions.checked(pb.Filter(text="rank < 6"), RANKED) != first
    assert conditions.checked(pb.Filter(), RANKED) is None


def test_a_filter_is_checked_against_its_own_collection() -> None:
    conditions = Conditions()
    other = collection(schema={"rank": AttributeType.FLOAT})
    object.__setattr__(other, "uid", RANKED.uid + 1)
    message = pb.Filter(text="rank = 5")
    assert conditions.checked(message, RANKED) == filters.Compare("rank", filters.Op.EQ, 5)
    found = conditions.checked(message, other)
    assert isinstance(found, filters.Compare)
    assert isinstance(found.value, float)


def test_what_is_refused_is_refused_again_and_names_its_field() -> None:
    conditions = Conditions()
    for field in ("filter", "retrieve.filter"):
        with pytest.raises(InvalidFilter) as refused:
            conditions.checked(pb.Filter(text="nothing = 1"), RANKED, field)
        assert refused.value.field == field


def test_equal_filters_of_other_types_have_other_digests() -> None:
    by_type = [filters.Compare("x", filters.Op.EQ, value) for value in (1, 1.0, True)]
    assert by_type[0] == by_type[1] == by_type[2]
    assert len({filters.digest(each) for each in by_type}) == 3
    assert filters.digest(by_type[0]) == filters.digest(filters.Compare("x", filters.Op.EQ, 1))
