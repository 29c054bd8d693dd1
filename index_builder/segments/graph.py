"""HNSW over SQ8 codes (https://arxiv.org/abs/1603.09320): the quickest way to one query's neighbours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from index_builder.segments.candidates import ASKED_K, GATE_RECALL, held_aside, measure, pool_of
from index_builder.segments.curve import Curve
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.row_set import RowSet
from shard_router.hashing import hashes_of
from shard_router.model import Metric

# FAISS gives its classes arrays, keywords and attributes at run time, which its stubs do not say.
_Graph: Any = faiss.IndexHNSWSQ
_Kind: Any = faiss.ScalarQuantizer
_Selector: Any = faiss.IDSelectorBitmap
_GraphParameters: Any = getattr(faiss, "SearchParametersHNSW")  # noqa: B009
_CodeParameters: Any = faiss.SearchParameters

_LINKS, _EF_CONSTRUCTION = 32, 200
#: efSearch, how many rows the walk keeps in hand, for the ten nearest.
_LADDER = (34, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768)
_ADD_ROWS = 8192
_SEED = 1
_NONE = np.empty(0, np.int64)
#: Where a share s of rows is allowed, s to this power as many are kept in hand (measured for .05 to .7).
_NARROWING = -0.45
#: What keeping one more row in hand costs, in codes compared one after another, in codes picked out by a
#: bitmap, and in bits of that bitmap.
_CODES, _PICKED_CODES, _BITS = 71, 38, 1400


class GraphIndex:
    """Walks a graph of neighbours; compares all allowed codes where that is less work.

    Safe to search from many threads. In files of earlier releases, rows that were held aside to measure with
    are in the places of the last rows, and those in theirs.
    """

    kind = IndexKind.HNSW
    ladder: Sequence[float] = _LADDER
    #: Where fewer are allowed, scoring just those exactly is cheaper.
    scan_share = 1 / 50

    def __init__(self, index: Any, held: np.ndarray, rows: int) -> None:
        """held: those of the rows that are in the places of the last, int64, ascending."""
        self._index = index
        self._codes: Any = faiss.downcast_index(index.storage)
        self.shape = rows, int(index.d)
        self.held = held
        self._swap = held, np.arange(rows - len(held), rows)
        #: int32 [rows + 1]: the row at each place; -1 stays -1.
        self._row_at = np.append(_places(rows, self._swap), np.int32(-1))

    @classmethod
    def build(cls, vectors: np.ndarray, metric: Metric) -> "tuple[GraphIndex, Curve] | None":
        """The graph of float32 [n, dim] and what it finds; None where even its best is too little."""
        rows, dim = vectors.shape
        measures = faiss.METRIC_L2 if metric is Metric.L2 else faiss.METRIC_INNER_PRODUCT
        index = _Graph(dim, _Kind.QT_8bit, _LINKS, measures)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        index.train(vectors)
        held = held_aside(rows)
        present = np.ones(rows, np.bool_)
        present[held] = False
        # Neighbours in a corpus often come one after another. Linked in that order they find each other and
        # little else: 100k package descriptions as they came had a recall of .978 at most, shuffled .995.
        shuffled = np.random.default_rng(_SEED).permutation(np.flatnonzero(present))
        leader = _leaders(faiss.downcast_index(index.storage), vectors, shuffled)
        twins = leader != shuffled
        linked = int(np.count_nonzero(~twins))
        order = np.concatenate((shuffled[~twins], shuffled[twins], held))
        place_of = np.argsort(order)
        for start in range(0, linked, _ADD_ROWS):
            index.add(vectors[order[start : min(start + _ADD_ROWS, linked)]])
        _append_twins(index, vectors, shuffled[twins], place_of[leader[twins]])
        built = cls(index, _NONE, rows)
        built._row_at[:-1] = order
        curve = measure(built, vectors[held], vectors, RowSet(present), metric)
        index.add(vectors[held])
        if curve.rungs[-1][1] < GATE_RECALL:
            return None
        index.permute_entries(place_of)
        return cls(index, _NONE, rows), curve

    @classmethod
    def open(cls, path: Path, held: np.ndarray) -> "GraphIndex":
        """Map the index that `save` wrote. RuntimeError where FAISS cannot read it."""
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        return cls(index, held, int(index.ntotal))

    def save(self, path: Path) -> None:
        """Write graph and codes as a FAISS index file."""
        faiss.write_index(self._index, str(path))

    def pool(self, k: int, knob: float) -> int:
        """How many candidates to score exactly to find the best k."""
        return pool_of(k, 1, 0)

    def candidates(self, queries: np.ndarray, count: int, allowed: RowSet | None, knob: float) -> np.ndarray:
        """Rows worth scoring exactly for each query, int64 [q, count], -1 where no more were found.

        queries: float32 [q, dim], prepared; allowed: None for all; knob: as on the ladder.
        """
        # What is asked for beyond what was measured is kept in hand besides.
        in_hand = knob + max(0, count - pool_of(ASKED_K, 1, 0))
        selector: Any = None
        if allowed is None:
            codes_cost = self.shape[0] / _CODES
        else:
            in_hand *= allowed.share**_NARROWING
            codes_cost = allowed.count / _PICKED_CODES + self.shape[0] / _BITS
            selector = _Selector(allowed.bitmap(self._swap))
        if in_hand < codes_cost:
            parameters = _GraphParameters(efSearch=max(int(in_hand), count), sel=selector)
            _, places = self._index.search(queries, count, params=parameters)
        else:
            _, places = self._codes.search(queries, count, params=_CodeParameters(sel=selector))
        rows: np.ndarray = self._row_at[places]
        return rows


def _leaders(codec: Any, vectors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each of these rows the first of them, in their order, that has the same codes, int64 [n]."""
    hashes = np.empty(len(order), np.uint64)
    for start in range(0, len(order), _ADD_ROWS):
        codes = codec.sa_encode(vectors[order[start : start + _ADD_ROWS]])
        hashes[start : start + len(codes)] = hashes_of(codes)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    leaders: np.ndarray = order[first[group]]
    return leaders


