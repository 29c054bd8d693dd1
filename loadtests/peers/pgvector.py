"""Postgres with pgvector: a row a vector, an HNSW index, a connection a caller."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import psycopg

from loadtests.peers.contender import BATCH

Connection = psycopg.Connection[tuple[object, ...]]

_LINKS, _EF_CONSTRUCTION = 16, 200


class Pgvector:
    """Over the driver, prepared statements, binary results."""

    efforts: Sequence[int] = (20, 40, 60, 80, 120, 200, 400, 800)

    def __init__(self, url: str) -> None:
        self._url = url
        self._effort = self.efforts[0]
        #: Connections that no thread uses now.
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute("DROP TABLE IF EXISTS peer")
            connection.execute(
                f"CREATE TABLE peer (id int PRIMARY KEY, bucket int, embedding vector({vectors.shape[1]}))"
            )
            connection.execute(
                "CREATE INDEX ON peer USING hnsw (embedding vector_cosine_ops) "
                f"WITH (m = {_LINKS}, ef_construction = {_EF_CONSTRUCTION})"
            )
            for start in range(0, len(vectors), BATCH):
                with connection.cursor().copy("COPY peer (id, bucket, embedding) FROM STDIN") as copy:
                    for row in range(start, min(start + BATCH, len(vectors))):
                        copy.write_row((row, int(buckets[row]), _text(vectors[row])))
            connection.execute("ANALYZE peer")

    def set_effort(self, effort: int) -> None:
        self.close()
        self._effort = effort

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        where = "" if below is None else f"WHERE bucket < {int(below)}"
        statement = f"SELECT id FROM peer {where} ORDER BY embedding <=> %s::vector LIMIT %s"
        with self._connection() as connection:
            rows = connection.execute(statement, (_text(query), k), prepare=True, binary=True)
            return [int(str(row[0])) for row in rows]

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        statement = "SELECT id FROM peer ORDER BY embedding <=> %s::vector LIMIT %s"
        with self._connection() as connection, connection.pipeline():
            found = [connection.execute(statement, (_text(each), k), prepare=True) for each in queries]
            return [[int(str(row[0])) for row in cursor] for cursor in found]

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get().close()

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection for one call, with the effort set."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = psycopg.connect(self._url, autocommit=True)
            connection.execute(f"SET hnsw.ef_search = {self._effort}")
            # A filter goes on looking until there are k, or many were looked at.
            connection.execute("SET hnsw.iterative_scan = strict_order")
        try:
            yield connection
        finally:
            self._idle.put(connection)


def _text(vector: np.ndarray) -> str:
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
