"""What a replica does with its files, decided: events in, instructions out.

One instruction is carried out at a time, so a seal and a merge never fight over the processor or the
disk. Seals go first, for they bound memory.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from index_builder.segments import compaction
from index_builder.segments.compaction import SegmentFacts

#: How long after a failure to try again; doubled by each further one, up to the second figure.
RETRY_FIRST_S, RETRY_MOST_S = 1.0, 60.0
#: So many rows of a memtable that nothing was written to for so long are sealed before it is full:
#: a segment takes half the time to search, and needs no log to recover.
QUIET_ROWS, QUIET_S = 1024, 3.0


@dataclass(frozen=True, slots=True)
class Froze:
    """A memtable filled up."""

    number: int


@dataclass(frozen=True, slots=True)
class Done:
    """The instruction was carried out; these are the segments now."""

    segments: Sequence[SegmentFacts]


@dataclass(frozen=True, slots=True)
class Looked:
    """Some time passed; these are the segments now, and the rows of the open memtable.

    `quiet_s`: how long nothing has been written.
    """

    segments: Sequence[SegmentFacts]
    open_rows: int
    quiet_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The instruction could not be carried out (the disk is full, say); nothing changed."""


Event = Froze | Done | Looked | Failed


@dataclass(frozen=True, slots=True)
class Seal:
    """Write a frozen memtable as a segment, put it in its place, and publish a manifest."""

    number: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Write the live rows of segments as one, put it in their place, publish, and drop their files."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Freeze:
    """Freeze the open memtable before it is full; Froze follows."""


Instruction = Seal | Rewrite | Freeze


class FileState:
    """Decides what to write next; belongs to one thread."""

    def __init__(self) -> None:
        #: Frozen memtables that lie in no segment yet, oldest first.
        self.frozen: deque[int] = deque()
        #: What is being carried out; None while there is nothing to do, or time has to pass first.
        self.doing: Seal | Rewrite | None = None
        #: Failures in a row.
        self.failures = 0
        self._not_before_s = 0.0

    def handle(self, event: Event, now_s: float) -> Instruction | None:
        """Take an event in, and say what to begin now; None to wait for the next event.

        Freeze is done at once; Seal and Rewrite take time, and end with Done or Failed.

        After a failure nothing begins until time has passed, so events (Looked) must keep coming.
        """
        match event:
            case Froze(number):
                self.frozen.append(number)
                return self._begin((), now_s)
            case Done(segments):
                if isinstance(self.doing, Seal):
                    self.frozen.popleft()
                self.doing, self.failures = None, 0
                return self._begin(segments, now_s)
            case Failed():
                self.doing = None
                self._not_before_s = now_s + min(RETRY_FIRST_S * 2**self.failures, RETRY_MOST_S)
                self.failures = min(self.failures + 1, 32)
                return None
            case Looked(segments, open_rows, quiet_s):
                if not self.frozen and open_rows >= QUIET_ROWS and quiet_s >= QUIET_S:
                    return Freeze()
                return self._begin(segments, now_s)

    def _begin(self, segments: Sequence[SegmentFacts], now_s: float) -> Seal | Rewrite | None:
        if self.doing is not None or (self.failures and now_s < self._not_before_s):
            return None
        if self.frozen:
            self.doing = Seal(self.frozen[0])
        elif numbers := compaction.choose(segments):
            self.doing = Rewrite(numbers)
        return self.doing
