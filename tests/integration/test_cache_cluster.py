"""A Redis Cluster that loses a server and that moves slots; and how either kind lets us in."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cache_tiers import eventually, opened
from valkeys import Valkey, ValkeyCluster, client_of

from services.cache.frame import seal
from services.cache.slots import slot_of
from services.cache.tier import CacheTier, Found

PATIENT_MS = 10_000
#: A key and a certificate for 127.0.0.1, which nothing but these tests trusts.
PEM = Path(__file__).parent / "loopback.pem"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ValkeyCluster]:
    cluster = ValkeyCluster(tmp_path)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


async def finds(tier: CacheTier, key: bytes) -> bool:
    return await tier.get_many([key]) == [Found(b"v" + key, "REDIS")]


async def test_a_server_that_dies_costs_its_own_keys_alone_and_is_used_again(cluster):
    keys = [b"k%d" % i for i in range(60)]
    async with opened(cluster.url, PATIENT_MS) as tier:
        tier.put_many([(key, b"v" + key) for key in keys])
        await eventually(lambda: tier.stats()["redis_writes_total"] == len(keys))
        dead = cluster.nodes[1]
        lost = {key for key in keys if cluster.owner(slot_of(key)) is dead}
        assert 0 < len(lost) < len(keys)
        dead.kill()
        async with asyncio.timeout(30):
            while tier.tiers()[1]["state"] != "partly":
                assert [await finds(tier, key) for key in keys] == [key not in lost for key in keys]
        assert [await finds(tier, key) for key in keys] == [key not in lost for key in keys]
        cluster.mend()
        await eventually(lambda: tier.tiers()[1]["state"] == "up")
        tier.put_many([(key, b"v" + key) for key in keys])
        for key in keys:
            async with asyncio.timeout(30):
                while not await finds(tier, key):  # noqa: ASYNC110 - what the server does sets no event
                    await asyncio.sleep(0.005)


async def test_slots_that_move_are_followed_while_they_move_and_afterwards(cluster):
    source, target = cluster.nodes[:2]
    key, fresh = b"{moving}:old", b"{moving}:fresh"
    slot = slot_of(key)
    source = cluster.owner(slot)
    target = next(node for node in cluster.nodes if node is not source)
    async with opened(cluster.url, PATIENT_MS) as tier:
        tier.put_many([(key, b"v" + key)])
        await eventually(lambda: tier.stats()["redis_writes_total"] == 1)
        with source.client() as old, target.client() as new:
            new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", cluster.id_of(source))
            old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", cluster.id_of(target))
            assert await finds(tier, key)
            tier.put_many([(fresh, b"v" + fresh)])  # its slot's old owner sends it on
            await eventually(lambda: tier.stats()["redis_writes_total"] == 2)
            assert new.execute_command("CLUSTER COUNTKEYSINSLOT", slot) == 1
            old.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 10_000)
            assert await finds(tier, key)
            assert await finds(tier, fresh)
            assert tier.stats()["redis_cluster_moved_total"] == 0
            for client in (new, old):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", cluster.id_of(target))
        assert await finds(tier, key)
        assert tier.stats()["redis_cluster_moved_total"] == 1
        assert await finds(tier, fresh)
        assert tier.stats()["redis_cluster_moved_total"] == 1
        assert tier.stats()["redis_misses_total"] == 0


async def test_the_password_in_the_url_lets_us_into_every_server(cluster):
    for node in cluster.nodes:
        with node.client() as client:
            client.config_set("requirepass", "p@ss,word")
    hosts = cluster.url.partition("://")[2]
    async with opened(f"redis+cluster://:p%40ss%2Cword@{hosts}", PATIENT_MS) as tier:
        keys = [b"k%d" % i for i in range(30)]
        tier.put_many([(key, b"v" + key) for key in keys])
        await eventually(lambda: tier.stats()["redis_writes_total"] == len(keys))
        assert all([await finds(tier, key) for key in keys])
    async with opened(f"redis+cluster://:wrong@{hosts}", PATIENT_MS) as tier:
        assert tier.tiers()[1]["state"] == "down"
        assert not await finds(tier, keys[0])


@contextlib.asynccontextmanager
async def behind_tls(port: int) -> AsyncIterator[int]:
    """A port that speaks TLS and passes on to another, as the wheel's Valkey speaks none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_tls_by_url_and_a_certificate_that_is_not_trusted_is_an_outage(tmp_path, free_port):
    valkey = Valkey(tmp_path, free_port)
    valkey.start()
    try:
        async with behind_tls(valkey.port) as port, client_of(valkey.url) as server:
            await server.set(b"k", seal(b"vk"))
            async with opened(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={PEM}", PATIENT_MS) as tier:
                assert await finds(tier, b"k")
            async with opened(f"rediss://127.0.0.1:{port}/0", PATIENT_MS) as tier:
                assert tier.tiers()[1]["state"] == "down"
                assert not await finds(tier, b"k")
    finally:
        valkey.kill()
