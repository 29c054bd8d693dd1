"""Both tiers together, against a real server that is well."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable

import pytest
from cache_tiers import eventually
from redis.asyncio import Redis
from valkeys import client_of

from services.cache.frame import seal, unseal
from services.cache.tier import CacheTier, Found

#: Long enough that a busy machine is not taken for a slow server.
PATIENT_MS = 5_000


@pytest.fixture
async def new_tier(redis_url: str) -> AsyncIterator[Callable[..., CacheTier]]:
    """Tiers on the session's server, closed at the end; each is a gateway with an L1 of its own."""
    made: list[CacheTier] = []

    async def make(url: str = redis_url, **options: int) -> CacheTier:
        tier = CacheTier(**{"l1_bytes": 4_000_000, "redis_url": url, "op_timeout_ms": PATIENT_MS, **options})
        made.append(tier)
        await tier.open()
        return tier

    yield make
    for tier in made:
        await tier.close()


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Redis]:
    client = client_of(redis_url)
    yield client
    await client.aclose()


#: For what only one server can show.
standalone = pytest.mark.parametrize("redis_url", ["standalone"], indirect=True)


@pytest.fixture
def key() -> Callable[[object], bytes]:
    """Keys that no other test uses."""
    prefix = uuid.uuid4().hex
    return lambda name: f"{prefix}:{name}".encode()


@pytest.fixture
def together(key: Callable[[object], bytes]) -> Callable[[object], bytes]:
    """Keys that lie on one server of a Cluster, whose queues are each bounded for themselves."""
    tag = uuid.uuid4().hex.encode()
    return lambda name: b"{%s}" % tag + key(name)


def written(tier: CacheTier, count: int) -> Callable[[], bool]:
    return lambda: tier.stats()["redis_writes_total"] == count


async def mget_calls(server: Redis) -> int:
    return (await server.info("commandstats")).get("cmdstat_mget", {}).get("calls", 0)


async def test_what_one_gateway_put_another_finds_and_keeps(new_tier, key):
    one, other = await new_tier(), await new_tier()
    one.put_many([(key("a"), b"1"), (key("b"), b"")])
    await eventually(written(one, 2))
    asked = [key("b"), key("none"), key("a")]
    assert await other.get_many(asked) == [Found(b"", "REDIS"), None, Found(b"1", "REDIS")]
    assert await other.get_many(asked) == [Found(b"", "L1"), None, Found(b"1", "L1")]
    assert other.peek(key("a")) == b"1"


async def test_a_stop_writes_what_was_queued(new_tier, key):
    one, other = await new_tier(), await new_tier()
    one.put_many([(key(i), b"x" * 1_000) for i in range(1_000)])
    await one.close()
    found = await other.get_many([key(i) for i in range(1_000)])
    assert found == [Found(b"x" * 1_000, "REDIS")] * 1_000


@standalone
async def test_all_reads_of_a_tick_are_one_mget_without_duplicates(new_tier, server, key):
    one, other = await new_tier(), await new_tier()
    one.put_many([(key(i), b"%d" % i) for i in range(20)])
    await eventually(written(one, 20))
    calls = await mget_calls(server)
    answers = await asyncio.gather(*(other.get_many([key(i), key(19 - i)]) for i in range(20)))
    assert answers == [[Found(b"%d" % i, "REDIS"), Found(b"%d" % (19 - i), "REDIS")] for i in range(20)]
    assert await mget_calls(server) - calls == 1
    assert (other.stats()["redis_reads_total"], other.stats()["redis_hits_total"]) == (1, 20)


@standalone
async def test_many_keys_are_several_mgets_and_all_are_found(new_tier, key):
    one, other = await new_tier(), await new_tier()
    one.put_many([(key(i), b"%d" % i) for i in range(1_300)])
    await eventually(written(one, 1_300))
    found = await other.get_many([key(i) for i in range(1_300)])
    assert found == [Found(b"%d" % i, "REDIS") for i in range(1_300)]
    assert other.stats()["redis_reads_total"] == 3


async def test_values_live_as_long_as_told(new_tier, server, key):
    tier = await new_tier()
    tier.put_many([(key("hour"), b"1")], ttl_s=3_600)
    tier.put_many([(key("ever"), b"1")])
    tier.put_many([(key("instant"), b"1")], ttl_s=0.0001)
    await eventually(written(tier, 3))
    assert 3_500 < await server.ttl(key("hour")) <= 3_600
    assert await server.ttl(key("ever")) == -1
    assert tier.peek(key("instant")) == b"1"


async def test_of_two_values_the_later_is_written(new_tier, server, key):
    tier = await new_tier()
    for i in range(300):
        tier.put_many([(key("a"), b"%d" % i)])
    await tier.close()
    assert unseal(await server.get(key("a"))) == b"299"


