"""A database of its own for every module of these tests; a store and a collection for every test."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from services.metadata.store import Store
from shard_router.model import AttributeType, Collection, Metric

DIM = 8
SCHEMA = {
    "name": AttributeType.KEYWORD,
    "rank": AttributeType.INT,
    "weight": AttributeType.FLOAT,
    "fresh": AttributeType.BOOL,
    "seen": AttributeType.TIMESTAMP,
    "tags": AttributeType.KEYWORDS,
}

MakeCollection = Callable[..., Awaitable[Collection]]
_names = count()


@pytest.fixture(scope="module")
def database_url(postgres_url: str) -> Iterator[str]:
    name = f"metadata_{uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield make_conninfo(postgres_url, dbname=name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    store = await Store.open(database_url)
    yield store
    await store.close()


@pytest.fixture
def make_collection() -> MakeCollection:
    async def make(store: Store, **given: object) -> Collection:
        wanted: dict[str, object] = {
            "tenant": "default",
            "name": f"collection-{next(_names)}",
            "dim": DIM,
            "metric": Metric.COSINE,
            "schema": SCHEMA,
            "model": None,
            "slots": 128,
            "shards": 2,
            "replicas": 1,
            "index": "auto",
            "max_staleness_ms": 0,
            "space": f"vectors:{DIM}",
        }
        return await store.create_collection(**{**wanted, **given})  # type: ignore[arg-type]

    return make


@pytest.fixture
async def collection(store: Store, make_collection: MakeCollection) -> Collection:
    return await make_collection(store)
