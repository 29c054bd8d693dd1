"""What a replica does with its files, decided: events in, instructions out.

At most one seal and one rewrite are under way. A rewrite begins only when nothing waits to be sealed, for
seals bound memory; once begun, a large one may take minutes in its own process, and seals go on beside it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from index_builder.segments import compaction
from index_builder.segments.compaction import Policy, SegmentFacts
from index_builder.segments.index_spec import IndexKind

#: How long after a failure to try again; doubled by each further one, up to the second figure.
RETRY_FIRST_S, RETRY_MOST_S = 1.0, 60.0
#: A rewrite that failed so often in a row, and not for want of room, is given up.
REWRITE_TRIES = 8
#: So many rows of a memtable that nothing was written to for so long are sealed before it is full:
#: a segment takes half the time to search, and needs no log to recover.
QUIET_ROWS, QUIET_S = 1024, 3.0
#: A trickle of writes never ends, but is no bulk load: that fills a memtable every few seconds.
LOAD_OVER_S = 30.0


@dataclass(frozen=True, slots=True)
class Seal:
    """Write a frozen memtable as a segment, put it in its place, and publish a manifest."""

    number: int


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Write the live rows of segments as one of a kind, put it in their place, publish, drop their files."""

    numbers: tuple[int, ...]
    kind: IndexKind = IndexKind.FLAT


@dataclass(frozen=True, slots=True)
class Freeze:
    """Freeze the open memtable before it is full; Froze follows. Done at once."""


Work = Seal | Rewrite
Instruction = Work | Freeze


@dataclass(frozen=True, slots=True)
class Froze:
    """A memtable was frozen; `filled` unless that was before it was full."""

    number: int
    filled: bool = True


@dataclass(frozen=True, slots=True)
class Done:
    """Some work was carried out; these are the segments now."""

    work: Work
    segments: Sequence[SegmentFacts]


@dataclass(frozen=True, slots=True)
class Failed:
    """Some work could not be carried out; nothing changed. `for_room`: because the disk is full."""

    work: Work
    for_room: bool = False


@dataclass(frozen=True, slots=True)
class Looked:
    """Some time passed; these are the segments now, and the rows of the open memtable.

    `quiet_s`: how long nothing has been written.
    """

    segments: Sequence[SegmentFacts]
    open_rows: int
    quiet_s: float


Event = Froze | Done | Failed | Looked


@dataclass(slots=True)
class _Lane:
    """Work of one sort: one piece at a time, and pauses after failures."""

    #: What is being carried out.
    doing: Work | None = None
    #: In a row.
    failures: int = 0
    not_before_s: float = 0.0

    def free(self, now_s: float) -> bool:
        return self.doing is None and (not self.failures or now_s >= self.not_before_s)

    def failed(self, now_s: float) -> None:
        self.doing = None
        self.not_before_s = now_s + min(RETRY_FIRST_S * 2**self.failures, RETRY_MOST_S)
        self.failures = min(self.failures + 1, 32)


class FileState:
    """Decides what to write next; belongs to one thread."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        #: Frozen memtables that lie in no segment yet, oldest first.
        self.frozen: deque[int] = deque()
        self._seals, self._rewrites = _Lane(), _Lane()
        self._filled_at_s = -LOAD_OVER_S
        #: Whether no bulk load was going on when that was last looked at.
        self._calm = False
        #: Segments that a rewrite was given up of: searched as they are, and not chosen again.
        self.left: set[int] = set()
        #: Rewrites in a row that failed, and not for want of room.
        self._tries = 0

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """Take an event in, and say what to begin now.

        Freeze is done at once; Seal and Rewrite take time, and end with Done or Failed. After a failure
        nothing of that sort begins until time has passed, so events (Looked) must keep coming. What made a
        rewrite fail again and again would make it fail for ever: its segments are left as they are.
        """
        segments: Sequence[SegmentFacts] = ()
        match event:
            case Froze(number, filled):
                self.frozen.append(number)
                if filled:
                    self._filled_at_s, self._calm = now_s, False
            case Done(work, segments):
                lane = self._lane(work)
                lane.doing, lane.failures = None, 0
                if isinstance(work, Seal):
                    self.frozen.popleft()
                else:
                    self._tries = 0
            case Failed(work, for_room):
                self._lane(work).failed(now_s)
                if isinstance(work, Rewrite):
                    self._tries = 0 if for_room else self._tries + 1
                    if self._tries == REWRITE_TRIES:
                        self.left.update(work.numbers)
                        self._tries = 0
                return []
            case Looked(segments, open_rows, quiet_s):
                if not self.frozen and open_rows >= QUIET_ROWS and quiet_s >= QUIET_S:
                    return [Freeze()]
                self._calm = quiet_s >= QUIET_S or now_s - self._filled_at_s >= LOAD_OVER_S
        return self._begin(segments, now_s)

    def debt(self, segments: Sequence[SegmentFacts]) -> int:
        """Rows of segments that are being rewritten, or will be once it is calm."""
        return compaction.debt(self._movable(segments), self._policy)

    def _lane(self, work: Work) -> _Lane:
        return self._seals if isinstance(work, Seal) else self._rewrites

    def _movable(self, segments: Sequence[SegmentFacts]) -> Sequence[SegmentFacts]:
        return [segment for segment in segments if segment.number not in self.left]

    def _begin(self, segments: Sequence[SegmentFacts], now_s: float) -> list[Instruction]:
        begun: list[Instruction] = []
        if self.frozen:
            if self._seals.free(now_s):
                self._seals.doing = Seal(self.frozen[0])
                begun.append(self._seals.doing)
        elif self._rewrites.free(now_s) and (
            choice := compaction.choose(self._movable(segments), self._policy, calm=self._calm)
        ):
            self._rewrites.doing = Rewrite(*choice)
            begun.append(self._rewrites.doing)
        return begun
