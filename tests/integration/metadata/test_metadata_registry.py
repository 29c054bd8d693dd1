"""Collections and aliases, and opening a database."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from services.deadline import Deadline
from services.metadata.store import StartupRefused, Store
from shard_router.errors import AlreadyExists, NotFound
from shard_router.model import AttributeType, Collection, Metric, Remove, Upsert, Write

MakeCollection = Callable[..., Awaitable[Collection]]


async def find(store: Store, uid: int) -> Collection | None:
    return next((collection for collection in await store.collections() if collection.uid == uid), None)


async def test_a_collection_is_listed_as_it_was_made(store: Store, make_collection: MakeCollection) -> None:
    schema = {"zulu": AttributeType.INT, "a": AttributeType.KEYWORDS, "mid": AttributeType.TIMESTAMP}
    before_us = time.time_ns() // 1000
    made = await make_collection(
        store, tenant="acme", schema=schema, metric=Metric.L2, model="m@1", max_staleness_ms=250, space="s1"
    )
    assert (made.tenant, made.metric, made.model, made.generation, made.aliases) == (
        "acme",
        Metric.L2,
        "m@1",
        1,
        (),
    )
    assert abs(made.created_at_us - before_us) < 60_000_000
    listed = await find(store, made.uid)
    assert listed == made
    assert list(listed.schema) == list(schema)


async def test_a_name_is_taken_once_per_tenant(store: Store, make_collection: MakeCollection) -> None:
    made = await make_collection(store)
    with pytest.raises(AlreadyExists):
        await make_collection(store, name=made.name)
    other = await make_collection(store, name=made.name, tenant="other")
    assert other.uid != made.uid
    name = f"race-{uuid4()}"
    results = await asyncio.gather(
        *(make_collection(store, name=name) for _ in range(5)), return_exceptions=True
    )
    refused = [type(result) for result in results if isinstance(result, BaseException)]
    assert refused == [AlreadyExists] * 4


async def test_aliases(store: Store, make_collection: MakeCollection) -> None:
    first, second = await make_collection(store), await make_collection(store)
    alias = f"alias-{uuid4()}"
    await store.set_alias("default", alias, first.name)
    await store.set_alias("default", "b-" + alias, first.name)
    listed = await find(store, first.uid)
    assert listed is not None
    assert listed.aliases == (alias, "b-" + alias)
    await store.set_alias("default", alias, second.name)
    aliases = {one.uid: one.aliases for one in await store.collections()}
    assert [aliases[one.uid] for one in (first, second)] == [("b-" + alias,), (alias,)]
    with pytest.raises(AlreadyExists):
        await make_collection(store, name=alias)
    with pytest.raises(AlreadyExists):
        await store.set_alias("default", second.name, first.name)
    with pytest.raises(NotFound):
        await store.set_alias("default", "new", "nobody")
    with pytest.raises(NotFound):
        await store.set_alias("other tenant", alias, second.name)
    await store.set_alias("default", alias, None)
    with pytest.raises(NotFound):
        await store.set_alias("default", alias, None)
    await make_collection(store, name=alias)


async def test_a_deleted_collection_is_gone_with_its_tables(
    store: Store,
    make_collection: MakeCollection,
    database_url: str,
) -> None:
    made = await make_collection(store)
    write = Upsert("a", None, {}, np.ones(made.dim, np.float32))
    await store.write(made, [write], deadline=Deadline.after(5))
    await store.set_alias("default", f"alias-{made.uid}", made.name)
    await store.delete_collection("default", made.name)
    assert await find(store, made.uid) is None
    with pytest.raises(NotFound):
        await store.delete_collection("default", made.name)
    with pytest.raises(NotFound):
        await store.write(made, [write], deadline=Deadline.after(5))
    with pytest.raises(NotFound):
        await store.write(
            made, [Upsert("a", None, {}, write.vector, made.uid and None)], deadline=Deadline.after(5)
        )
    for read in (
        store.get(made, ["a"], with_vectors=True),
        store.scan(made, None, 1, with_vectors=False),
        store.position(made),
        store.tail(made, 0),
    ):
        with pytest.raises(NotFound):
            await read
    with psycopg.connect(database_url) as connection:
        left = connection.execute(
            "SELECT relname FROM pg_class WHERE relname ~ %s", [f"^(documents|vectors)_{made.uid}(_|$)"]
        ).fetchall()
        assert left == []
    again = await make_collection(store, name=made.name)
    assert (again.uid > made.uid, await store.position(again)) == (True, 0)


async def test_writers_and_a_delete_do_not_lock_each_other_out(
    store: Store, make_collection: MakeCollection
) -> None:
    made = await make_collection(store)

    async def keep_writing(writer: int) -> None:
        for n in range(1_000):
            write = Upsert(f"{writer}-{n}", None, {}, np.ones(made.dim, np.float32))
            unconditional = writer % 2 == 0
            writes: list[Write] = [write] if unconditional else [write, Remove(f"{writer}-{n - 1}")]
            await store.write(made, writes, deadline=Deadline.after(5))

    tasks = [asyncio.create_task(keep_writing(writer)) for writer in range(4)]
    while await store.position(made) < 20:
        pass
    await store.delete_collection("default", made.name)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [NotFound] * 4


async def test_what_was_written_is_there_after_opening_again(
    database_url: str, make_collection: MakeCollection
) -> None:
    first = await Store.open(database_url)
    made = await make_collection(first)
    await first.write(
        made, [Upsert("a", "text", {}, np.ones(made.dim, np.float32))], deadline=Deadline.after(5)
    )
    log_id = first.log_id
    await first.close()
    second = await Store.open(database_url)
    assert second.log_id == log_id
    assert await find(second, made.uid) == made
    assert [row.id for row in (await second.tail(made, 0)).rows] == ["a"]
    await second.ping()
    await second.close()


async def test_a_second_service_is_refused(store: Store, database_url: str) -> None:
    with pytest.raises(StartupRefused, match=r"already in use by another Ringfort service\.$"):
        await Store.open(database_url)
    await store.ping()
    assert store.stats()["claim_held"] == 1


async def test_a_newer_database_is_refused_and_let_go(database_url: str) -> None:
    await (await Store.open(database_url)).close()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO ringfort.migrations (number, name) VALUES (9999, '9999_later.sql')")
        with pytest.raises(StartupRefused, match=r"newer release \(migration 9999, this one knows \d+\)"):
            await Store.open(database_url)
        connection.execute("DELETE FROM ringfort.migrations WHERE number = 9999")
    await (await Store.open(database_url)).close()


async def test_a_copy_of_a_database_is_another_log(database_url: str, postgres_url: str) -> None:
    original = await Store.open(database_url)
    log_id = original.log_id
    await original.close()
    name, source = f"copy_{uuid4().hex}", conninfo_to_dict(database_url)["dbname"]
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {source}".encode())
        copy = await Store.open(make_conninfo(postgres_url, dbname=name))
        assert copy.log_id != log_id
        await copy.close()
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def test_another_encoding_is_refused(postgres_url: str) -> None:
    name = f"ascii_{uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII'".encode())
        with pytest.raises(StartupRefused, match="encoded in SQL_ASCII; UTF8 is needed"):
            await Store.open(make_conninfo(postgres_url, dbname=name))
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


async def test_what_cannot_be_reached_is_said_without_the_password(postgres_url: str, free_port: int) -> None:
    nobody = make_conninfo(postgres_url, host="127.0.0.1", port=free_port, password="s3cret")
    said: list[str] = []
    with pytest.raises(StartupRefused, match="cannot be reached") as refused:
        await Store.open(nobody, wait_s=0.2, say=said.append)
    assert "s3cret" not in str(refused.value)
    # Once, and at once.
    [waiting] = said
    assert f":{free_port} does not answer; waiting 0.2 s: " in waiting
    assert "s3cret" not in waiting
    for wrong in ({"password": "s3cret"}, {"dbname": "nowhere"}):
        began_s = time.monotonic()
        with pytest.raises(StartupRefused, match="cannot be reached") as refused:
            await Store.open(make_conninfo(postgres_url, **wrong))
        assert time.monotonic() - began_s < 5
        assert "s3cret" not in str(refused.value)
        assert "\n" not in str(refused.value)
