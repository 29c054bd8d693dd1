"""VISIBLE waits for the shards; at the deadline the write is acknowledged all the same, and says so."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from protos.ringfort import v1 as pb
from services.config import Limits
from services.deadline import Deadline
from services.gateway.catalog import Catalog, Served
from services.gateway.ingest import Ingest
from services.metadata.store import Store
from services.shard.local_shards import LocalShards
from shard_router.model import HOME, Metric

DIM = 4


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    name = f"visible_{uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield make_conninfo(postgres_url, dbname=name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
async def catalog(database_url: str, tmp_path: Path) -> AsyncIterator[Catalog]:
    store = await Store.open(database_url)
    with ThreadPoolExecutor(1) as threads:
        shards = LocalShards(
            tmp_path,
            store.follow,
            search_threads=threads,
            memtable_rows=16,
            graph_rows=50_000,
            poll_ms=20,
            device="cpu",
        )
        catalog = Catalog(store, shards)
        await catalog.load()
        yield catalog
        await catalog.close()
    await store.close()


async def create(catalog: Catalog, name: str) -> Served:
    return await catalog.create(
        tenant="default", name=name, dim=DIM, metric=Metric.COSINE, schema={}, model=None, slots=8, shards=2,
        replicas=1, index="auto", max_staleness_ms=0, space=f"vectors:{DIM}",
    )  # fmt: skip


def request(*ids: str) -> pb.UpsertRequest:
    vectors = np.ones((len(ids), DIM), np.float32)
    return pb.UpsertRequest(
        collection="notes",
        documents=[pb.Document(id=id) for id in ids],
        vectors=pb.Matrix(data=vectors.tobytes(), rows=len(ids), dim=DIM),
        wait=pb.VISIBLE,
    )


async def test_a_shard_that_lags_behind_delays_visible_and_fails_nothing(
    catalog: Catalog, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await create(catalog, "notes")
    ingest = Ingest(catalog, None, Limits())  # type: ignore[arg-type]  # nothing is embedded
    prompt = await ingest.upsert(request("a"), "default", Deadline.after(10))
    assert prompt.visible
    lagging = served.logs[HOME].replicas[1][0]
    # It gets nothing pushed, and finds the log locked.
    monkeypatch.setattr(lagging, "offer", lambda delta: False)
    async with await psycopg.AsyncConnection.connect(database_url) as reader:
        await reader.execute("LOCK TABLE ringfort.logs IN ACCESS EXCLUSIVE MODE")
        late = await ingest.upsert(request("b", "c", "d"), "default", Deadline.after(0.3))
        assert [status.code for status in late.statuses] == [0, 0, 0]
        assert not late.visible
        assert max(late.token.positions.values()) == 4
        durable = request("e")
        durable.wait = pb.DURABLE
        assert not (await ingest.upsert(durable, "default", Deadline.after(10))).visible
    # The log can be read again, and the shard arrives by itself.
    assert await served.wait_for({catalog.store.log_id: 5}, Deadline.after(10))
    again = await ingest.upsert(request("f"), "default", Deadline.after(10))
    assert again.visible
    await ingest.close()


async def test_a_collection_deleted_while_its_log_is_read_is_no_warning(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        served = await create(catalog, "notes")
        served.look()
        await asyncio.sleep(0)
        await catalog.delete("default", "notes")
    # The driver's own are not meant: where a cancellation takes long it gives a connection up, and says so.
    ours = [record for record in caplog.records if record.name.startswith("services")]
    assert [record.getMessage() for record in ours if record.levelname != "INFO"] == []


async def test_a_collection_that_could_not_be_deleted_is_opened_again(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(catalog, "notes")
    ingest = Ingest(catalog, None, Limits())  # type: ignore[arg-type]  # nothing is embedded
    await ingest.upsert(request("a"), "default", Deadline.after(10))

    async def away(tenant: str, name: str) -> None:
        raise OSError("away")

    with monkeypatch.context() as patched:
        patched.setattr(catalog.store, "delete_collection", away)
        with pytest.raises(OSError, match="away"):
            await catalog.delete("default", "notes")
    async with asyncio.timeout(10):
        while not (await ingest.upsert(request("b"), "default", Deadline.after(1))).visible:
            pass
    served = catalog.resolve("default", "notes")
    assert sum(await served.each_shard(lambda replica, _: replica.count(None), Deadline.after(10))) == 2
    await ingest.close()
