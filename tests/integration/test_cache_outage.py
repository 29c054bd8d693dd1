"""Redis stops, dies, comes back, and talks nonsense: callers get misses, a little later, never errors."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cache_tiers import eventually, opened
from redis.exceptions import ResponseError
from valkeys import Valkey, ValkeyCluster, client_of

from services.cache.frame import seal
from services.cache.redis_tier import CONNECTIONS, RedisTier
from services.cache.slots import slot_of
from services.cache.tier import CacheTier, Found

OP_TIMEOUT_MS = 50
#: What a busy machine adds before a woken task runs.
SLACK_MS = 900
#: Long enough that a busy machine is not taken for a slow server.
PATIENT_MS = 10_000
KEY, VALUE = b"rf1:e:key", b"value"


Servers = Valkey | ValkeyCluster

#: For what only one server can show.
standalone = pytest.mark.parametrize("valkey", ["standalone"], indirect=True)


@pytest.fixture(scope="module")
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """A Cluster of this file's, as a new one takes seconds to come together."""
    cluster = ValkeyCluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture(params=["standalone", "cluster"])
def valkey(request: pytest.FixtureRequest, tmp_path: Path, free_port: int) -> Iterator[Servers]:
    """A server of a test's own, or three that suffer together and are mended before the next test."""
    if request.param == "cluster":
        cluster: ValkeyCluster = request.getfixturevalue("own_cluster")
        cluster.mend()
        yield cluster
        return
    server = Valkey(tmp_path, free_port)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
async def tier(valkey: Servers) -> AsyncIterator[CacheTier]:
    """A tier without L1, so that every answer is Redis's; it has found one value there."""
    async with opened(valkey.url, OP_TIMEOUT_MS) as tier:
        async with asyncio.timeout(30):
            # A busy machine may be too slow for the first ones.
            while await tier.get_many([KEY]) != [Found(VALUE, "REDIS")]:
                tier.put_many([(KEY, VALUE)])
                await asyncio.sleep(0.02)
        yield tier


async def eventually_finds(tier: CacheTier, key: bytes, value: bytes) -> None:
    async with asyncio.timeout(20):
        while await tier.get_many([key]) != [Found(value, "REDIS")]:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)


async def timed_get(tier: CacheTier, key: bytes = KEY) -> tuple[list[Found | None], float]:
    started_s = time.perf_counter()
    found = await tier.get_many([key])
    return found, (time.perf_counter() - started_s) * 1000


def state(tier: CacheTier) -> object:
    return tier.tiers()[1]["state"]


async def sees_the_outage(tier: CacheTier) -> None:
    """Asks until the breaker opens: misses only, none slower than allowed; then none that waits at all."""
    for _ in range(100):
        found, took_ms = await timed_get(tier)
        assert found == [None]
        assert took_ms < OP_TIMEOUT_MS + SLACK_MS
        if state(tier) != "up":
            break
    else:
        pytest.fail("the breaker never opened")
    assert min([(await timed_get(tier))[1] for _ in range(5)]) < 1.0
    tier.put_many([(KEY, b"lost")])
    assert tier.stats()["redis_writes_dropped_total"] >= 1


def connections(node: Valkey) -> int:
    """How many the server has been asked for since it started; less this one."""
    with node.client() as client:
        return client.info("stats")["total_connections_received"] - 1


async def test_a_server_that_stands_still_costs_op_timeout_then_nothing_and_is_found_again(valkey, tier):
    valkey.signal(signal.SIGSTOP)
    try:
        await sees_the_outage(tier)
        assert tier.stats()["redis_timeouts_total"] >= 5
    finally:
        valkey.signal(signal.SIGCONT)
    await eventually_finds(tier, KEY, VALUE)
    assert 1 <= tier.stats()["redis_outages_total"] <= len(valkey.nodes)


async def test_a_server_that_dies_and_comes_back_empty_on_the_same_port(valkey, tier):
    valkey.kill()
    await sees_the_outage(tier)
    assert tier.stats()["redis_errors_total"] >= 5
    valkey.start()
    await eventually(lambda: state(tier) == "up")
    assert await tier.get_many([KEY]) == [None]
    tier.put_many([(KEY, b"again")])
    await eventually_finds(tier, KEY, b"again")


async def test_a_restart_between_two_reads_costs_at_most_misses(valkey, tier):
    valkey.kill()
    valkey.start()
    async with client_of(valkey.url) as server:
        await server.set(KEY, seal(VALUE))
    await eventually_finds(tier, KEY, VALUE)


async def test_callers_in_a_crowd_are_not_slower_than_allowed_through_stop_kill_and_restart(valkey, tier):
    slowest_ms = 0.0
    answers = 0
    over = asyncio.Event()

    async def caller(number: int) -> None:
        nonlocal slowest_ms, answers
        while not over.is_set():
            found, took_ms = await timed_get(tier, KEY if number % 2 else b"other %d" % number)
            assert found in ([None], [Found(VALUE, "REDIS")])
            slowest_ms = max(slowest_ms, took_ms)
            answers += 1
            tier.put_many([(KEY, VALUE)])
            await asyncio.sleep(0.002)

    callers = [asyncio.create_task(caller(number)) for number in range(50)]
    await eventually(lambda: answers > 200)
    valkey.signal(signal.SIGSTOP)
    await eventually(lambda: state(tier) == "down")
    valkey.kill()
    before = answers
    await eventually(lambda: answers > before + 200)
    valkey.start()
    await eventually(lambda: state(tier) == "up")
    await eventually_finds(tier, KEY, VALUE)
    over.set()
    await asyncio.gather(*callers)
    assert slowest_ms < OP_TIMEOUT_MS + SLACK_MS


