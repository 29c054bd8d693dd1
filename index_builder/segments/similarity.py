"""How alike two vectors are, computed so that every path to a document gives the very same score."""

from collections.abc import Callable

import numpy as np

from index_builder.segments.row_set import RowSet
from shard_router.model import Metric

#: Rows an L2 pass handles at once: their differences stay in the processor's cache.
_L2_ROWS = 256
#: Column maxima are looked at first where scores are this many; fewer are partitioned whole.
_BLOCKED_FROM = 4096
_BLOCKS = 16
#: Where a larger share of rows is allowed, scoring all of them is cheaper than copying those out.
_GATHER_SHARE = 1 / 4
#: Float32 values of candidates copied out at once: they stay in the processor's cache.
_RESCORED_VALUES = 1 << 18


def prepare(vectors: np.ndarray, metric: Metric, out: np.ndarray | None = None) -> np.ndarray:
    """The vectors as they are stored and searched: of length 1 for cosine, unchanged otherwise.

    vectors: float32 [n, dim]; a zero vector stays zero, and scores 0 against everything. `out`, where
    given, receives the result; without it an unchanged input is returned as it is. A row's result
    depends on nothing but the row.
    """
    if metric is not Metric.COSINE:
        if out is None:
            return vectors
        out[...] = vectors
        return out
    result: np.ndarray = np.empty_like(vectors) if out is None else out
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        squares = np.vecdot(vectors, vectors)
        np.divide(vectors, np.sqrt(squares)[:, None], out=result)
    if len(squares) == 1 and 1e-30 < squares.item() < 1e30:  # one query, as most are
        return result
    # float32 squares of very short or very long vectors lose digits, or leave the range altogether. Only
    # such rows go another way: how a vector is rounded must not depend on what it arrived with.
    extreme = np.flatnonzero(~((squares > 1e-30) & (squares < 1e30)))
    if len(extreme):
        exact = vectors[extreme].astype(np.float64)
        lengths = np.linalg.norm(exact, axis=1, keepdims=True)
        result[extreme] = exact / np.where(lengths > 0, lengths, 1)
    return result


def scores(query: np.ndarray, rows: np.ndarray, metric: Metric) -> np.ndarray:
    """Each row's score, float32 [n]; larger is better. L2 is minus the squared distance.

    query: float32 [dim], rows: float32 [n, dim], both prepared. A row's score depends on nothing but
    the row and the query: one dot product a row, where a matrix product would round by its shape.
    """
    if metric is not Metric.L2:
        products: np.ndarray = np.vecdot(rows, query)
        return products
    # Differences, not |a|^2 - 2ab + |b|^2: near neighbours far from the origin would cancel to noise.
    result = np.empty(len(rows), dtype=np.float32)
    scratch = np.empty((min(_L2_ROWS, len(rows)), rows.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), _L2_ROWS):
        block = rows[start : start + _L2_ROWS]
        difference = np.subtract(block, query, out=scratch[: len(block)])
        np.vecdot(difference, difference, out=result[start : start + len(block)])
    return np.negative(result, out=result)


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest values are, largest first, int64 [min(k, n)]; equal ones in any order.

    values: float32 [n]. Long arrays are folded into columns first: the k largest lie in the k columns
    with the largest maxima, which is ten times faster than partitioning everything.
    """
    n = len(values)
    width = n // _BLOCKS
    if n < _BLOCKED_FROM or k * 4 > width:
        return _best(values, k)
    folded = values[: width * _BLOCKS].reshape(_BLOCKS, width)
    columns = np.argpartition(folded.max(axis=0), width - k)[width - k :]
    rows = (columns + np.arange(0, width * _BLOCKS, width)[:, None]).ravel()
    rows = np.concatenate((rows, np.arange(width * _BLOCKS, n)))
    chosen: np.ndarray = rows[_best(values[rows], k)]
    return chosen


def scan(
    queries: np.ndarray, vectors: np.ndarray, allowed: RowSet | None, k: int, metric: Metric
) -> tuple[np.ndarray, np.ndarray]:
    """The best k allowed rows for each query, exactly.

    queries: float32 [q, dim], vectors: float32 [n, dim], both prepared; allowed: of those n, None for all.
    Returns scores float32 [q, k], best first, -inf where there are no more, and rows int64 [q, k], -1
    there.
    """
    found = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    picks = barred = None
    if allowed is not None:
        if allowed.share > _GATHER_SHARE:
            barred = np.where(allowed.mask, np.float32(0), np.float32(-np.inf))
        else:
            picks = allowed.rows
    block = vectors if allowed is None or picks is None else allowed.vectors(vectors)
    for i, query in enumerate(queries):
        values = scores(query, block, metric)
        if barred is not None:
            values += barred
        top = best(values, k)
        top = top[values[top] > -np.inf]
        found[i, : len(top)] = values[top]
        rows[i, : len(top)] = top if picks is None else picks[top]
    return found, rows


def rescore(
    queries: np.ndarray,
    take: Callable[[np.ndarray], np.ndarray],
    candidates: np.ndarray,
    k: int,
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of each query's candidates, exactly: the scores are those of `scores`, bit for bit.

    queries: float32 [q, dim], prepared; take: gives the prepared vectors of rows int64 [...] as float32
    [..., dim], any for -1; candidates: rows int64 [q, c], -1 for none. Returns scores float32 [q, k], best
    first, -inf where there are no more, and rows int64 [q, k], -1 there.
    """
    found = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    width = min(k, candidates.shape[1])
    step = max(1, _RESCORED_VALUES // (candidates.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), step):
        picks, some = candidates[start : start + step], queries[start : start + step, None, :]
        # Where there is no candidate, what stands in is struck out below.
        block = take(picks)
        if metric is Metric.L2:
            block = np.subtract(block, some)
            values = np.vecdot(block, block)
            np.negative(values, out=values)
        else:
            values = np.vecdot(block, some)
        values[picks < 0] = -np.inf
        top = np.argsort(-values, axis=1, kind="stable")[:, :width]
        lines = np.arange(len(top))[:, None]
        found[start : start + step, :width] = values[lines, top]
        rows[start : start + step, :width] = picks[lines, top]
    return found, rows


def _best(values: np.ndarray, k: int) -> np.ndarray:
    n = len(values)
    if k < n:
        top = np.argpartition(values, n - k)[n - k :]
        return top[np.argsort(-values[top], kind="stable")]
    return np.argsort(-values, kind="stable")
