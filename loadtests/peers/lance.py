"""LanceDB, in process, with an index of graphs over byte codes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa

_REFINE = 2


class Lance:
    """One table."""

    efforts: Sequence[int] = (24, 32, 64, 96, 128, 200, 400, 800)

    def __init__(self, directory: Path) -> None:
        self._database: Any = lancedb.connect(str(directory))
        self._effort = self.efforts[0]

    def load(self, vectors: np.ndarray, buckets: np.ndarray) -> None:
        flat = pa.array(vectors.reshape(-1), pa.float32())
        rows = pa.table(
            {
                "id": pa.array(range(len(vectors)), pa.int32()),
                "bucket": pa.array(buckets, pa.int32()),
                "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            }
        )
        self._table = self._database.create_table("peer", rows)
        self._table.create_index(
            metric="cosine", vector_column_name="vector", index_type="IVF_HNSW_SQ", num_partitions=1
        )
        self._table.create_scalar_index("bucket")

    def set_effort(self, effort: int) -> None:
        self._effort = effort

    def search(self, query: np.ndarray, k: int, below: int | None) -> list[int]:
        asked = self._asked(query, k)
        if below is not None:
            asked = asked.where(f"bucket < {below}", prefilter=True)
        ids: list[int] = asked.to_arrow()["id"].to_pylist()
        return ids

    def batch(self, queries: np.ndarray, k: int) -> list[list[int]]:
        rows = self._asked(list(queries), k).to_arrow()
        found: list[list[int]] = [[] for _ in queries]
        for query, id in zip(rows["query_index"].to_pylist(), rows["id"].to_pylist(), strict=True):
            found[query].append(id)
        return found

    def close(self) -> None:
        """Nothing was started."""

    def _asked(self, query: object, k: int) -> Any:
        search = self._table.search(query, vector_column_name="vector").distance_type("cosine").limit(k)
        return search.ef(self._effort).refine_factor(_REFINE).select(["id"])
