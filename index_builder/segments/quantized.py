"""Flat SQ8: every vector as bytes, scanned by FAISS for candidates that are then scored exactly.

For dot products rows and queries become integers of -127 to 127 under one scale each, which FAISS
compares as they are (QT_8bit_direct_signed): 2 to 3 times faster than a range per dimension, and what
precision that costs the exact scoring of a few more candidates gives back. L2 needs rows and queries on
one scale, so it keeps a trained range per dimension (QT_8bit).
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_builder.segments import similarity
from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

# The constructors that FAISS gives these at run time take arrays and keywords, which its stubs do not say.
_Kind: Any = faiss.ScalarQuantizer
_Selector: Any = faiss.IDSelectorBitmap
_SearchParameters: Any = faiss.SearchParameters

_CODE_LIMIT = 127.0
_ADD_ROWS = 8192
#: Candidates beyond the multiple of k, for small k; and what a multiple adds at most, for large k.
_SPARE, _REFINE_MOST = 16, 512
_GATE_QUERIES = 32
_GATE_K = 10
_GATE_RECALL = 0.995


def candidates_for(k: int, refine: float) -> int:
    """How many candidates are scored exactly to find the best k; refine is at least 1."""
    return k + _SPARE + min(int((refine - 1) * k), _REFINE_MOST)


class QuantizedIndex:
    """Finds the rows whose vectors are probably nearest; safe to search from many threads."""

    def __init__(self, index: faiss.Index, metric: Metric) -> None:
        self._index, self._metric = index, metric

    @classmethod
    def build(cls, vectors: np.ndarray, metric: Metric) -> "QuantizedIndex | None":
        """The index of float32 [n, dim], or None where bytes cannot tell these vectors apart.

        That is measured: sampled rows as queries must find at least 99.5% of their exact ten nearest
        among the candidates.
        """
        dim = vectors.shape[1]
        if metric is Metric.L2:
            index = faiss.IndexScalarQuantizer(dim, _Kind.QT_8bit, faiss.METRIC_L2)
            index.train(vectors)
            index.add(vectors)
        else:
            index = faiss.IndexScalarQuantizer(dim, _Kind.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)
            largest = max(float(vectors.max()), -float(vectors.min()))
            for start in range(0, len(vectors), _ADD_ROWS):
                index.add(_integers(vectors[start : start + _ADD_ROWS], np.float32(largest)))
        built = cls(index, metric)
        return built if built._recall(vectors) >= _GATE_RECALL else None

    @classmethod
    def open(cls, path: Path, metric: Metric) -> "QuantizedIndex":
        """Map the index that `save` wrote. RuntimeError where FAISS cannot read it."""
        return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), metric)

    def save(self, path: Path) -> None:
        """Write the codes as a FAISS index file."""
        faiss.write_index(self._index, str(path))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimension."""
        return int(self._index.ntotal), int(self._index.d)

    def candidates(self, queries: np.ndarray, count: int, allowed: RowSet | None) -> np.ndarray:
        """Rows worth scoring exactly for each query, int64 [q, count], -1 where there are no more.

        queries: float32 [q, dim]; allowed: None for all.
        """
        if self._metric is not Metric.L2:
            # Some of FAISS's kernels cut a query's fractions off, so it has none.
            queries = _integers(queries, np.abs(queries).max(axis=1, keepdims=True))
        if allowed is None:
            _, rows = self._index.search(queries, count)
        else:
            # The selector reads the bytes it was given, so they live until the search is over.
            bitmap = allowed.bitmap()
            parameters = _SearchParameters(sel=_Selector(bitmap))
            _, rows = self._index.search(queries, count, params=parameters)
        found: np.ndarray = rows
        return found

    def _recall(self, vectors: np.ndarray) -> float:
        """Share of the exact nearest that the candidates of sampled rows hold; ties count as found."""
        sample = vectors[:: max(1, len(vectors) // _GATE_QUERIES)][:_GATE_QUERIES]
        k = min(_GATE_K, len(vectors))
        count = min(candidates_for(k, 1), len(vectors))
        found = 0
        for query, rows in zip(sample, self.candidates(sample, count, None), strict=True):
            exact = similarity.scores(query, vectors, self._metric)
            least = exact[similarity.best(exact, k)[-1]]
            found += min(k, int(np.count_nonzero(exact[rows[rows >= 0]] >= least)))
        return found / (k * len(sample))


def _integers(vectors: np.ndarray, largest: np.ndarray | np.float32) -> np.ndarray:
    """The vectors as whole numbers, float32, with `largest` at 127."""
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.float32(_CODE_LIMIT) / np.maximum(largest, np.float32(1e-30))
        scaled = vectors * factor
    return np.rint(scaled, out=scaled)
