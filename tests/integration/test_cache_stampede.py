"""A crowd that misses one key at once, over two gateways: who computes, and who waits for how long."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from stampede import Gateway, question

from services.cache.keys import lease_key
from services.gateway.answers import Cached, Computed
from shard_router.errors import RingfortError, Unavailable

CROWD = 500


@pytest.fixture
async def new_gateway(redis_url: str) -> AsyncIterator[Callable[[], Gateway]]:
    made: list[Gateway] = []

    async def make() -> Gateway:
        made.append(await Gateway.open(redis_url))
        return made[-1]

    yield make
    for gateway in made:
        await gateway.close()


@pytest.fixture
async def two(new_gateway) -> list[Gateway]:
    """Two gateways that know of each other."""
    gateways = [await new_gateway(), await new_gateway()]
    for gateway in gateways:
        await gateway.cache.exchange.turn()
    return gateways


class Computing:
    """Counts computations, and lets them end when told."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, gateway: Gateway) -> Computed:
        self.begun += 1
        await self.go.wait()
        self.ended += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return gateway.computed(b"answer %d" % self.ended)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what another gateway does sets no event here
            await asyncio.sleep(0.005)


async def test_a_thousand_misses_over_two_gateways_are_one_computation(two):
    computing, asked = Computing(), question()
    crowd = [asyncio.create_task(gateway.ask(asked, computing)) for _ in range(CROWD) for gateway in two]
    await until(lambda: computing.begun and any(g.cache.stats()["lease_waiting"] for g in two))
    computing.go.set()
    answers = await asyncio.gather(*crowd)
    assert computing.begun == 1
    assert {answer.body for answer in answers} == {b"answer 1"}
    assert {type(answer) for answer in answers} == {Cached, Computed}
    assert sum(g.cache.stats()["lease_recomputes_avoided_total"] for g in two) == 1
    assert sum(g.answers.stats()["recomputes_avoided_total"] for g in two) == 2 * CROWD - 2


async def test_a_leader_s_failure_is_its_own_gateway_s_and_frees_the_lease_at_once(two):
    computing, asked = Computing(), question()
    computing.failure = Unavailable("the shards are away")
    computing.go.set()
    crowd = [asyncio.create_task(gateway.ask(asked, computing)) for _ in range(50) for gateway in two]
    answers = await asyncio.gather(*crowd, return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, RingfortError)]
    assert len(failed) == 50
    assert {answer.body for answer in answers if not isinstance(answer, Exception)} == {b"answer 2"}
    assert computing.begun == 2


async def test_a_leader_who_is_cancelled_frees_the_lease_at_once(two):
    computing, asked = Computing(), question()
    leaver = asyncio.create_task(two[0].ask(asked, computing))
    await until(lambda: computing.begun)
    stayer = asyncio.create_task(two[1].ask(asked, computing))
    await until(lambda: two[1].cache.stats()["lease_waiting"])
    leaver.cancel()
    await until(lambda: computing.begun == 2)
    computing.go.set()
    assert (await stayer).body == b"answer 1"
    assert leaver.cancelled()


async def test_a_leader_who_is_killed_is_replaced_when_its_lease_runs_out(new_gateway, redis_url):
    asked = question()
    program = [sys.executable, str(Path(__file__).parent / "stampede.py"), redis_url, asked.hex()]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as leader:  # noqa: ASYNC220 - a moment
        try:
            assert await asyncio.to_thread(leader.stdout.readline) == b"computing\n"
            gateway = await new_gateway()
            assert gateway.cache.shared
            computing = Computing()
            computing.go.set()
            crowd = [asyncio.create_task(gateway.ask(asked, computing)) for _ in range(CROWD)]
            await until(lambda: gateway.cache.stats()["lease_waiting"])
            assert computing.begun == 0
        finally:
            leader.kill()
        answers = await asyncio.gather(*crowd)
    assert {answer.body for answer in answers} == {b"answer 1"}
    assert computing.begun == 1  # the killed one's own was the other


async def test_who_knows_of_a_later_write_does_not_take_the_earlier_answer(two):
    computing, asked = Computing(), question()
    one, other = two
    early = asyncio.create_task(one.ask(asked, computing))
    await until(lambda: computing.begun)
    other.served.position += 1
    late = asyncio.create_task(other.ask(asked, computing))
    await until(lambda: computing.begun == 2)
    computing.go.set()
    assert (await early).body != (await late).body


async def test_a_lease_held_for_ever_delays_others_by_half_their_time_at_most(two):
    computing, asked = Computing(), question()
    computing.go.set()
    one, other = two
    name = lease_key(asked, one.served.positions)
    await one.cache._redis.run(name, "SET", name, b"somebody else's", "PX", 60_000)
    assert (await other.ask(asked, computing, timeout_s=1.0)).body == b"answer 1"


async def test_without_redis_everybody_computes(two):
    computing, asked = Computing(), question()
    computing.go.set()
    for gateway in two:
        await gateway.cache._redis.close()
    answers = await asyncio.gather(*(gateway.ask(asked, computing) for gateway in two))
    assert {answer.body for answer in answers} == {b"answer 1", b"answer 2"}


async def test_a_gateway_alone_asks_for_no_lease(new_gateway):
    gateway = await new_gateway()
    gateway.cache.exchange._others.clear()
    computing = Computing()
    computing.go.set()
    before = gateway.cache.leases.taken
    await gateway.ask(question(), computing)
    assert gateway.cache.leases.taken == before


async def test_an_answer_that_soon_may_not_be_served_is_computed_behind_the_callers_back(two):
    computing, asked = Computing(), question()
    computing.go.set()
    gateway, _ = two
    old = await gateway.ask(asked, computing)
    gateway.served.position += 1  # a write: the answer is old from now on, and may be so for a minute
    at_once = await gateway.ask(asked, computing, max_staleness_ms=60_000)
    assert at_once.body == old.body
    assert gateway.answers.stats()["refreshing"] == 0
    computing.go.clear()
    gateway.answers._rng.random = lambda: 1 - 1e-16  # whoever draws this begins long before the end
    served = [await gateway.ask(asked, computing, max_staleness_ms=60_000) for _ in range(50)]
    assert {answer.body for answer in served} == {old.body}
    await until(lambda: computing.begun == 2)
    computing.go.set()
    await until(lambda: gateway.answers.stats()["refreshed_total"] == 1)
    assert (await gateway.ask(asked, computing)).body == b"answer 2"
    assert computing.begun == 2


async def test_a_refresh_that_fails_is_counted_and_nobody_s_error(two, caplog):
    computing, asked = Computing(), question()
    computing.go.set()
    gateway, _ = two
    old = await gateway.ask(asked, computing)
    gateway.served.position += 1
    computing.failure = Unavailable("the shards are away")
    gateway.answers._rng.random = lambda: 1 - 1e-16
    assert (await gateway.ask(asked, computing, max_staleness_ms=60_000)).body == old.body
    await until(lambda: gateway.answers.stats()["refreshes_failed_total"] == 1)
    assert "the shards are away" in caplog.text
