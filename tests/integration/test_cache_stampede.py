"""A crowd that misses one key at once, over two gateways: who computes, and who waits for how long."""

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
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


class ComputingMany(Computing):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[bytes] = Counter()

    async def of_many(self, gateway: Gateway, names: Sequence[bytes]) -> Sequence[Computed]:
        self.begun += 1
        self.times.update(names)
        await self.go.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return [gateway.computed(b"answer to " + name) for name in names]


def told(names: Sequence[bytes]) -> list[bytes]:
    return [b"answer to " + name for name in names]


async def test_what_batches_of_two_gateways_have_in_common_is_computed_once(two):
    computing, asked = ComputingMany(), [question() for _ in range(90)]
    # In differing orders, and each with some of its own.
    batches = [asked[:60], asked[:29:-1]]
    crowd = [
        asyncio.create_task(gateway.ask_many(batch, computing.of_many))
        for gateway, batch in zip(two, batches, strict=True)
    ]
    await until(lambda: computing.begun == 2)
    computing.go.set()
    for answers, batch in zip(await asyncio.gather(*crowd), batches, strict=True):
        assert [answer.body for answer in answers] == told(batch)
    assert computing.times == Counter(asked)
    assert sum(g.cache.stats()["lease_recomputes_avoided_total"] for g in two) == 30
    assert sum(g.cache.stats()["leases_total"] for g in two) == 90
    assert sum(g.cache.stats()["lease_waiting"] for g in two) == 0


async def test_a_crowd_of_equal_batches_over_two_gateways_computes_each_row_once(two):
    computing, asked = ComputingMany(), [question() for _ in range(50)]
    crowd = [asyncio.create_task(g.ask_many(asked, computing.of_many)) for _ in range(20) for g in two]
    await until(lambda: sum(g.cache.stats()["lease_waiting"] for g in two) == 39 * 50)
    assert computing.times == Counter(asked)
    computing.go.set()
    for answers in await asyncio.gather(*crowd):
        assert [answer.body for answer in answers] == told(asked)
    assert computing.times == Counter(asked)


async def test_rows_of_a_batch_whose_gateway_is_killed_are_computed_a_second_time(new_gateway, redis_url):
    asked = [question() for _ in range(20)]
    program = [sys.executable, str(Path(__file__).parent / "stampede.py"), redis_url]
    with subprocess.Popen([*program, *(n.hex() for n in asked[:15])], stdout=subprocess.PIPE) as leader:  # noqa: ASYNC220
        try:
            assert await asyncio.to_thread(leader.stdout.readline) == b"computing\n"
            gateway = await new_gateway()
            computing = ComputingMany()
            computing.go.set()
            crowd = [asyncio.create_task(gateway.ask_many(asked, computing.of_many)) for _ in range(20)]
            await until(lambda: computing.times)
            assert computing.times == Counter(asked[15:])
        finally:
            leader.kill()
        answers = await asyncio.gather(*crowd)
    assert all([answer.body for answer in row] == told(asked) for row in answers)
    assert computing.times == Counter(asked)  # the killed one's own were the others


async def test_a_batch_that_fails_or_is_cancelled_frees_its_rows_at_once(two):
    one, other = two
    for ends in ("failure", "cancellation"):
        computing, asked = ComputingMany(), [question() for _ in range(20)]
        first = asyncio.create_task(one.ask_many(asked, computing.of_many))
        await until(lambda computing=computing: computing.begun)
        second = asyncio.create_task(other.ask_many(asked, computing.of_many))
        await until(lambda: other.cache.stats()["lease_waiting"] == 20)
        if ends == "failure":
            computing.failure = Unavailable("the shards are away")
        else:
            first.cancel()
        computing.go.set()
        assert [answer.body for answer in await second] == told(asked)
        (ended,) = await asyncio.gather(first, return_exceptions=True)
        assert isinstance(ended, Unavailable | asyncio.CancelledError)
        assert computing.times == Counter(asked * 2)


async def test_what_may_not_be_kept_is_computed_by_each_and_held_up_by_none(two):
    computing, asked = ComputingMany(), [question() for _ in range(20)]

    async def incomplete(gateway: Gateway, names: Sequence[bytes]) -> Sequence[Computed]:
        made = await computing.of_many(gateway, names)
        return [replace(each, complete=False) for each in made]

    crowd = [asyncio.create_task(gateway.ask_many(asked, incomplete)) for gateway in two]
    await until(lambda: sum(g.cache.stats()["lease_waiting"] for g in two) == 20)
    computing.go.set()
    await asyncio.gather(*crowd)
    assert computing.times == Counter(asked * 2)
    # Given back, and not only run out.
    for gateway in two:
        await gateway.cache.leases.close()
    names = [lease_key(name, two[0].served.positions) for name in asked]
    assert await two[0].cache.leases._take(names, b"token") == [True] * 20


async def test_batches_know_of_writes_as_single_questions_do(two):
    computing, asked = ComputingMany(), [question() for _ in range(5)]
    one, other = two
    early = asyncio.create_task(one.ask_many(asked, computing.of_many))
    await until(lambda: computing.begun)
    other.served.position += 1
    late = asyncio.create_task(other.ask_many(asked, computing.of_many))
    await until(lambda: computing.begun == 2)
    computing.go.set()
    await asyncio.gather(early, late)
    assert computing.times == Counter(asked * 2)


async def test_a_batch_takes_no_lease_where_it_is_alone_or_has_no_redis(two):
    one, other = two
    computing, asked = ComputingMany(), [question() for _ in range(5)]
    computing.go.set()
    one.cache.exchange._others.clear()
    await one.ask_many(asked, computing.of_many)
    assert one.cache.leases.taken == 0
    await other.cache._redis.close()
    assert [a.body for a in await other.ask_many(asked, computing.of_many)] == told(asked)
    assert computing.times == Counter(asked * 2)


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
