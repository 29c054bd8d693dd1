"""A shard as it is at one moment: what a search reads, without a lock, while writes go on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from index_builder.segments.index_spec import Effort
from index_builder.segments.row_set import RowSet
from index_builder.segments.segment import Segment
from services.shard.filter_cache import FilterCache
from services.shard.memtable import BLOCK_ROWS, Memtable
from shard_router import filters
from shard_router.filters import Filter
from shard_router.model import Attributes, Version

#: Names each view in the filter cache, for as long as anybody may ask for it.
_serials = itertools.count()
#: What a kept answer of a filter is about: a segment's rows, or a view's live rows. Blocks are 0 and up.
_WHOLE, _LIVE = -1, -2
#: More rows than k that each part tells, so that equal scores at the cut are chosen by id.
_TIES = 8


class View(Protocol):
    """The live rows of one part."""

    #: Names the part among all of its replica.
    number: int
    #: The rows of documents neither superseded nor deleted; None where every row is live.
    live: RowSet | None

    @property
    def rows(self) -> int:
        """How many rows it has, dead ones included."""

    def allowed(self, filter: Filter, digest: bytes, cache: FilterCache) -> RowSet:
        """The live rows whose attributes pass a checked filter."""

    def search(
        self, queries: np.ndarray, k: int, allowed: RowSet | None, exact: bool, effort: Effort
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k allowed rows of each query: scores float32 [q, k], rows int64 [q, k] (-1 pads)."""

    def id_at(self, row: int) -> str:
        """A row's id."""

    def version_at(self, row: int) -> Version:
        """A row's version."""

    def attributes_at(self, row: int) -> Attributes:
        """A row's attributes."""

    def text_at(self, row: int) -> str | None:
        """A row's text."""

    def vector_at(self, row: int) -> np.ndarray:
        """A row's vector as searched, float32 [dim]; a view."""


class SegmentView:
    """A segment and its live rows."""

    def __init__(self, number: int, segment: Segment, live: np.ndarray | None) -> None:
        """live: bool [rows], None where every row is."""
        self.number, self._segment = number, segment
        self.live = None if live is None else RowSet(live)
        self._serial = next(_serials)
        self.rows = segment.rows
        self.id_at, self.version_at, self.text_at = segment.id_at, segment.version_at, segment.text_at
        self.attributes_at = segment.columns.attributes_at
        self.vector_at = segment.vectors.__getitem__

    def allowed(self, filter: Filter, digest: bytes, cache: FilterCache) -> RowSet:
        """As View says; kept for the segment, which never changes, and for its live rows while they last."""
        segment, live = self._segment, self.live
        # What is searched keeps its vectors where they are few.
        kept_dim = segment.dim if live is None else 0
        passing = cache.get(
            (self.number, _WHOLE, digest),
            lambda: RowSet(filters.evaluate(filter, segment.columns), kept_dim),
        )
        if live is None:
            return passing
        return cache.get((self._serial, _LIVE, digest), lambda: passing.intersection(live, segment.dim))

    def search(
        self, queries: np.ndarray, k: int, allowed: RowSet | None, exact: bool, effort: Effort
    ) -> tuple[np.ndarray, np.ndarray]:
        """As View says."""
        return self._segment.search(queries, k, allowed=allowed, exact=exact, effort=effort)


