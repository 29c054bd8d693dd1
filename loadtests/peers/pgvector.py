"""Postgres with pgvector: a row a vector, an HNSW index, a connection a thread."""

import threading
from collections.abc import Sequence

import numpy as np
import psycopg

from loadtests.peers.contender import BATCH

_LINKS, _EF_CONSTRUCTION = 16, 200


class Pgvector:
    """Over the driver, prepared statements, binary results."""

    efforts: Sequence[int] = (20, 40, 60, 80, 120, 200, 400, 800)

    def __init__(self, url: str) -> None:
        self._url = url
        self._effort = self.efforts[0]
        self._local = threading.local()
        self._open: list[psycopg.Connection[tuple[object, ...]]] = []
        self._lock = threading.Lock()
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
        self._effort = effort
        self._local = threading.local()

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        where = "" if below is None else f"WHERE bucket < {int(below)}"
        statement = f"SELECT id FROM peer {where} ORDER BY embedding <=> %s::vector LIMIT %s"
        rows = self._connection().execute(statement, (_text(query), k), prepare=True, binary=True)
        return [int(str(row[0])) for row in rows]

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        connection = self._connection()
        statement = "SELECT id FROM peer ORDER BY embedding <=> %s::vector LIMIT %s"
        with connection.pipeline():
            found = [connection.execute(statement, (_text(each), k), prepare=True) for each in queries]
            return [[int(str(row[0])) for row in cursor] for cursor in found]

    def close(self) -> None:
        for connection in self._open:
            connection.close()

    def _connection(self) -> "psycopg.Connection[tuple[object, ...]]":
        connection: psycopg.Connection[tuple[object, ...]] | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = psycopg.connect(self._url, autocommit=True)
            connection.execute(f"SET hnsw.ef_search = {self._effort}")
            # A filter goes on looking until there are k, or many were looked at.
            connection.execute("SET hnsw.iterative_scan = strict_order")
            self._local.connection = connection
            with self._lock:
                self._open.append(connection)
        return connection


def _text(vector: np.ndarray) -> str:
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
