"""Milvus, where one is pointed at: one collection with an HNSW index, over its own client."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from loadtests.peers.contender import BATCH

#: Of a server, `http://host:19530`, whose collection `peer` is this bench's own; and what it asks for.
URL, TOKEN = "MILVUS_URL", "MILVUS_TOKEN"

_LINKS, _EF_CONSTRUCTION = 16, 200


class Milvus:
    """One collection; RuntimeError where none is pointed at."""

    efforts: Sequence[int] = (10, 20, 40, 60, 80, 120, 200, 400, 800)

    def __init__(self) -> None:
        url = os.environ.get(URL)
        if not url:
            raise RuntimeError(f"set {URL} to compare with one")
        self._client: Any = MilvusClient(url, token=os.environ.get(TOKEN, ""))
        self._effort = self.efforts[0]

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        self._drop()
        schema = self._client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        schema.add_field("bucket", DataType.INT32)
        index = self._client.prepare_index_params()
        graph = {"M": _LINKS, "efConstruction": _EF_CONSTRUCTION}
        index.add_index("embedding", index_type="HNSW", metric_type="COSINE", params=graph)
        self._client.create_collection("peer", schema=schema, index_params=index)
        for start in range(0, len(vectors), BATCH):
            rows = range(start, min(start + BATCH, len(vectors)))
            told = [{"id": row, "embedding": vectors[row], "bucket": int(buckets[row])} for row in rows]
            self._client.insert("peer", told)
        self._client.flush("peer")
        self._client.load_collection("peer")

    def set_effort(self, effort: int) -> None:
        self._effort = effort

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        (found,) = self._search(query[None], k, "" if below is None else f"bucket < {below}")
        return found

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        return self._search(queries, k, "")

    def close(self) -> None:
        self._drop()
        self._client.close()

    def _search(self, queries: np.ndarray, k: int, filter: str) -> list[list[int]]:
        found = self._client.search(
            "peer", data=list(queries), anns_field="embedding", limit=k, filter=filter,
            search_params={"params": {"ef": self._effort}},
        )  # fmt: skip
        return [[int(hit["id"]) for hit in hits] for hits in found]

    def _drop(self) -> None:
        if self._client.has_collection("peer"):
            self._client.drop_collection("peer")
