"""Several gateways on one Redis: what they tell each other."""

from collections.abc import AsyncIterator, Callable

import pytest
from cache_tiers import eventually
from valkeys import client_of

from services.cache.frame import seal
from services.cache.keys import HOT_KEYS, answer_key
from services.cache.tier import CacheTier

PATIENT_MS = 10_000
HOT = answer_key(7, "acme", 1, 1, "", b"everybody asks it", b"")


@pytest.fixture
async def new_gateway(redis_url: str) -> AsyncIterator[Callable[[], CacheTier]]:
    made: list[CacheTier] = []

    async def make() -> CacheTier:
        made.append(CacheTier(l1_bytes=4_000_000, redis_url=redis_url, op_timeout_ms=PATIENT_MS))
        await made[-1].open()
        return made[-1]

    async with client_of(redis_url) as client:
        await client.delete(HOT_KEYS)
        yield make
    for tier in made:
        await tier.close()


async def exchange(*gateways: CacheTier) -> None:
    for _ in range(2):
        for gateway in gateways:
            await gateway.exchange.turn()


async def test_a_key_hot_over_all_gateways_is_hot_in_each(new_gateway):
    gateways = [await new_gateway() for _ in range(3)]
    for number, gateway in enumerate(gateways):
        await gateway.get_many([HOT] * 400 + [b"rf1:e:%d:%d" % (number, i) for i in range(600)])
    await exchange(*gateways)
    for gateway in gateways:
        first, *_ = gateway.hot_keys(10)
        assert (first.key, first.count, round(first.share, 2)) == (HOT, 1_200, 0.4)
        assert gateway.stats()["hot_keys"] == 1
        assert gateway.stats()["other_gateways"] == 2


async def test_a_hot_key_survives_a_scan_in_l1(new_gateway):
    gateway = await new_gateway()
    gateway.put_many([(HOT, b"answer")])
    for _ in range(50):
        gateway.peek(HOT)
    await exchange(gateway)
    for i in range(20_000):
        gateway.put_many([(b"scan%d" % i, b"x" * 100)])
    assert gateway.peek(HOT) == b"answer"


async def test_a_gateway_that_stops_takes_its_report_back(new_gateway, redis_url):
    one, other = await new_gateway(), await new_gateway()
    await exchange(one, other)
    assert one.stats()["other_gateways"] == 1
    await other.close()
    await exchange(one)
    assert one.stats()["other_gateways"] == 0
    async with client_of(redis_url) as client:
        assert await client.hlen(HOT_KEYS) == 1


async def test_a_report_that_is_none_of_ours_is_not_listened_to(new_gateway, redis_url):
    one, other = await new_gateway(), await new_gateway()
    async with client_of(redis_url) as client:
        await client.hset(HOT_KEYS, mapping={b"a": b"nonsense", b"b": seal(b"nonsense"), b"c": b""})
        await exchange(one, other)
        assert one.stats()["other_gateways"] == 1
        await client.set(HOT_KEYS, b"no hash at all")
        await exchange(one, other)
        assert one.tiers()[1]["state"] == "up"
        # It has been removed: reports are exchanged again.
        await exchange(one, other, one)
        assert one.stats()["other_gateways"] == 1


@pytest.mark.parametrize("redis_url", ["cluster"], indirect=True)
async def test_in_a_cluster_a_hot_key_lies_in_several_slots_and_each_gateway_reads_one(
    new_gateway, redis_url
):
    gateways = [await new_gateway() for _ in range(12)]
    await gateways[0].get_many([HOT] * 400)
    await exchange(*gateways)
    gateways[0].put_many([(HOT, b"answer")])
    await eventually(lambda: gateways[0].stats()["redis_writes_total"] == 4)
    async with client_of(redis_url) as client:
        await client.delete(HOT)  # those who read a copy do not miss it
    found = [(await gateway.get_many([HOT]))[0] for gateway in gateways[1:]]
    # Eleven gateways choose among four copies; that all chose the key itself has odds of 1 in 4 million.
    assert {each.value for each in found if each} == {b"answer"}


@pytest.mark.parametrize("redis_url", ["cluster"], indirect=True)
async def test_a_hot_key_that_was_written_before_it_was_hot_is_still_found(new_gateway, redis_url):
    async with client_of(redis_url) as client:
        for copy in range(4):
            await client.delete(HOT if not copy else b"rf1+%d:" % copy + HOT)
        await client.set(HOT, seal(b"answer"))
    gateways = [await new_gateway() for _ in range(8)]
    for gateway in gateways:
        gateway.exchange.windows.saw_all([HOT] * 400)
    await exchange(*gateways)
    for gateway in gateways:
        (found,) = await gateway.get_many([HOT])
        assert found is not None
        assert found.value == b"answer"
