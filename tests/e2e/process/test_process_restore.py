"""A running service whose database is exchanged, or that lagged behind what the log still knows."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import grpc
import numpy as np
import psycopg
import pytest
from command_line import eventually
from psycopg.conninfo import make_conninfo
from up import Up, end

from ringfort import Client
from ringfort.documents import Document, Version
from ringfort.errors import FailedPrecondition, Unavailable

DIM = 4
NOTES = "notes"


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """The name of an empty database on the session's server."""
    name = f"service_{uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield name
        for each in (name, backup_of(name)):
            connection.execute(f"DROP DATABASE IF EXISTS {each} WITH (FORCE)".encode())


def backup_of(name: str) -> str:
    return f"{name}_backup"


def restore(postgres_url: str, name: str) -> None:
    """Put the backup in the place of the database, clients or not."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false".encode())
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
        connection.execute(f"ALTER DATABASE {backup_of(name)} RENAME TO {name}".encode())


def settings(postgres_url: str, database: str, **more: str) -> dict[str, str]:
    return {
        "RINGFORT_METADATA__POSTGRES_URL": make_conninfo(postgres_url, dbname=database),
        "RINGFORT_SHARD__MEMTABLE_ROWS": "16",
        **more,
    }


def documents(*ids: str) -> list[Document]:
    return [Document(id, text=f"text of {id}", vector=vector_of(id)) for id in ids]


def vector_of(id: str) -> np.ndarray:
    return np.random.default_rng(list(id.encode())).normal(size=DIM).astype(np.float32)


def found(client: Client) -> set[str]:
    return {hit.id for hit in client.search(NOTES, vector=np.ones(DIM, np.float32), k=1_000)}


def test_a_database_restored_under_a_running_service_is_served_as_it_is(
    data_dir: Path, postgres_url: str, database: str
) -> None:
    kept, lost = [f"kept-{n}" for n in range(40)], [f"lost-{n}" for n in range(40)]
    env = settings(postgres_url, database)
    up = Up.start(data_dir, env=env)
    try:
        with Client(up.grpc) as client:
            client.create_collection(NOTES, dim=DIM, shards=2)
            client.upsert(NOTES, documents(*kept))
        assert up.stop() == 0
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {backup_of(database)} TEMPLATE {database}".encode())
        up = Up.start(data_dir, env=env)
        with Client(up.grpc) as client:
            client.create_collection("younger", dim=DIM)
            old = client.upsert(NOTES, documents(*lost)).token
            client.delete(NOTES, ids=kept[:10])
            assert found(client) == {*kept[10:], *lost}
            [stale] = client.get(NOTES, ["lost-0"])
            # Remembered, so that a cache could answer it.
            assert {client.search(NOTES, id="kept-20", k=50).served_from for _ in range(2)} == {"INDEX", "L1"}

            restore(postgres_url, database)

            def restored() -> bool:
                try:
                    return client.get(NOTES, ["lost-0"]) == [None] and client.count(NOTES) == len(kept)
                except Unavailable:
                    return False

            eventually(restored, 30)
            # By every way of asking it is the backup, and nothing of what came after it.
            assert found(client) == {document.id for document in client.scan(NOTES)} == set(kept)
            again = client.search(NOTES, id="kept-20", k=50)
            assert again.served_from == "INDEX"
            assert {hit.id for hit in again} == {*kept} - {"kept-20"}
            assert [each.name for each in client.collections()] == [NOTES]
            with pytest.raises(FailedPrecondition):
                client.search(NOTES, id="kept-20", read_after=old)
            # Positions are taken again, in a later term: no version of what was lost fits.
            new = client.upsert(NOTES, documents(*lost))
            assert new.visible
            [fresh] = client.get(NOTES, ["lost-0"])
            assert fresh is not None
            assert fresh.version is not None
            assert stale is not None
            assert stale.version is not None
            assert (stale.version.term, fresh.version) == (1, Version(2, stale.version.seq))
            refused = client.upsert(
                NOTES, [Document("lost-0", vector=vector_of("x"), if_version=stale.version)]
            )
            assert [failure.code for failure in refused.failures] == [grpc.StatusCode.ABORTED]
            assert found(client) == {*kept, *lost}
            assert {hit.id for hit in client.search(NOTES, id="kept-20", read_after=new.token, k=100)} == (
                {*kept, *lost} - {"kept-20"}
            )
        assert up.stop() == 0
    finally:
        end(up.process)


def test_a_replica_that_missed_forgotten_deletes_is_built_anew(
    data_dir: Path, postgres_url: str, database: str, tmp_path: Path
) -> None:
    """Its files, put back as they were long ago, still hold what was deleted since."""
    ids = [f"d{n}" for n in range(200)]
    env = settings(postgres_url, database, RINGFORT_METADATA__TOMBSTONE_TTL_S="0.2")
    segments, older = data_dir / "segments", tmp_path / "older"
    up = Up.start(data_dir, env=env)
    try:
        with Client(up.grpc) as client:
            client.create_collection(NOTES, dim=DIM, shards=2)
            client.upsert(NOTES, documents(*ids))
            assert found(client) == set(ids)
        assert up.stop() == 0
        shutil.copytree(segments, older)
        up = Up.start(data_dir, env=env)
        with (
            Client(up.grpc) as client,
            psycopg.connect(make_conninfo(postgres_url, dbname=database), autocommit=True) as connection,
        ):
            client.delete(NOTES, ids=ids[:150])
            dead = b"SELECT uid FROM ringfort.collections"
            (uid,) = connection.execute(dead).fetchone() or (0,)
            tombstones = f"SELECT FROM ringfort.documents_{uid} WHERE deleted".encode()
            eventually(lambda: connection.execute(tombstones).rowcount == 0, 30)
        assert up.stop() == 0
        shutil.rmtree(segments)
        shutil.copytree(older, segments)
        up = Up.start(data_dir, env=env)
        with Client(up.grpc) as client:
            assert found(client) == set(ids[150:])
            assert client.count(NOTES) == 50
            log = (data_dir / "logs" / "ringfort.log").read_text()
            assert "is built anew: log" in log
            assert client.upsert(NOTES, documents("new")).visible
            assert found(client) == {*ids[150:], "new"}
        assert up.stop() == 0
    finally:
        end(up.process)
