"""What L1 keeps: S3-FIFO, bounded by bytes.

Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction" (SOSP 2023). A new
key waits in a small queue (a tenth of the budget). Asked for twice while it waits, it moves to the main
queue; otherwise it leaves and only its key is remembered, in a ghost queue, so that one that comes
back goes to main at once. Main is a FIFO with second chances. A scan passes through the small queue
and leaves main alone.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

Value = TypeVar("Value")

#: Uses beyond this count for no more, so that yesterday's hot key leaves in a few rounds.
MAX_USES = 3
#: Rounds of main that a pinned key is let stay, used or not, until it is pinned anew.
PINNED_USES = 64
#: A pinned entry is at most this part of the budget, so that all the keys called hot at a time are a quarter.
PINNED_SHARE = 1 / 256
#: Uses that carry a key from small to main.
USES_TO_STAY = 2
#: The small queue's part of the budget.
SMALL_SHARE = 0.1
#: Memory of an entry beyond its key's and value's own bytes: three objects, its places in two tables that
#: grow by leaps, and the one ghost that each entry allows; and the part of a value that is lost between
#: values of other sizes. Read off resident memory, CPython 3.11 with glibc, over a million puts.
ENTRY_BYTES, FRAGMENTED_SHARE = 832, 1 / 12


def entry_bytes(key: bytes, value: bytes) -> int:
    """The memory that holding the value takes."""
    return len(key) + len(value) + int(len(value) * FRAGMENTED_SHARE) + ENTRY_BYTES


class _Entry(Generic[Value]):
    __slots__ = ("size_bytes", "uses", "value")

    def __init__(self, value: Value, size_bytes: int) -> None:
        self.value = value
        self.size_bytes = size_bytes
        self.uses = 0


class S3Fifo(Generic[Value]):
    """At most `budget_bytes` of values, those most likely to be asked for again."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.evictions = 0
        #: A key is in at most one of the three; both queues are in order of arrival.
        self._small: OrderedDict[bytes, _Entry[Value]] = OrderedDict()
        self._main: OrderedDict[bytes, _Entry[Value]] = OrderedDict()
        #: Never longer than small and main together.
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._small_budget_bytes = int(budget_bytes * SMALL_SHARE)
        #: Sums of size_bytes; together at most the budget.
        self._small_bytes = 0
        self._main_bytes = 0

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: bytes) -> bool:
        """Whether the key is held; not a use."""
        return key in self._main or key in self._small

    def __repr__(self) -> str:
        return (
            f"<S3Fifo small {len(self._small)} ({self._small_bytes} B), main {len(self._main)} "
            f"({self._main_bytes} B), ghosts {len(self._ghosts)}, budget {self.budget_bytes} B>"
        )

    @property
    def held_bytes(self) -> int:
        """Sum of the sizes given to `put`, at most the budget."""
        return self._small_bytes + self._main_bytes

    def get(self, key: bytes) -> Value | None:
        """The value, or None; a use."""
        entry = self._main.get(key) or self._small.get(key)
        if entry is None:
            return None
        if entry.uses < MAX_USES:
            entry.uses += 1
        return entry.value

    def look(self, key: bytes) -> Value | None:
        """The value, or None; not a use."""
        entry = self._main.get(key) or self._small.get(key)
        return None if entry is None else entry.value

    def put(self, key: bytes, value: Value, size_bytes: int) -> None:
        """Hold the value in place of the key's last one; not a use.

        One larger than the budget is not held; one larger than the small queue may leave at once, and
        stays when it is put again while remembered.
        """
        if size_bytes > self.budget_bytes:
            self.delete(key)
            return
        if (entry := self._main.get(key)) is not None:
            self._main_bytes += size_bytes - entry.size_bytes
            entry.value, entry.size_bytes = value, size_bytes
        elif (entry := self._small.get(key)) is not None:
            self._small_bytes += size_bytes - entry.size_bytes
            entry.value, entry.size_bytes = value, size_bytes
        elif key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = _Entry(value, size_bytes)
            self._main_bytes += size_bytes
        else:
            self._small[key] = _Entry(value, size_bytes)
            self._small_bytes += size_bytes
        while self.held_bytes > self.budget_bytes:
            if self._small and (self._small_bytes > self._small_budget_bytes or not self._main):
                self._leave_small()
            else:
                self._leave_main()

    def pin(self, keys: Iterable[bytes]) -> None:
        """Keep those of the keys that are held through the next PINNED_USES rounds of main; not a use."""
        for key in keys:
            entry = self._main.get(key) or self._small.get(key)
            if entry is None or entry.size_bytes > self.budget_bytes * PINNED_SHARE:
                continue
            entry.uses = PINNED_USES
            if key in self._small:
                del self._small[key]
                self._small_bytes -= entry.size_bytes
                self._main[key] = entry
                self._main_bytes += entry.size_bytes

    def delete(self, key: bytes) -> bool:
        """Forget the key; False where it was not held."""
        if (entry := self._main.pop(key, None)) is not None:
            self._main_bytes -= entry.size_bytes
        elif (entry := self._small.pop(key, None)) is not None:
            self._small_bytes -= entry.size_bytes
        self._trim_ghosts()
        return entry is not None

    def _leave_small(self) -> None:
        key, entry = self._small.popitem(last=False)
        self._small_bytes -= entry.size_bytes
        if entry.uses >= USES_TO_STAY:
            entry.uses = 0
            self._main[key] = entry
            self._main_bytes += entry.size_bytes
        else:
            self.evictions += 1
            self._ghosts[key] = None
            self._trim_ghosts()

    def _leave_main(self) -> None:
        key, entry = self._main.popitem(last=False)
        if entry.uses:
            entry.uses -= 1
            self._main[key] = entry
        else:
            self._main_bytes -= entry.size_bytes
            self.evictions += 1
            self._trim_ghosts()

    def _trim_ghosts(self) -> None:
        while len(self._ghosts) > len(self):
            self._ghosts.popitem(last=False)

    def validate_state(self) -> None:
        """AssertionError where an invariant does not hold; for tests."""
        small, main, ghosts = set(self._small), set(self._main), set(self._ghosts)
        assert len(small | main | ghosts) == len(small) + len(main) + len(ghosts), "a key is in two queues"
        assert self._small_bytes == sum(e.size_bytes for e in self._small.values()), "small's bytes"
        assert self._main_bytes == sum(e.size_bytes for e in self._main.values()), "main's bytes"
        assert self.held_bytes <= self.budget_bytes, "over the budget"
        assert len(ghosts) <= len(self), "more ghosts than entries"
        entries = [*self._small.values(), *self._main.values()]
        assert all(0 <= e.uses <= PINNED_USES for e in entries), "uses out of range"
