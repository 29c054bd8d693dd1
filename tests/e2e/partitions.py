"""DATABASES=2 has the services under test spread every collection over so many databases."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from made_databases import made_databases


@contextmanager
def lend_partitions(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The setting of one service's further databases, new ones on a server of the tests'; {} for none."""
    more = int(os.environ.get("DATABASES", "1")) - 1
    if not more:
        yield {}
        return
    with made_databases(request.getfixturevalue("postgres_url")) as make:
        yield {"RINGFORT_METADATA__PARTITIONS": json.dumps({f"east{i}": make() for i in range(more)})}