async def test_a_thousand_callers_on_its_return_are_a_handful_of_reads_and_connections(valkey):
    async with opened(valkey.url, PATIENT_MS) as tier, client_of(valkey.url) as server:
        valkey.kill()
        while state(tier) != "down":
            await tier.get_many([b"k%d" % i for i in range(60)])
        valkey.start()
        await server.set(KEY, seal(VALUE))
        await eventually(lambda: state(tier) == "up")
        before = {node.port: connections(node) for node in valkey.nodes}
        reads = tier.stats()["redis_reads_total"]
        answers = await asyncio.gather(*(tier.get_many([KEY, b"k%d" % i]) for i in range(1_000)))
        assert answers == [[Found(VALUE, "REDIS"), None]] * 1_000
        assert tier.stats()["redis_reads_total"] - reads <= 3 * len(valkey.nodes)
        assert all(connections(node) - before[node.port] <= CONNECTIONS for node in valkey.nodes)


@standalone
async def test_a_server_that_is_not_there_yet_is_used_when_it_comes(valkey, caplog):
    caplog.set_level(logging.INFO)
    valkey.kill()
    async with opened(valkey.url, OP_TIMEOUT_MS) as tier:
        assert state(tier) == "down"
        found, took_ms = await timed_get(tier)
        assert found == [None]
        assert took_ms < 1.0 + SLACK_MS
        valkey.start()
        await eventually(lambda: state(tier) == "up")
        tier.put_many([(KEY, VALUE)])
        await eventually_finds(tier, KEY, VALUE)
    assert [
        record.message.split(":")[0] for record in caplog.records if record.name == "services.cache.health"
    ] == [
        "redis is away, going on without it",
        "redis is back",
    ]


async def test_a_full_server_refuses_writes_and_still_answers_reads(valkey, tier):
    for node in valkey.nodes:
        with node.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
    tier.put_many([(b"%d" % i, VALUE) for i in range(10)])
    await eventually(lambda: tier.stats()["redis_writes_refused_total"] == 10)
    assert await tier.get_many([KEY]) == [Found(VALUE, "REDIS")]
    assert state(tier) == "up"


@pytest.mark.parametrize(
    "reply",
    [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n", b"$7\r\nnonsens\r\n", b"-LOADING soon\r\n"],
)
async def test_whatever_answers_on_that_port_callers_get_misses(reply):
    """None says nothing, empty hangs up, the rest is not what was asked for."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(65_536):
                if reply is None:
                    continue
                writer.write(reply)
                if not reply:
                    break
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with opened(f"redis://127.0.0.1:{port}/0", OP_TIMEOUT_MS) as tier:
            for _ in range(8):
                tier.put_many([(KEY, VALUE)])
                found, took_ms = await timed_get(tier)
                assert found == [None]
                assert took_ms < OP_TIMEOUT_MS + SLACK_MS
            assert tier.stats()["redis_errors_total"] + tier.stats()["redis_timeouts_total"] > 0


async def test_stopping_during_an_outage_takes_no_longer_than_a_second(valkey, tier):
    valkey.signal(signal.SIGSTOP)
    reading = [asyncio.create_task(tier.get_many([KEY])) for _ in range(3)]
    tier.put_many([(b"%d" % i, VALUE) for i in range(500)])
    started_s = time.perf_counter()
    await tier.close()
    assert time.perf_counter() - started_s < 1.5
    assert await asyncio.gather(*reading) == [[None]] * 3
    valkey.signal(signal.SIGCONT)


async def test_mass_deletions_and_eviction_storms_are_counted_and_said(valkey, caplog):
    async with opened(valkey.url, PATIENT_MS) as tier:

        async def look() -> dict[str, int | str]:
            for node in tiers_of(tier):
                await node._look()
            return tier.tiers()[1]

        await put(tier, 1_000)
        before = await look()
        assert before["entries"] >= 1_000
        assert (before["removed"], before["purges"], before["evictions"]) == (0, 0, 0)
        for node in valkey.nodes:
            with node.client() as client:
                client.flushall()
        after = await look()
        assert after["removed"] >= 1_000
        assert after["purges"] == len(valkey.nodes)
        assert "keys of redis were removed" in caplog.text
        await put(tier, 2_000)
        await look()
        for node in valkey.nodes:
            with node.client() as client:
                client.config_set("maxmemory-policy", "allkeys-lfu")
                client.config_set("maxmemory", 1)
                until_s = time.monotonic() + 30
                while client.dbsize() > 5 and time.monotonic() < until_s:
                    with contextlib.suppress(ResponseError):  # it evicts for a while, and then refuses
                        client.set(mine(node, valkey), b"")
        stormed = await look()
        assert stormed["eviction_storms"] == len(valkey.nodes)
        assert stormed["evictions"] >= 1_900
        assert stormed["purges"] == after["purges"]


async def put(tier: CacheTier, count: int) -> None:
    written = tier.stats()["redis_writes_total"] + count
    tier.put_many([(b"k%d" % i, b"v" * 1_000) for i in range(count)])
    await eventually(lambda: tier.stats()["redis_writes_total"] == written)


def tiers_of(tier: CacheTier) -> list[RedisTier]:
    second = tier._redis
    return [second] if isinstance(second, RedisTier) else list(second._nodes.values())


def mine(node: Valkey, servers: Servers) -> bytes:
    """A key that lies on that server."""
    keys = map(b"x%d".__mod__, range(1_000))
    return next(k for k in keys if isinstance(servers, Valkey) or servers.owner(slot_of(k)) is node)
