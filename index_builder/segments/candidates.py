"""What finds the rows of a segment that are worth scoring exactly, and how much of the truth it finds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from index_builder.segments import similarity
from index_builder.segments.curve import Curve
from index_builder.segments.index_spec import IndexKind
from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

#: Recall is measured over so many neighbours, as a search for them finds it: a shard asks its parts for
#: eight more, so that ids decide between equal scores.
_MEASURED_K, ASKED_K = 10, 18
#: A graph or lists that find less, however hard they look, are not worth having.
GATE_RECALL = 0.99
#: More work than finds this much is not measured, nor ever spent.
_ENOUGH_RECALL = 0.999
#: Candidates beyond the multiple of k, for small k.
_SPARE = 16
_HELD_MOST, _HELD_SHARE = 512, 1 / 16
#: How far towards another row.
_STRANGENESS = np.float32(0.3)


class CandidateIndex(Protocol):
    """Finds rows that are probably nearest; safe to search from many threads."""

    kind: IndexKind

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimension."""

    @property
    def ladder(self) -> Sequence[float]:
        """The amounts of work that are worth measuring, least first."""

    @property
    def scan_share(self) -> float:
        """Where no larger a share of rows is allowed, scoring just those is cheaper than asking here."""

    def pool(self, k: int, knob: float) -> int:
        """How many candidates to score exactly to find the best k."""

    def candidates(self, queries: np.ndarray, count: int, allowed: RowSet | None, knob: float) -> np.ndarray:
        """Rows worth scoring exactly for each query, int64 [q, count], -1 where no more were found.

        queries: float32 [q, dim], prepared; allowed: None for all; knob: how hard to look.
        """

    def save(self, path: Path) -> None:
        """Write it as a FAISS index file."""


def pool_of(k: int, refine: float, most: int) -> int:
    """How many candidates stand for the best k: `refine` (at least 1) times k, but at most so many more."""
    return k + _SPARE + min(int((refine - 1) * k), most)


def held_aside(rows: int) -> np.ndarray:
    """Rows to measure recall with, int64 [1 to 512], ascending, evenly spread over all but the last.

    They are to be added when that is done: an index finds a row that it holds more easily than one it
    has never seen (a graph of 100k MiniLM vectors .97 of their neighbours, where the truth is .88).
    """
    count = max(1, min(_HELD_MOST, int(rows * _HELD_SHARE)))
    return np.arange(count, dtype=np.int64) * ((rows - count) // count)


def measure(
    index: CandidateIndex, sample: np.ndarray, vectors: np.ndarray, present: RowSet | None, metric: Metric
) -> Curve:
    """Recall@10 of each amount of work; of two equal scores either counts.

    sample: float32 [q, dim], rows to ask for. Every other one is moved towards another, for queries do not
    all lie where documents do. vectors: float32 [n, dim]; present: those the index holds, None for all.
    """
    queries = sample.copy()
    queries[1::2] += _STRANGENESS * (np.roll(sample, len(sample) // 2, axis=0)[1::2] - sample[1::2])
    queries = similarity.prepare(queries, metric)
    k = min(_MEASURED_K, len(vectors) if present is None else present.count)
    exact, _ = similarity.scan(queries, vectors, present, k, metric)
    rungs: list[tuple[float, float]] = []
    recall = 0.0
    for knob in index.ladder:
        found = index.candidates(queries, min(index.pool(ASKED_K, knob), index.shape[0]), None, knob)
        scores, _ = similarity.rescore(queries, vectors.__getitem__, found, k, metric)
        recall = max(recall, float(np.mean(scores >= exact[:, -1:])))
        rungs.append((knob, recall))
        if recall >= _ENOUGH_RECALL:
            break
    return Curve(tuple(rungs))
