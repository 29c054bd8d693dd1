"""How slots change owners while everybody reads and writes, decided: events in, instructions out.

The record of it is the stored map state alone, so whoever finds one that is not Steady can go on from it:

    Steady ──store──> Migrating: all hear of it; the new owners read their slots' documents; the log's
                      position is read, and each new owner's copies have to pass it
    Migrating ──store──> Retiring: all hear of it; the old owners, who are asked no more, still follow
    Retiring ──store──> Steady: whoever hears of it drops what is not its own

Until all that write or answer know that it is Migrating (or have lost their leases), a write may be waited
for at its old owner alone; so the position is read only after that. Copies of a new owner that are down are
not waited for, as long as one is there; a copy that comes back begins again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from shard_router.errors import PreconditionFailed
from shard_router.model import HOME
from shard_router.shard_map import MapState, Migrating, Retiring, Steady


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One replica of a shard, by number; of a shard's slots in one database, where there are several."""

    shard: int
    replica: int
    #: Not hashed, as a string's hash is another in every process: sets of copies keep the order of a seed.
    database: str = field(default=HOME, hash=False)


@dataclass(frozen=True, slots=True)
class Store:
    """Make this the stored state if the state of one epoch less is; Stored or Overtaken follows."""

    state: MapState


@dataclass(frozen=True, slots=True)
class Tell:
    """Let everybody know of a stored state; Heard follows when they do, or their leases have lapsed.

    A copy that hears of it answers for what is its own then, and drops what it need not follow.
    """

    state: MapState


@dataclass(frozen=True, slots=True)
class Backfill:
    """Let a copy read these slots; Backfilled follows."""

    copy: Copy
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadPosition:
    """Read where every log stands; PositionRead follows."""


@dataclass(frozen=True, slots=True)
class AwaitApplied:
    """Wait until a copy has applied its log up to there; Applied follows."""

    copy: Copy
    position: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do; `moved` unless it was cancelled."""

    moved: bool


Instruction = Store | Tell | Backfill | ReadPosition | AwaitApplied | Finish


@dataclass(frozen=True, slots=True)
class Stored:
    """The state that was to be stored is."""


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Another coordinator has gone on; this is what is stored now."""

    state: MapState


@dataclass(frozen=True, slots=True)
class Heard:
    """Everybody knows of the state of this epoch, or has no lease any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Joined:
    """A copy of a shard is up; if it was before, it has begun anew."""

    copy: Copy


@dataclass(frozen=True, slots=True)
class Left:
    """A copy of a shard is down."""

    copy: Copy


@dataclass(frozen=True, slots=True)
class Backfilled:
    """A copy has all documents of the slots it was to read."""

    copy: Copy


@dataclass(frozen=True, slots=True)
class PositionRead:
    """The logs stood there, by database, after everybody had heard and every copy was backfilled."""

    positions: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Applied:
    """A copy has applied its log up to there."""

    copy: Copy
    position: int


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody does not want it any more."""


Event = Stored | Overtaken | Heard | Joined | Left | Backfilled | PositionRead | Applied | CancelAsked


class Stage(StrEnum):
    """What is waited for."""

    STORING = "storing"
    TELLING = "telling"
    BACKFILLING = "backfilling"
    READING = "reading"
    APPLYING = "applying"
    FINISHED = "finished"


