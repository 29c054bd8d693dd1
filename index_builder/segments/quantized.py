"""Flat SQ8: every vector as bytes, scanned by FAISS for candidates that are then scored exactly.

For dot products rows and queries become integers of -127 to 127 under one scale each, which FAISS
compares as they are (QT_8bit_direct_signed): 2 to 3 times faster than a range per dimension, and what
precision that costs the exact scoring of a few more candidates gives back. L2 needs rows and queries on
one scale, so it keeps a trained range per dimension (QT_8bit).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_builder.segments.candidates import measure, pool_of
from index_builder.segments.curve import Curve
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

# The constructors that FAISS gives these at run time take arrays and keywords, which its stubs do not say.
_Kind: Any = faiss.ScalarQuantizer
_Selector: Any = faiss.IDSelectorBitmap
_SearchParameters: Any = faiss.SearchParameters

_CODE_LIMIT = 127.0
_ADD_ROWS = 8192
#: Candidates scored exactly, as a multiple of k.
_LADDER = (1.0, 1.5, 2.5, 4.0)
_REFINE_MOST = 512
_GATE_QUERIES = 32
_GATE_RECALL = 0.995


class QuantizedIndex:
    """Compares a query with every row's code; safe to search from many threads."""

    kind = IndexKind.FLAT
    ladder: Sequence[float] = _LADDER
    #: Where fewer are allowed, scoring just those exactly is cheaper.
    scan_share = 1 / 50

    def __init__(self, index: faiss.Index, metric: Metric) -> None:
        self._index, self._metric = index, metric
        self.shape = int(index.ntotal), int(index.d)

    @classmethod
    def build(cls, vectors: np.ndarray, metric: Metric) -> "tuple[QuantizedIndex, Curve] | None":
        """The index of float32 [n, dim] and what it finds; None where bytes cannot tell these vectors apart.

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
        sample = vectors[:: max(1, len(vectors) // _GATE_QUERIES)][:_GATE_QUERIES]
        curve = measure(built, sample, vectors, None, metric)
        return (built, curve) if curve.rungs[0][1] >= _GATE_RECALL else None

    @classmethod
    def open(cls, path: Path, metric: Metric) -> "QuantizedIndex":
        """Map the index that `save` wrote. RuntimeError where FAISS cannot read it."""
        return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), metric)

    def save(self, path: Path) -> None:
        """Write the codes as a FAISS index file."""
        faiss.write_index(self._index, str(path))

    def pool(self, k: int, knob: float) -> int:
        """How many candidates to score exactly to find the best k."""
        return pool_of(k, knob, _REFINE_MOST)

    def candidates(self, queries: np.ndarray, count: int, allowed: RowSet | None, knob: float) -> np.ndarray:
        """Rows worth scoring exactly for each query, int64 [q, count], -1 where there are no more.

        queries: float32 [q, dim], prepared; allowed: None for all; every code is compared whatever the
        knob, which counts in `pool`.
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


def _integers(vectors: np.ndarray, largest: np.ndarray | np.float32) -> np.ndarray:
    """The vectors as whole numbers, float32, with `largest` at 127."""
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.float32(_CODE_LIMIT) / np.maximum(largest, np.float32(1e-30))
        scaled = vectors * factor
    return np.rint(scaled, out=scaled)
