"""What every peer is asked: take vectors in, find neighbours, at an effort that can be tuned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

#: Documents that one call takes in.
BATCH = 1_000


class Contender(Protocol):
    """A peer with an empty store in a folder of its own. Vectors are float32 of length 1, ids are rows.

    A call is blocking and may come from many threads.
    """

    #: Rising; the first that finds enough is used.
    efforts: Sequence[int]

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        """Take all in and return when every one is indexed; vectors [n, dim], buckets int [n]."""

    def set_effort(self, effort: int) -> None:
        """How hard to look from now on."""

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        """The k nearest of a query [dim] by cosine, of those whose bucket is less than `below`."""

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        """The k nearest of each."""

    def close(self) -> None:
        """Stop what was started."""


def made(name: str, directory: Path, url: str) -> Contender:
    """The peer of that name; ImportError where it is not installed. `url`: of a Postgres."""
    match name:
        case "pgvector":
            from loadtests.peers.pgvector import Pgvector

            return Pgvector(url)
        case "chroma":
            from loadtests.peers.chroma import Chroma

            return Chroma(directory)
        case "lancedb":
            from loadtests.peers.lance import Lance

            return Lance(directory)
        case "qdrant-edge":
            from loadtests.peers.qdrant import Qdrant

            return Qdrant(directory)
        case "redisearch":
            from loadtests.peers.redisearch import Redisearch

            return Redisearch(directory)
        case "milvus":
            from loadtests.peers.milvus import Milvus

            return Milvus()
    raise ValueError(f"no peer {name!r}")
