"""Chroma's server, as `chroma run` starts it, and its HTTP client."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
from chromadb.config import Settings

from loadtests.peers.contender import BATCH

_LINKS, _EF_CONSTRUCTION = 32, 200
_START_LIMIT_S = 60.0


class Chroma:
    """One collection of one server on loopback."""

    efforts: Sequence[int] = (10, 20, 40, 60, 80, 120, 200, 400, 800)

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = Path(sys.executable).with_name("chroma")
        self._server = subprocess.Popen(
            [command, "run", "--path", directory, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until_s = time.monotonic() + _START_LIMIT_S
        while True:
            try:
                settings = Settings(anonymized_telemetry=False)
                self._client: Any = chromadb.HttpClient("127.0.0.1", port, settings=settings)
                break
            except Exception:
                if time.monotonic() > until_s or self._server.poll() is not None:
                    self.close()
                    raise
                time.sleep(0.1)

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        graph = {"space": "cosine", "max_neighbors": _LINKS, "ef_construction": _EF_CONSTRUCTION}
        self._collection = self._client.create_collection("peer", configuration={"hnsw": graph})
        for start in range(0, len(vectors), BATCH):
            rows = range(start, min(start + BATCH, len(vectors)))
            self._collection.add(
                ids=[str(row) for row in rows],
                embeddings=vectors[rows.start : rows.stop],
                metadatas=[{"bucket": int(buckets[row])} for row in rows],
            )

    def set_effort(self, effort: int) -> None:
        self._collection.modify(configuration={"hnsw": {"ef_search": effort}})

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        where = None if below is None else {"bucket": {"$lt": below}}
        found = self._collection.query(query_embeddings=[query], n_results=k, where=where, include=[])
        return [int(id) for id in found["ids"][0]]

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        found = self._collection.query(query_embeddings=list(queries), n_results=k, include=[])
        return [[int(id) for id in ids] for ids in found["ids"]]

    def close(self) -> None:
        self._server.kill()
        self._server.wait()
