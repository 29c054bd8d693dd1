"""Databases of one test's own, in the server that all tests share."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from uuid import uuid4

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo

#: A drop waits for everybody who is just connecting to the server; what is left then goes with the server.
DROP_WITHIN = "5s"


@contextlib.contextmanager
def made_databases(server_url: str) -> Iterator[Callable[..., str]]:
    """Makes empty databases, or copies (`copy_of`: the URL of one that nobody uses); gives their URLs."""
    names: list[str] = []

    def make(*, copy_of: str = "", name: str = "") -> str:
        names.append(name or f"made_{uuid4().hex}")
        template = f" TEMPLATE {conninfo_to_dict(copy_of)['dbname']}" if copy_of else ""
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {names[-1]}{template}".encode())
        return make_conninfo(server_url, dbname=names[-1])

    yield make
    # A connection that was given up halfway is closed when it is collected; till then a drop waits for it.
    gc.collect()
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"SET statement_timeout = '{DROP_WITHIN}'".encode())
        for each in names:
            with contextlib.suppress(errors.QueryCanceled):
                connection.execute(f"DROP DATABASE IF EXISTS {each} WITH (FORCE)".encode())