def _append_twins(index: Any, vectors: np.ndarray, rows: np.ndarray, leaders: np.ndarray) -> None:
    """Add rows that lie exactly where others do, each group as a chain that begins at its leader.

    rows, leaders: int64 [n]; a leader is a place, and linked already. FAISS would keep every one of such
    rows as a neighbour of all others (it drops one only where another is nearer to it by anything at all):
    hundreds of them fill each other's lists and those of whoever lies near, and the graph falls apart.
    """
    if not len(rows):
        return
    graph, first = index.hnsw, int(index.ntotal)
    for start in range(0, len(rows), _ADD_ROWS):
        index.storage.add(vectors[rows[start : start + _ADD_ROWS]])
    graph.prepare_level_tab(len(rows), False)
    index.ntotal = index.storage.ntotal
    starts, width = faiss.vector_to_array(graph.offsets), int(graph.nb_neighbors(0))
    links = faiss.rev_swig_ptr(graph.neighbors.data(), graph.neighbors.size())
    ends: dict[int, int] = {}
    for place, leader in enumerate(leaders.tolist(), first):
        start = int(starts[ends.get(leader, leader)])
        if leader in ends:
            links[start] = place
        else:
            free = np.flatnonzero(links[start : start + width] < 0)
            # Where all are taken the first is the farthest, or was when the list was last made.
            links[start + (int(free[0]) if len(free) else 0)] = place
        ends[leader] = place


def _places(rows: int, swap: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """int32 [rows]: the row at each place."""
    order = np.arange(rows, dtype=np.int32)
    order[swap[0]], order[swap[1]] = swap[1], swap[0]
    return order
