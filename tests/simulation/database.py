"""The database of a simulated cluster: documents, the log of their writes, and the map as it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass

from shard_router.hashing import slot_of
from shard_router.shard_map import MapState, Retiring, ShardMap, Steady

SLOTS, PAGE_ROWS = 8, 3


class Fenced(Exception):
    """Another coordinator has the claim."""


@dataclass
class Row:
    seq: int
    deleted: bool


class Database:
    """The truth, the log and the stored map; each call is one transaction."""

    def __init__(self, shards: int) -> None:
        self.rows: dict[str, Row] = {}
        self.counter = 0
        self.state: MapState = Steady(ShardMap.create(SLOTS, shards))
        self.claim = 0
        #: By slot that has moved: where the log stood when its new owner was last waited for, and since which
        #: epoch it answers.
        self.passed: dict[int, tuple[int, int]] = {}
        self._read = 0

    async def write(self, ids: Sequence[str], deletes: bool) -> tuple[int, int]:
        for id in ids:
            self.counter += 1
            self.rows[id] = Row(self.counter, deletes)
        return self.counter, self.state.epoch

    async def tail(self, after: int, slots: Sequence[int] | None) -> tuple[list[tuple[str, Row]], int, bool]:
        """A page of the log, where it ends, and whether that is the log's end."""
        rows = sorted(
            (
                (id, Row(row.seq, row.deleted))
                for id, row in self.rows.items()
                if row.seq > after and (slots is None or slot_of(id, SLOTS) in slots)
            ),
            key=lambda pair: pair[1].seq,
        )
        page = rows[:PAGE_ROWS]
        ends = len(page) == len(rows)
        return page, self.counter if ends else page[-1][1].seq, ends

    async def position(self, claim: int | None = None) -> int:
        if claim is not None and claim != self.claim:
            raise Fenced
        return self.counter

    async def position_to_pass(self, claim: int) -> int:
        """The position that new owners have to pass."""
        self._read = await self.position(claim)
        return self._read

    async def read_state(self) -> MapState:
        return self.state

    async def put(self, claim: int, state: MapState) -> MapState:
        if claim != self.claim:
            raise Fenced
        if state.epoch == self.state.epoch + 1:
            self.state = state
            if isinstance(state, Retiring):
                moved = (slot for slots in state.gains.values() for slot in slots)
                self.passed |= dict.fromkeys(moved, (self._read, state.epoch))
        return self.state
