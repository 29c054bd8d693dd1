"""Recent documents, searched exactly."""

from collections.abc import Sequence

import numpy as np

from index_builder.segments import similarity
from index_builder.segments.row_set import RowSet
from shard_router.columns import Columns
from shard_router.model import LogRow, Metric, Schema

#: Rows whose attribute columns are built together; full blocks never change.
BLOCK_ROWS = 512


class Memtable:
    """An append-only block of rows; what is below a length never changes, so readers need no lock.

    A row is never replaced here: whoever holds the memtable marks rows dead (layout.py).
    """

    def __init__(self, dim: int, metric: Metric, schema: Schema, capacity: int) -> None:
        self.metric, self.schema, self.capacity = metric, schema, capacity
        #: The rows come from the positions (after, upto] of the log; of no meaning without rows.
        self.after = self.upto = 0
        #: Rows in order of arrival; never a tombstone.
        self.rows: list[LogRow] = []
        #: The slot of each row, int32.
        self.slots = np.empty(capacity, dtype=np.int32)
        #: The last row of each id.
        self._places: dict[str, int] = {}
        # Untouched pages cost nothing, and no row ever moves.
        self.vectors = np.empty((capacity, dim), dtype=np.float32)
        self._columns: dict[int, Columns] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self.capacity - len(self.rows)

    def append(self, rows: Sequence[LogRow], vectors: np.ndarray, after: int) -> None:
        """Add documents that fit, in order of position; vectors float32 [n, dim], as sent.

        They come from after that position of the log.
        """
        first = len(self.rows)
        self.after = min(self.after, after) if self.rows else after
        self.upto = max(self.upto, rows[-1].version.seq)
        similarity.prepare(vectors, self.metric, out=self.vectors[first : first + len(rows)])
        self.slots[first : first + len(rows)] = [row.slot for row in rows]
        self.rows.extend(rows)
        self._places.update(zip([row.id for row in rows], range(first, first + len(rows)), strict=True))

    def find(self, ids: Sequence[str], hashes: np.ndarray) -> list[tuple[int, int]]:
        """Where these ids are: (which of them, row) for each that is here, at its latest row."""
        places = self._places
        if places.keys().isdisjoint(ids):
            return []
        return [(which, places[id]) for which, id in enumerate(ids) if id in places]

    def columns(self, block: int, length: int) -> Columns:
        """The attributes of rows [block * 512, min(length, next block)); kept while they are whole."""
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, length)
        known = self._columns.get(block)
        if known is None or known.rows < stop - start:
            known = Columns.build([row.attributes for row in self.rows[start:stop]], self.schema)
            self._columns[block] = known
        return known

    def search(
        self, queries: np.ndarray, k: int, length: int, allowed: RowSet | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k allowed of the first `length` rows for each query, exactly.

        queries: float32 [q, dim], prepared; allowed: of the first rows, None for all. Returns scores
        float32 [q, k], best first, -inf where there are no more, and rows int64 [q, k], -1 there.
        """
        return similarity.scan(queries, self.vectors[:length], allowed, k, self.metric)
