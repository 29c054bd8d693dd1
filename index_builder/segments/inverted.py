"""IVF with 4-bit product codes (https://arxiv.org/abs/1702.08734): small, quick to build, best in batches.

Codes of four bits for two dimensions each are compared by table look-ups in registers (FAISS "fast scan").
What a GPU is to search keeps a byte a dimension instead, for GPUs have no fast scan.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_builder.segments.candidates import ASKED_K, GATE_RECALL, held_aside, measure, pool_of
from index_builder.segments.curve import Curve
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

# FAISS gives its classes arrays, keywords and attributes at run time, which its stubs do not say.
_Selector: Any = faiss.IDSelectorBitmap
_Parameters: Any = getattr(faiss, "SearchParametersIVF")  # noqa: B009

#: Lists, as a multiple of the square root of rows; and rows a list at least.
_LISTS_A_ROOT, _LEAST_LIST_ROWS = 3.2, 39
_TRAINING_ROWS_A_LIST, _TRAINING_ROUNDS = 64, 10
#: A code has at most so many parts: their distances are summed in 16 bits.
_PARTS_MOST = 512
#: Up to here every dimension has a part of its own, or too few bits would tell rows apart.
_FINE_DIM = 64
_ADD_ROWS = 8192
#: Where a share s of rows is allowed, s to this power as many lists are read.
_NARROWING = -0.2
#: And where n times as many candidates are asked for as were measured, n to this power as many.
_WIDENING = 0.2
#: Candidates, as a multiple of k: four bits tell rows apart less well than eight.
_REFINE, _REFINE_MOST = 3.0, 2048


class InvertedIndex:
    """Reads the lists of the clusters nearest to a query; safe to search from many threads."""

    kind = IndexKind.IVF
    #: Where fewer are allowed, scoring just those exactly is cheaper.
    scan_share = 1 / 25

    def __init__(self, index: Any) -> None:
        self.faiss_index = index
        self.shape = int(index.ntotal), int(index.d)
        self.lists = int(index.nlist)
        #: nprobe: how many lists are read.
        steps = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
        self.ladder: Sequence[float] = [*(step for step in steps if step < self.lists), self.lists]

    @classmethod
    def build(
        cls, vectors: np.ndarray, metric: Metric, *, for_gpu: bool
    ) -> "tuple[InvertedIndex, Curve] | None":
        """The lists of float32 [n, dim] and what they find; None where even all of them find too little."""
        rows, dim = vectors.shape
        measures = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        lists = max(1, min(1 << round(math.log2(_LISTS_A_ROOT * math.sqrt(rows))), rows // _LEAST_LIST_ROWS))
        code = "SQ8" if for_gpu else f"PQ{_parts(dim)}x4fs"
        index: Any = faiss.index_factory(dim, f"IVF{lists},{code}", measures)
        index.cp.niter, index.cp.min_points_per_centroid = _TRAINING_ROUNDS, 1
        held = held_aside(rows)
        present = np.ones(rows, np.bool_)
        present[held] = False
        added = np.flatnonzero(present)
        index.train(vectors[added[:: max(1, len(added) // (lists * _TRAINING_ROWS_A_LIST))]])
        for start in range(0, len(added), _ADD_ROWS):
            some = added[start : start + _ADD_ROWS]
            index.add_with_ids(vectors[some], some)
        curve = measure(cls(index), vectors[held], vectors, RowSet(present), metric)
        index.add_with_ids(vectors[held], held)
        return (cls(index), curve) if curve.rungs[-1][1] >= GATE_RECALL else None

    @classmethod
    def open(cls, path: Path) -> "InvertedIndex":
        """Map the index that `save` wrote. RuntimeError where FAISS cannot read it."""
        return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))

    def save(self, path: Path) -> None:
        """Write lists and codes as a FAISS index file."""
        faiss.write_index(self.faiss_index, str(path))

    def pool(self, k: int, knob: float) -> int:
        """How many candidates to score exactly to find the best k."""
        return pool_of(k, _REFINE, _REFINE_MOST)

    def candidates(self, queries: np.ndarray, count: int, allowed: RowSet | None, knob: float) -> np.ndarray:
        """Rows worth scoring exactly for each query, int64 [q, count], -1 where no more were found.

        queries: float32 [q, dim], prepared; allowed: None for all; knob: as on the ladder.
        """
        _, rows = self.faiss_index.search(queries, count, params=self.parameters(count, allowed, knob))
        found: np.ndarray = rows
        return found

    def parameters(self, count: int, allowed: RowSet | None, knob: float) -> Any:
        """FAISS's parameters of such a search; they keep what they read."""
        knob *= max(1, count / self.pool(ASKED_K, knob)) ** _WIDENING
        selector: Any = None
        if allowed is not None:
            knob *= allowed.share**_NARROWING
            selector = _Selector(allowed.bitmap())
        return _Parameters(nprobe=min(math.ceil(knob), self.lists), sel=selector)


def _parts(dim: int) -> int:
    """Parts of a code: two dimensions each; one where there are few or that does not divide, or more."""
    if dim % 2 or dim <= _FINE_DIM:
        return dim
    width = 2
    while dim // width > _PARTS_MOST and dim % (width * 2) == 0:
        width *= 2
    return dim // width
