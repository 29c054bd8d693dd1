"""DATABASES=2 has the services under test spread every collection over so many databases."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo


@contextmanager
def lend_partitions(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The setting of one service's further databases, new ones on a server of the tests'; {} for none."""
    more = int(os.environ.get("DATABASES", "1")) - 1
    if not more:
        yield {}
        return
    server = request.getfixturevalue("postgres_url")
    names = {f"east{i}": f"e2e_{uuid4().hex}" for i in range(more)}
    urls = {partition: make_conninfo(server, dbname=name) for partition, name in names.items()}
    with psycopg.connect(server, autocommit=True) as connection:
        for name in names.values():
            connection.execute(f"CREATE DATABASE {name}".encode())
        yield {"RINGFORT_METADATA__PARTITIONS": json.dumps(urls)}
        for name in names.values():
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
