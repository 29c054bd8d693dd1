"""One collection as this gateway serves it: its shard map, its logs, and the copies of its shards."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from services.deadline import Deadline
from services.gateway.collection_log import CollectionLog
from services.gateway.endpoints import ShardEndpoint
from shard_router.databases import databases_of
from shard_router.errors import DeadlineExceeded, ShardUnavailable, StaleEpoch, Unavailable, UnknownLog
from shard_router.fanout_plan import HedgeBudget, Latencies, stale_pause_s
from shard_router.model import Collection, Commit
from shard_router.resharding import Copy
from shard_router.shard_map import MapState, ShardMap

T = TypeVar("T")
#: Returns when the copies certainly have what was told to be visible, before a deadline.
Assure = Callable[[Deadline], Awaitable[None]]


class Served:
    """A collection, who answers for its slots, and how far its logs are known."""

    def __init__(self, collection: Collection, state: MapState) -> None:
        self.collection = collection
        #: Who owns which slot, and who is about to; changed by `turn` alone.
        self.state = state
        names = collection.databases
        #: By database, in the collection's order, the log in it.
        self.logs = {
            name: CollectionLog(name, databases_of(collection).slots_of(name) if len(names) > 1 else None)
            for name in names
        }
        #: Copies of logs that are followed no more; to be closed.
        self.discarded: list[ShardEndpoint] = []
        self.latencies, self.hedges = Latencies(), HedgeBudget()
        #: How many replicas there are to be, while that is more than the collection asks for yet.
        self.growing_to = 0
        #: Copies are opened and closed by one at a time.
        self.reconciling = asyncio.Lock()
        #: Makes sure that the copies have what everybody was told is visible; None where nobody else tells.
        self.assure: Assure | None = None
        #: When it was last searched here, by time.monotonic.
        self.searched_s = float("-inf")
        #: Set when it is known of a later position.
        self.moved = asyncio.Event()
        #: Told of every copy that has joined (True), or is about to leave.
        self.on_copy: list[Callable[[Copy, bool], None]] = []
        #: The latest epoch that a commit told of; and set whenever `state` changes.
        self._told_epoch = 0
        self._turned = asyncio.Event()

    @property
    def shard_map(self) -> ShardMap:
        """Who answers for which slot."""
        return self.state.answering

    @property
    def outdated(self) -> bool:
        """Whether a commit has told of a later map than is known here."""
        return self.state.epoch < self._told_epoch

    def wanted(self, database: str | None = None) -> set[Copy]:
        """The copies that there should be, of every log or of one; none of a log that is not known."""
        numbers = range(max(self.collection.replicas, self.growing_to))
        return {
            Copy(shard, number, log.database)
            for log in self.logs.values()
            if log.log_id and database in (None, log.database)
            for shard in self.state.shards
            for number in numbers
        }

    @property
    def wants_copies(self) -> bool:
        """Whether a copy that there should be is missing or down."""
        up = {copy for copy, replica in self.copies() if not replica.fell.is_set()}
        return not self.wanted() <= up

    def join(self, copy: Copy, replica: ShardEndpoint) -> None:
        """A copy that has caught up is asked from now on."""
        self.logs[copy.database].replicas.setdefault(copy.shard, {})[copy.replica] = replica
        for tell in self.on_copy:
            tell(copy, True)

    def leave(self, copy: Copy) -> ShardEndpoint:
        """A copy is asked no more; it is not closed yet."""
        for tell in self.on_copy:
            tell(copy, False)
        return self.logs[copy.database].replicas[copy.shard].pop(copy.replica)

    def discard(self, database: str) -> None:
        """A database holds another log than before: nothing that follows the old one is asked any more."""
        old = self.logs[database]
        self.discarded += [self.leave(copy) for copy, _ in list(old.copies())]
        # Whoever waits for the old one, or is about to join it, still has it in hand.
        self.logs[database] = CollectionLog(database, old.slots)

    def copies(self) -> Iterator[tuple[Copy, ShardEndpoint]]:
        """Every copy that has caught up, in order."""
        for log in self.logs.values():
            yield from log.copies()

    def committed(self, database: str, commit: Commit) -> None:
        """Note a commit to a database's log, and hand its rows to the copies."""
        self._told_epoch = max(self._told_epoch, commit.epoch)
        log = self.logs[database]
        if commit.log_id == log.log_id:  # else it is opened anew, and has what was committed
            log.committed(commit.upto, commit.delta)
            self.moved.set()

    def heard(self, positions: Mapping[str, int]) -> None:
        """The logs have come so far, by a write of another gateway, which handed its rows to the copies."""
        for log in self.logs.values():
            if log.log_id in positions:
                log.heard(positions[log.log_id])
        self.moved.set()

    @property
    def positions(self) -> Mapping[str, int]:
        """By identity, the latest position known of every log that is known; see `CollectionLog.position`."""
        told = {}  # not a comprehension, which is a call more: every kept answer asks this
        for log in self.logs.values():
            if log.log_id:
                told[log.log_id] = log.position
        return told

    @property
    def lag_positions(self) -> int:
        """How far behind the logs that are known of the slowest copies are, together."""
        return sum(log.lag_positions for log in self.logs.values())

    @property
    def documents(self) -> int:
        """How many documents its shards have, each counted at the copy that has most."""
        return sum(
            max((int(replica.describe()["documents"]) for replica in replicas.values()), default=0)
            for log in self.logs.values()
            for replicas in log.replicas.values()
        )

    def look(self) -> None:
        """There may be something new in the log."""
        for _, replica in self.copies():
            replica.wake()

    async def wait_for(self, positions: Mapping[str, int], deadline: Deadline) -> bool:
        """Whether, before the deadline, every copy that may be asked has applied these positions, by log.

        False where a shard has no copy that may: what is visible there nobody can say. Nor can anybody while
        a commit has told of a later map than is known here, for then others may have to be waited for; nor of
        a log that is not followed.
        """
        while self.outdated:
            self._turned.clear()
            try:
                async with asyncio.timeout(deadline.left_s()):
                    await self._turned.wait()
            except TimeoutError:
                return False
        followed = [log for log in self.logs.values() if log.log_id in positions]
        if len(followed) < len(positions):
            return False
        waits = [self._applied(log, positions[log.log_id], deadline) for log in followed]
        return all(await asyncio.gather(*waits)) if len(waits) > 1 else all([await wait for wait in waits])

    async def _applied(self, log: CollectionLog, position: int, deadline: Deadline) -> bool:
        while True:
            asked = {shard: log.up(shard) for shard in self.state.shards}
            waits = [replica.wait_for(position, deadline) for up in asked.values() for replica in up.values()]
            reached = all(await asyncio.gather(*waits))
            if reached and all(asked.get(shard) for shard in self.shard_map.shards):
                return True
            # Whoever fell or left meanwhile is asked no more, as long as another copy is there.
            if deadline.left_s() <= 0 or asked == {shard: log.up(shard) for shard in self.state.shards}:
                return False

    async def each_shard(
        self, ask: Callable[[ShardEndpoint, int], Awaitable[T]], deadline: Deadline
    ) -> list[T]:
        """What one copy of every shard of every log says, asked with the map's epoch: of every slot once.

        ShardUnavailable where a shard has no copy that is up; DeadlineExceeded; what a copy raises.
        """
        if self.assure is not None:
            await self.assure(deadline)
        attempt = failures = 0
        while True:
            try:
                async with asyncio.timeout(deadline.require("the shards")):
                    return await asyncio.gather(*self._asked(ask, failures))
            except TimeoutError:
                raise DeadlineExceeded("the shards") from None
            except ShardUnavailable:
                raise
            except Unavailable:
                # As of a copy that went away a moment ago, or reads again what it lost: another may answer.
                failures += 1
                if failures >= self.collection.replicas:
                    raise
            except StaleEpoch:
                attempt += 1
                if deadline.left_s() <= stale_pause_s(attempt):
                    raise
                await asyncio.sleep(stale_pause_s(attempt))

    def _asked(self, ask: Callable[[ShardEndpoint, int], Awaitable[T]], turn: int) -> list[Awaitable[T]]:
        shards = self.shard_map.shards
        up = [log.up(shard) for log in self.logs.values() for shard in shards]
        if not all(up):
            raise ShardUnavailable(answered(list(map(bool, up)), len(shards)), len(shards), 1.0)
        chosen = [list(replicas.values())[turn % len(replicas)] for replicas in up]
        return [ask(replica, self.state.epoch) for replica in chosen]

    async def turn(self, state: MapState) -> list[ShardEndpoint]:
        """Go over to another state of the map, and all copies with it; returns those that cannot.

        They lack what they should answer for, and have left. A state that is over changes nothing.
        """
        if state.epoch < self.state.epoch:
            return []
        self.state = state
        left: list[ShardEndpoint] = []
        for copy, replica in list(self.copies()):
            try:
                await replica.serve(state.epoch, self.slots_of(copy))
            except ValueError:
                left.append(self.leave(copy))
        for copy, replica in list(self.copies()):
            await self.settle(replica, copy)
        self._turned.set()
        return left

    def follow(self, state: MapState) -> None:
        """Go by another state of the map, over to which somebody else leads the copies."""
        if state.epoch >= self.state.epoch:
            self.state = state
            self._turned.set()

    def slots_of(self, copy: Copy) -> tuple[int, ...]:
        """The slots that a copy answers for now."""
        return self.logs[copy.database].own(self.state.served_by(copy.shard))

    async def settle(self, replica: ShardEndpoint, copy: Copy) -> None:
        """Let a copy answer for what is its own now, and drop what it need not follow."""
        state = self.state
        await replica.serve(state.epoch, self.slots_of(copy))
        strange = replica.followed().difference(state.followed_by(copy.shard))
        if strange:
            await replica.release(sorted(strange))

    def check_token(self, positions: Mapping[str, int]) -> None:
        """UnknownLog if a read token is of a log that is none of this collection's.

        Unavailable while not all of them are known.
        """
        known = {log.log_id for log in self.logs.values()}
        for log_id, position in positions.items():
            if log_id not in known:
                if "" in known:
                    raise Unavailable("not all logs of the collection are known yet")
                raise UnknownLog(log_id, position)

    def by_log(self, positions: Mapping[str, int]) -> dict[str, int]:
        """Positions by database as positions by log; Unavailable while one of the logs is not known."""
        if not all(self.logs[database].log_id for database in positions):
            raise Unavailable("not all logs of the collection are known yet")
        return {self.logs[database].log_id: position for database, position in positions.items()}

    def database_of(self, log_id: str) -> str:
        """The database of a log that `check_token` let pass."""
        return next(log.database for log in self.logs.values() if log.log_id == log_id)


def answered(parts: Sequence[bool], shards: int) -> int:
    """Of so many shards, how many answered with all their parts; those of one log follow those of another."""
    return sum(all(parts[shard::shards]) for shard in range(shards))
