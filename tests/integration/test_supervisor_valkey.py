"""Our own Valkey: bounded in memory, nothing on disk, bounded in its log."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.data_dir import DataDir
from services.supervisor import Supervisor

MIB = 1024 * 1024


@asynccontextmanager
async def valkey(path: Path, maxmemory_bytes: int = 8 * MIB) -> AsyncIterator[Redis]:
    """A client of the directory's Valkey, which is started and stopped around it."""
    data_dir = DataDir.open(path, release="test")
    supervisor = Supervisor(data_dir)
    try:
        async with Redis.from_url(await supervisor.start_valkey(maxmemory_bytes=maxmemory_bytes)) as client:
            yield client
    finally:
        await supervisor.stop()
        data_dir.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


async def test_it_evicts_at_its_bound(path: Path) -> None:
    async with valkey(path) as client:
        assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "allkeys-lfu"
        for key in range(2000):
            await client.set(str(key), b"x" * 10_000)
        memory = await client.info("memory")
        assert memory["used_memory"] <= 8 * MIB
        assert 0 < await client.dbsize() < 2000


async def test_it_keeps_nothing_on_disk(path: Path) -> None:
    async with valkey(path) as client:
        await client.set("key", "value")
    assert list((path / "valkey").iterdir()) == []
    async with valkey(path) as client:
        assert await client.get("key") is None


async def test_a_grown_log_is_set_aside_once(path: Path) -> None:
    DataDir.open(path, release="test").close()
    log = path / "logs" / "valkey.log"
    log.parent.mkdir()
    log.write_text("old\n" * MIB)
    async with valkey(path):
        assert log.with_suffix(".log.1").read_text().startswith("old\n")
        text = log.read_text()
        assert "old" not in text
        assert "Ready to accept connections" in text
    async with valkey(path):
        assert log.read_text().count("Ready to accept connections") == 2
    assert sorted(file.name for file in log.parent.iterdir()) == ["valkey.log", "valkey.log.1"]