@dataclass
class Resharding:
    """One change of a collection's map, from whatever state of it is stored. Belongs to one thread."""

    #: What is stored.
    state: MapState
    #: The copies that are up.
    copies: set[Copy]
    #: Each has a log of its own, and each shard copies that follow it.
    databases: tuple[str, ...] = (HOME,)
    #: What `moved` will be, where `state` is Steady to begin with.
    moved: bool = True
    stage: Stage = Stage.STORING
    #: While STORING: what is to be stored.
    _next: MapState | None = None
    #: New owners' copies that have what they gain, and of those the ones beyond `_positions`.
    _whole: set[Copy] = field(default_factory=set)
    _applied: set[Copy] = field(default_factory=set)
    _positions: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, target: Migrating, copies: Iterable[Copy], databases: tuple[str, ...] = (HOME,)
    ) -> tuple["Resharding", list[Instruction]]:
        """A new change: the state before it is Steady at the epoch before `target`'s."""
        before = Steady(target.old)
        machine = cls(before, set(copies), databases)
        return machine, machine._store(target)

    @classmethod
    def resume(
        cls, state: MapState, copies: Iterable[Copy], databases: tuple[str, ...] = (HOME,)
    ) -> tuple["Resharding", list[Instruction]]:
        """Go on from what is stored. Everything that may not have been done is done again."""
        machine = cls(state, set(copies), databases)
        return machine, machine._entered()

    @property
    def gaining(self) -> set[Copy]:
        """The copies of the new owners that are up."""
        if not isinstance(self.state, Migrating):
            return set()
        return {copy for copy in self.copies if copy.shard in self.state.gains}

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and in all: one for each new owner's copy, and three more."""
        if isinstance(self.state, Migrating):
            gaining = self.gaining
            return len(self._whole & gaining), len(gaining) + 3
        steps = max(1, len(self.copies)) + 3
        return (steps if self.stage is Stage.FINISHED else steps - 1), steps

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event in, and say what to do now. PreconditionFailed: CancelAsked came too late."""
        match event:
            case Stored():
                if self.stage is Stage.STORING and self._next is not None:
                    self.state = self._next
                    return self._entered()
            case Overtaken(state):
                self.state = state
                return self._entered()
            case Heard(epoch):
                if self.stage is Stage.TELLING and epoch == self.state.epoch:
                    return self._heard()
            case Joined(copy):
                self.copies.add(copy)
                self._whole.discard(copy)
                self._applied.discard(copy)
                return self._again(copy)
            case Left(copy):
                for known in (self.copies, self._whole, self._applied):
                    known.discard(copy)
                return self._on()
            case Backfilled(copy):
                self._whole |= {copy} & self.gaining
                return self._on()
            case PositionRead(positions):
                if self.stage is Stage.READING:
                    self.stage, self._positions = Stage.APPLYING, positions
                    self._applied.clear()  # where positions were read before, a copy came in between
                    return [AwaitApplied(copy, positions[copy.database]) for copy in sorted(self.gaining)]
            case Applied(copy, position):
                if self.stage is Stage.APPLYING and position >= self._positions[copy.database]:
                    self._applied |= {copy} & self._whole
                    return self._on()
            case CancelAsked():
                return self._cancel()
        return []

    def _store(self, state: MapState) -> list[Instruction]:
        self.stage, self._next = Stage.STORING, state
        return [Store(state)]

    def _entered(self) -> list[Instruction]:
        """A state was stored, or found."""
        self.stage, self._next = Stage.TELLING, None
        self._whole.clear()
        self._applied.clear()
        return [Tell(self.state)]

    def _heard(self) -> list[Instruction]:
        match self.state:
            case Migrating():
                self.stage = Stage.BACKFILLING
                gains = self.state.gains
                return [Backfill(copy, gains[copy.shard]) for copy in sorted(self.gaining)] or self._on()
            case Retiring():
                return self._store(self.state.settle())
            case Steady():
                self.stage = Stage.FINISHED
                return [Finish(self.moved)]

    def _on(self) -> list[Instruction]:
        """Go on if nothing has to be waited for any more."""
        if not isinstance(self.state, Migrating):
            return []
        gaining = self.gaining
        needed = {(shard, database) for shard in self.state.gains for database in self.databases}
        if {(copy.shard, copy.database) for copy in gaining} != needed:
            return []  # a new owner has no copy that is up
        if self.stage is Stage.BACKFILLING and gaining <= self._whole:
            self.stage = Stage.READING
            return [ReadPosition()]
        if self.stage is Stage.APPLYING and gaining <= self._applied:
            return self._store(self.state.cut_over())
        return []

    def _again(self, copy: Copy) -> list[Instruction]:
        """A copy has come, or come back: what it has to do first."""
        waiting = self.stage in (Stage.BACKFILLING, Stage.READING, Stage.APPLYING)
        if isinstance(self.state, Migrating) and waiting and copy in self.gaining:
            self.stage = Stage.BACKFILLING
            return [Backfill(copy, self.state.gains[copy.shard])]
        return []

    def _cancel(self) -> list[Instruction]:
        late = isinstance(self.state, Retiring | Steady) or self.stage is Stage.STORING
        if late:
            raise PreconditionFailed("the new owners answer already, or are about to")
        assert isinstance(self.state, Migrating)
        self.moved = False
        return self._store(self.state.cancel())