async def test_what_is_damaged_or_not_ours_is_a_miss_and_counted(new_tier, server, key):
    tier = await new_tier()
    sealed = seal(b"value")
    await server.set(key("cut"), sealed[:-1])
    await server.set(key("flipped"), sealed[:-1] + b"E")
    await server.set(key("plain"), b"17")
    await server.rpush(key("list"), b"value")
    await server.set(key("good"), sealed)
    names = ["cut", "flipped", "plain", "list", "good"]
    assert await tier.get_many([key(name) for name in names]) == [None] * 4 + [Found(b"value", "REDIS")]
    assert tier.stats()["redis_corrupt_total"] == 3
    assert tier.stats()["redis_misses_total"] == 4
    assert tier.tiers()[1]["state"] == "up"


@standalone
async def test_a_value_put_while_redis_is_asked_is_newer_and_stays(new_tier, server, key):
    tier = await new_tier()
    await server.set(key("a"), seal(b"old"))
    await server.client_pause(PATIENT_MS, all=False)  # writes wait, reads do not
    reading = asyncio.create_task(tier.get_many([key("a")]))
    await asyncio.sleep(0)
    tier.put_many([(key("a"), b"new")])
    assert await reading == [Found(b"old", "REDIS")]
    await server.client_unpause()
    assert tier.peek(key("a")) == b"new"


async def test_a_dropped_key_is_asked_of_redis_again(new_tier, server, key):
    tier = await new_tier()
    tier.put_many([(key("a"), b"mine")])
    await eventually(written(tier, 1))
    await server.set(key("a"), seal(b"another gateway's"))
    assert await tier.get_many([key("a")]) == [Found(b"mine", "L1")]
    tier.drop(key("a"))
    assert await tier.get_many([key("a")]) == [Found(b"another gateway's", "REDIS")]


async def test_a_caller_who_leaves_disturbs_nobody(new_tier, server, key):
    tier = await new_tier()
    await server.set(key("a"), seal(b"1"))
    leaver, stayer = (asyncio.create_task(tier.get_many([key("a")])) for _ in range(2))
    await asyncio.sleep(0)
    leaver.cancel()
    assert await stayer == [Found(b"1", "REDIS")]
    assert leaver.cancelled()


async def test_too_many_reads_are_misses(new_tier, server, together):
    tier = await new_tier(max_pending=10)
    await server.set(together(0), seal(b"1"))
    assert await tier.get_many([together(i) for i in range(11)]) == [None] * 11
    assert tier.stats()["redis_reads_shed_total"] == 11
    assert (await tier.get_many([together(0)])) == [Found(b"1", "REDIS")]


async def test_too_many_and_too_large_writes_are_dropped_from_redis_alone(new_tier, server, together):
    tier = await new_tier(max_pending=10)
    tier.put_many([(together(i), b"%d" % i) for i in range(30)])
    assert tier.stats()["redis_writes_dropped_total"] == 20
    await eventually(written(tier, 10))
    tier.put_many([(together("large"), bytes(1024 * 1024 + 1))])
    assert tier.stats()["redis_writes_dropped_total"] == 21
    assert tier.peek(together(29)) == b"29"
    assert tier.peek(together("large")) is not None
    assert [await server.exists(together(29)), await server.exists(together("large"))] == [0, 0]


async def test_the_tier_describes_the_server(new_tier, key):
    tier = await new_tier()
    tier.put_many([(key("a"), b"1")])
    await eventually(written(tier, 1))
    other = await new_tier()
    await eventually(lambda: other.tiers()[1]["entries"])
    line = other.tiers()[1]
    assert line["name"] == "REDIS"
    assert line["bytes"] > 100_000
    assert (line["errors"], line["state"]) == (0, "up")


async def test_a_closed_tier_answers_from_l1_and_closes_twice(new_tier, server, key):
    tier = await new_tier()
    await server.set(key("b"), seal(b"2"))
    tier.put_many([(key("a"), b"1")])
    await tier.close()
    tier.put_many([(key("c"), b"3")])
    assert await tier.get_many([key("a"), key("b")]) == [Found(b"1", "L1"), None]
    await tier.close()


async def test_closes_at_whatever_moment(redis_url):
    """Python 3.11 loses a cancellation that comes as the client's send completes."""
    for moment in range(60):
        tier = CacheTier(l1_bytes=0, redis_url=redis_url, op_timeout_ms=PATIENT_MS)
        await tier.open()
        for _ in range(moment % 20):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await tier.close()


@standalone
async def test_a_wrong_password_is_an_outage_not_an_error(new_tier, valkey_url, key, caplog):
    user, host = valkey_url.rsplit("@", 1)
    tier = await new_tier(f"{user.rsplit(':', 1)[0]}:wrong@{host}")
    tier.put_many([(key("a"), b"1")])
    tier.drop(key("a"))
    assert await tier.get_many([key("a")]) == [None]
    assert tier.tiers()[1]["state"] == "down"
    assert "redis is away" in caplog.text
    assert "wrong@" not in caplog.text
