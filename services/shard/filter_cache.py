"""Which rows of an immutable block pass a filter, computed once while it is asked for."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Kept(Protocol):
    """What knows how large it is: an array, or a RowSet."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


T = TypeVar("T", bound=Kept)


class FilterCache:
    """Least recently used answers of filters, bounded by bytes; safe to use from many threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[tuple[int, int, bytes], Any] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = self.hits = self.misses = 0

    def get(self, key: tuple[int, int, bytes], evaluate: Callable[[], T]) -> T:
        """The rows for (part, block, filter digest); `evaluate` makes them when unknown.

        Two threads may evaluate the same filter at once; both answers are the same.
        """
        with self._lock:
            found: T | None = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self.hits += 1
                return found
            self.misses += 1
        made = evaluate()
        with self._lock:
            if key not in self._entries and made.nbytes <= self._budget_bytes:
                self._entries[key] = made
                self.size_bytes += made.nbytes
            while self.size_bytes > self._budget_bytes:
                _, evicted = self._entries.popitem(last=False)
                self.size_bytes -= evicted.nbytes
        return made
