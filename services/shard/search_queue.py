"""Searches that wait for a thread, and how they share one: the same scan serves many queries."""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from shard_router.errors import Overloaded

#: Rows one thread searches at once.
BATCH_ROWS = 64

T = TypeVar("T")


@dataclass(slots=True)
class _Waiting(Generic[T]):
    item: T
    rows: int
    taken: int = 0


class Piece(NamedTuple, Generic[T]):
    """Rows [start, stop) of one caller's queries."""

    item: T
    start: int
    stop: int


class SearchQueue(Generic[T]):
    """Bounded; callers who may share a batch (same key) do, and a large one leaves room for the small."""

    def __init__(self, limit_rows: int) -> None:
        self._limit_rows = limit_rows
        #: By key, oldest first; no group is empty.
        self._groups: OrderedDict[Hashable, deque[_Waiting[T]]] = OrderedDict()
        self.rows = 0

    def put(self, key: Hashable, item: T, rows: int) -> None:
        """Let an item of that many rows wait. Overloaded where too many rows wait already."""
        if self.rows and self.rows + rows > self._limit_rows:
            raise Overloaded("shard search queue", self._limit_rows)
        self._groups.setdefault(key, deque()).append(_Waiting(item, rows))
        self.rows += rows

    def take(self, threads: int) -> list[Piece[T]]:
        """The next batch: at most 64 rows of one key, and only this thread's share of what waits.

        Groups take turns, and so do the callers of a group: each gives an equal share of its rows.
        """
        if not self._groups:
            return []
        key, group = self._groups.popitem(last=False)
        waiting = sum(one.rows - one.taken for one in group)
        room = min(BATCH_ROWS, -(-waiting // threads))
        pieces: list[Piece[T]] = []
        for turns in range(len(group), 0, -1):
            one = group.popleft()
            rows = min(one.rows - one.taken, max(1, room // turns))
            pieces.append(Piece(one.item, one.taken, one.taken + rows))
            one.taken += rows
            room -= rows
            if one.taken < one.rows:
                group.append(one)
            if room <= 0:
                break
        if group:
            self._groups[key] = group
        self.rows -= sum(piece.stop - piece.start for piece in pieces)
        return pieces

    def drain(self) -> Iterable[T]:
        """Everything that waits, which waits no longer."""
        items = [one.item for group in self._groups.values() for one in group]
        self._groups.clear()
        self.rows = 0
        return items