class MemtableView:
    """The first rows of a memtable, and which of them are live."""

    def __init__(self, number: int, memtable: Memtable, rows: int, live: np.ndarray | None) -> None:
        """live: bool [rows], None where every row is."""
        self.number, self.rows, self._memtable = number, rows, memtable
        self.live = None if live is None else RowSet(live)
        self._serial = next(_serials)

    def allowed(self, filter: Filter, digest: bytes, cache: FilterCache) -> RowSet:
        """As View says; kept until a write makes another view."""
        return cache.get((self._serial, _LIVE, digest), lambda: self._allowed(filter, digest, cache))

    def _allowed(self, filter: Filter, digest: bytes, cache: FilterCache) -> RowSet:
        """Whole blocks never change, so their answers are kept for longer."""
        answers: list[np.ndarray] = []
        for block in range(-(-self.rows // BLOCK_ROWS)):
            columns = self._memtable.columns(block, self.rows)
            if columns.rows == BLOCK_ROWS:
                key = (self.number, block, digest)
                answers.append(cache.get(key, partial(filters.evaluate, filter, columns)))
            else:
                answers.append(filters.evaluate(filter, columns))
        passing = np.concatenate(answers)[: self.rows] if answers else np.zeros(0, np.bool_)
        return RowSet(passing if self.live is None else passing & self.live.mask)

    def search(
        self, queries: np.ndarray, k: int, allowed: RowSet | None, exact: bool, effort: Effort
    ) -> tuple[np.ndarray, np.ndarray]:
        """As View says; always exact."""
        return self._memtable.search(queries, k, self.rows, allowed)

    def id_at(self, row: int) -> str:
        """As View says."""
        return self._memtable.rows[row].id

    def version_at(self, row: int) -> Version:
        """As View says."""
        return self._memtable.rows[row].version

    def attributes_at(self, row: int) -> Attributes:
        """As View says."""
        return self._memtable.rows[row].attributes

    def text_at(self, row: int) -> str | None:
        """As View says."""
        return self._memtable.rows[row].text

    def vector_at(self, row: int) -> np.ndarray:
        """As View says."""
        vector: np.ndarray = self._memtable.vectors[row]
        return vector


@dataclass(frozen=True, slots=True)
class Ranking:
    """The rows that some queries found, best first: of which part, and at which place.

    scores: float32 [q, n]; parts: places in `views`, int64 [q, n]; rows: int64 [q, n]. Only the first
    `counts[i]` of a query are any.
    """

    views: Sequence[View]
    counts: list[int]
    scores: np.ndarray
    parts: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every live document once, as of `position` at least; never changes.

    Its slots are those that the replica answers for since the epoch `since`.
    """

    position: int
    views: Sequence[View]
    since: int = 1

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool,
        effort: Effort,
        cache: FilterCache,
    ) -> Ranking:
        """The best k live documents of each query that pass the filter; ties in ascending order of id.

        queries: float32 [q, dim], prepared. Of more than 8 documents with one score at the cut, any may be
        left out.
        """
        width = k + _TIES
        views: list[View] = []
        all_scores: list[np.ndarray] = []
        all_rows: list[np.ndarray] = []
        for view, allowed in self.allowed(filter, cache):
            found, places = view.search(queries, width, allowed, exact, effort)
            views.append(view)
            all_scores.append(found)
            all_rows.append(places)
        if len(views) == 1:
            scores, rows = all_scores[0], all_rows[0]
            parts = np.zeros(rows.shape, np.int64)
        elif views:
            scores, rows = np.concatenate(all_scores, axis=1), np.concatenate(all_rows, axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")
            parts = order // width
            order += np.arange(0, scores.size, scores.shape[1])[:, None]
            scores, rows = scores.take(order), rows.take(order)
        else:
            scores = np.zeros((len(queries), 0), np.float32)
            rows = parts = np.zeros((len(queries), 0), np.int64)
        ranking = Ranking(views, _counts(rows), scores, parts, rows)
        # Everything as good as the k-th stays in until ids have decided; -inf is where there is nothing.
        equal = scores[:, 1 : k + 1] == scores[:, : min(k, scores.shape[1] - 1)]
        if np.count_nonzero(equal):
            for i in np.flatnonzero(equal.any(axis=1)).tolist():
                _order_ties(ranking, i, k)
        return ranking

    def allowed(self, filter: Filter | None, cache: FilterCache) -> list[tuple[View, RowSet | None]]:
        """Every part with any live row that passes, and which do; None for all."""
        digest = b"" if filter is None else filters.digest(filter)
        result: list[tuple[View, RowSet | None]] = []
        for view in self.views:
            allowed = view.live if filter is None else view.allowed(filter, digest, cache)
            if view.rows and (allowed is None or allowed.count):
                result.append((view, allowed))
        return result

    def count(self, filter: Filter | None, cache: FilterCache) -> int:
        """How many live documents pass."""
        return sum(
            view.rows if allowed is None else allowed.count for view, allowed in self.allowed(filter, cache)
        )

    def matching(self, filter: Filter | None, limit: int, cache: FilterCache) -> list[tuple[str, Version]]:
        """Ids and versions of at most `limit` live documents that pass."""
        found: list[tuple[str, Version]] = []
        for view, allowed in self.allowed(filter, cache):
            picks = np.arange(view.rows) if allowed is None else np.flatnonzero(allowed.mask)
            found += [(view.id_at(row), view.version_at(row)) for row in picks[: limit - len(found)].tolist()]
            if len(found) >= limit:
                break
        return found


def _counts(rows: np.ndarray) -> list[int]:
    """How many rows each query found, of int64 [q, n] that end in -1 where there are no more."""
    count, width = rows.shape
    if count and width and min(rows[:, -1].tolist()) >= 0:
        return [width] * count
    counts: list[int] = (rows >= 0).sum(axis=1).tolist()
    return counts


def _order_ties(ranking: Ranking, query: int, k: int) -> None:
    """Put the equal scores among the first k of one query in ascending order of id, in place."""
    count = ranking.counts[query]
    scores, parts, rows = (each[query, :count] for each in (ranking.scores, ranking.parts, ranking.rows))
    starts = np.flatnonzero(np.concatenate(([True], scores[1:] != scores[:-1], [True]))).tolist()
    for start, end in itertools.pairwise(starts):
        if start >= k:
            return
        if end - start > 1:
            ids = [
                ranking.views[part].id_at(row)
                for part, row in zip(parts[start:end].tolist(), rows[start:end].tolist(), strict=True)
            ]
            order = start + np.array(sorted(range(end - start), key=ids.__getitem__))
            parts[start:end], rows[start:end] = parts[order], rows[order]
