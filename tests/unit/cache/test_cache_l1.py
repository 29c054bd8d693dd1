"""The cache without Redis: what one process sees."""

import pytest

from services.cache.policy import entry_bytes
from services.cache.tier import CacheTier, Found


@pytest.fixture
async def tier():
    tier = CacheTier(l1_bytes=1_000_000, redis_url=None)
    await tier.open()
    yield tier
    await tier.close()


async def test_values_are_there_at_once_and_in_the_order_of_the_keys(tier):
    tier.put_many([(b"a", b"1"), (b"b", b"2")], ttl_s=60)
    assert tier.peek(b"a") == b"1"
    assert await tier.get_many([b"b", b"nothing", b"a", b"b"]) == [
        Found(b"2", "L1"),
        None,
        Found(b"1", "L1"),
        Found(b"2", "L1"),
    ]
    assert tier.peek(b"nothing") is None


async def test_a_dropped_key_is_gone(tier):
    tier.put_many([(b"a", b"1")])
    tier.drop(b"a")
    tier.drop(b"never there")
    assert await tier.get_many([b"a"]) == [None]


async def test_a_peek_counts_when_it_hits_and_a_miss_counts_once(tier):
    tier.put_many([(b"a", b"1")])
    tier.peek(b"a"), tier.peek(b"b")
    await tier.get_many([b"a", b"b"])
    line, _ = tier.tiers()
    assert (line["hits"], line["misses"]) == (2, 1)


async def test_the_tiers_describe_themselves(tier):
    tier.put_many([(b"key", b"value")])
    l1, redis = tier.tiers()
    assert l1 == {
        "name": "L1",
        "hits": 0,
        "misses": 0,
        "entries": 1,
        "bytes": entry_bytes(b"key", b"value"),
        "evictions": 0,
        "errors": 0,
        "eviction_storms": 0,
        "removed": 0,
        "purges": 0,
        "state": "up",
    }
    assert (redis["name"], redis["state"]) == ("REDIS", "off")
    assert redis.keys() == l1.keys()
    assert tier.stats()["l1_entries"] == 1


async def test_no_bytes_for_l1_turns_it_off():
    tier = CacheTier(l1_bytes=0, redis_url=None)
    tier.put_many([(b"a", b"1")])
    assert tier.peek(b"a") is None
    assert tier.tiers()[0]["state"] == "off"


def test_a_url_that_is_none_is_refused_at_once():
    with pytest.raises(ValueError, match="scheme"):
        CacheTier(l1_bytes=0, redis_url="localhost:6379")
