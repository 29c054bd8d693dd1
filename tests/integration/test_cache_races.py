"""Each race between an answer that is kept and a write, played out: two gateways, a real Redis, no luck."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from stampede import Asked, Gateway, question

from services.cache.watermark import Watermark
from services.gateway.answers import Cached, Computed

LEASE_S = 10.0


@dataclass
class Clock:
    now_s: float = 0.0


class Search:
    """Answers with the latest write; may be held between reading its position and its end."""

    def __init__(self) -> None:
        self.latest = 5
        self.begun = 0
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()

    async def __call__(self, gateway: Gateway) -> Computed:
        self.begun += 1
        made = gateway.computed(b"%d" % self.latest, self.latest)
        self.reached.set()
        await self.go.wait()
        return made


class Leased:
    """A gateway and what it knows of others' commits."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.watermark = Watermark(LEASE_S)
        self.watermark.renewed(0.0, {"log": 5})

    def known(self, served: Asked):
        known = self.watermark.known(self.clock.now_s)
        return known if known is not None and served.log_id in known else None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def two(redis_url: str, clock: Clock) -> AsyncIterator[list[tuple[Gateway, Watermark]]]:
    made = []
    for _ in range(2):
        leased = Leased(clock)
        made.append((await Gateway.open(redis_url, known=leased.known), leased.watermark))
    for gateway, _ in made:
        await gateway.cache.exchange.turn()
    yield made
    for gateway, _ in made:
        await gateway.close()


async def test_a_fill_that_a_write_overtakes_is_not_served_after_the_write(two):
    (one, watermark), (other, others) = two
    search, asked = Search(), question()
    search.go.clear()
    filling = asyncio.create_task(one.ask(asked, search))
    await search.reached.wait()
    search.latest = 6  # committed, and both have heard of it: the write is acknowledged
    watermark.heard("log", 6), others.heard("log", 6)
    search.go.set()
    assert (await filling).body == b"5"  # asked before the write
    for gateway in (one, other):
        assert (await gateway.ask(asked, search)).body == b"6"


async def test_who_asks_after_a_write_does_not_join_what_began_before_it(two):
    (one, watermark), _ = two
    search, asked = Search(), question()
    search.go.clear()
    before = asyncio.create_task(one.ask(asked, search))
    await search.reached.wait()
    search.latest = 6
    watermark.heard("log", 6)
    after = asyncio.create_task(one.ask(asked, search))
    search.go.set()
    assert [(await before).body, (await after).body] == [b"5", b"6"]


async def test_a_holder_that_was_paused_serves_nothing_kept_until_it_knows_again(two, clock):
    (one, watermark), _ = two
    search, asked = Search(), question()
    await one.ask(asked, search)
    assert isinstance(await one.ask(asked, search), Cached)
    clock.now_s = LEASE_S  # it stood still; meanwhile a write was acknowledged without it
    search.latest = 6
    assert (await one.ask(asked, search)).body == b"6"
    assert isinstance(await one.ask(asked, search), Computed)
    watermark.renewed(LEASE_S, {"log": 6})
    found = await one.ask(asked, search)
    assert (type(found), found.body) == (Cached, b"6")


async def test_a_holder_whose_lease_is_over_joins_nobody(two, clock):
    (one, _), _ = two
    search, asked = Search(), question()
    search.go.clear()
    before = asyncio.create_task(one.ask(asked, search))
    await search.reached.wait()
    clock.now_s = LEASE_S
    search.latest = 6  # acknowledged without this gateway, whose lease is over
    after = asyncio.create_task(one.ask(asked, search))
    search.go.set()
    assert [(await before).body, (await after).body] == [b"5", b"6"]


async def test_allowed_staleness_is_served_without_a_lease_too(two, clock):
    (one, _), _ = two
    search, asked = Search(), question()
    await one.ask(asked, search)
    clock.now_s = LEASE_S
    search.latest = 6
    assert (await one.ask(asked, search, max_staleness_ms=600_000)).body == b"5"


async def test_an_older_answer_that_overwrites_a_newer_one_in_redis_is_a_miss(two):
    (one, watermark), (other, others) = two
    search, asked = Search(), question()
    search.go.clear()
    slow = asyncio.create_task(other.ask(asked, search))  # as of 5, and slow to write it
    await search.reached.wait()
    search.latest = 6
    watermark.heard("log", 6)
    held, search.go = search.go, asyncio.Event()
    search.go.set()
    assert (await one.ask(asked, search)).body == b"6"
    others.heard("log", 6)
    held.set()
    await slow
    one.cache.drop(asked)
    begun = search.begun
    assert (await one.ask(asked, search)).body == b"6"
    assert search.begun == begun + 1


async def test_a_redis_that_lost_everything_costs_a_search_and_nothing_else(two, redis_url):
    (one, watermark), _ = two
    search, asked = Search(), question()
    await one.ask(asked, search)
    await one.cache._redis.run(asked, "DEL", asked)
    assert isinstance(await one.ask(asked, search), Cached)  # L1 still knows, and so does the gateway
    watermark.heard("log", 6)
    search.latest = 6
    assert (await one.ask(asked, search)).body == b"6"
    assert search.begun == 2


async def test_an_answer_of_another_log_is_never_served(two):
    (one, watermark), (other, others) = two
    search, asked = Search(), question()
    search.latest = 50
    for mark in (watermark, others):
        mark.heard("log", 50)
    assert (await one.ask(asked, search)).body == b"50"
    # Restored from a backup: positions begin again at 5, and pass 50 in the end.
    for gateway, mark in ((one, watermark), (other, others)):
        mark.renewed(1.0, {"restored": 5})
        gateway.served = Asked("restored", 5, 7)
    search.latest = 5
    for gateway in (one, other):
        assert (await gateway.ask(asked, search)).body == b"5"
        assert (await gateway.ask(asked, search, max_staleness_ms=600_000)).body == b"5"
