"""Qdrant's engine in process (qdrant-edge), with its graph and an index on the filtered field."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import qdrant_edge as q

from loadtests.peers.contender import BATCH

_LINKS, _EF_CONSTRUCTION, _FULL_SCAN_KB = 16, 200, 1_000


class Qdrant:
    """One shard."""

    efforts: Sequence[int] = (16, 32, 64, 96, 128, 200, 400, 800)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._effort = self.efforts[0]

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        graph = q.HnswIndexConfig(_LINKS, _EF_CONSTRUCTION, _FULL_SCAN_KB)
        told = q.EdgeVectorParams(vectors.shape[1], q.Distance.Cosine, hnsw_config=graph)
        self._shard = q.EdgeShard.create(str(self._directory / "shard"), q.EdgeConfig(told))
        self._shard.update(q.UpdateOperation.create_field_index("bucket", q.PayloadSchemaType.Integer))
        for start in range(0, len(vectors), BATCH):
            rows = range(start, min(start + BATCH, len(vectors)))
            points = [q.Point(row, vectors[row].tolist(), {"bucket": int(buckets[row])}) for row in rows]
            self._shard.update(q.UpdateOperation.upsert_points(points))
        self._shard.optimize()
        self._shard.flush()

    def set_effort(self, effort: int) -> None:
        self._effort = effort

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        condition = None
        if below is not None:
            condition = q.Filter(must=[q.FieldCondition("bucket", range=q.RangeFloat(lt=float(below)))])
        found = self._shard.search(
            q.SearchRequest(
                q.Query.Nearest(query.tolist()), k, filter=condition, params=q.SearchParams(self._effort)
            )
        )
        return [int(point.id) for point in found]

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        asked = [
            q.QueryRequest(
                limit=k, query=q.Query.Nearest(query.tolist()), params=q.SearchParams(self._effort)
            )
            for query in queries
        ]
        found = self._shard.query_batch(q.QueryBatchRequest(asked))
        return [[int(point.id) for point in points] for points in found]

    def close(self) -> None:
        self._shard.close()
