"""One collection as this gateway serves it: its shard map and the copies of its shards."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TypeVar

from services.deadline import Deadline
from services.gateway.endpoints import ShardEndpoint
from shard_router.errors import DeadlineExceeded, ShardUnavailable, StaleEpoch, Unavailable, UnknownLog
from shard_router.fanout_plan import HedgeBudget, Latencies, stale_pause_s
from shard_router.model import Collection, LogDelta
from shard_router.resharding import Copy
from shard_router.shard_map import MapState, ShardMap

T = TypeVar("T")
#: Returns when the copies certainly have what was told to be visible, before a deadline.
Assure = Callable[[Deadline], Awaitable[None]]


class Served:
    """A collection, who answers for its slots, and how far its log is known."""

    def __init__(self, collection: Collection, state: MapState, log_id: str) -> None:
        self.collection = collection
        #: Who owns which slot, and who is about to; changed by `turn` alone.
        self.state = state
        self.log_id = log_id
        #: The log's position after the last write that was acknowledged here, or at the start.
        self._acknowledged = 0
        #: By shard and number, the copies that have caught up and are asked.
        self.replicas: dict[int, dict[int, ShardEndpoint]] = {}
        #: Those that are catching up: they hear of commits, or they never would.
        self.joining: set[ShardEndpoint] = set()
        #: By copy, how many searches are under way there.
        self.in_flight: dict[Copy, int] = {}
        self.latencies, self.hedges = Latencies(), HedgeBudget()
        #: How many replicas there are to be, while that is more than the collection asks for yet.
        self.growing_to = 0
        #: Copies are opened and closed by one at a time.
        self.reconciling = asyncio.Lock()
        #: Makes sure that the copies have what everybody was told is visible; None where nobody else tells.
        self.assure: Assure | None = None
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

    def wanted(self) -> set[Copy]:
        """The copies that there should be."""
        numbers = range(max(self.collection.replicas, self.growing_to))
        return {Copy(shard, number) for shard in self.state.shards for number in numbers}

    @property
    def wants_copies(self) -> bool:
        """Whether a copy that there should be is missing or down."""
        up = {copy for copy, replica in self.copies() if not replica.fell.is_set()}
        return not self.wanted() <= up

    def join(self, copy: Copy, replica: ShardEndpoint) -> None:
        """A copy that has caught up is asked from now on."""
        self.replicas.setdefault(copy.shard, {})[copy.replica] = replica
        for tell in self.on_copy:
            tell(copy, True)

    def leave(self, copy: Copy) -> ShardEndpoint:
        """A copy is asked no more; it is not closed yet."""
        for tell in self.on_copy:
            tell(copy, False)
        return self.replicas[copy.shard].pop(copy.replica)

    def copies(self) -> Iterator[tuple[Copy, ShardEndpoint]]:
        """Every copy that has caught up, in order."""
        for shard, replicas in sorted(self.replicas.items()):
            for number, replica in sorted(replicas.items()):
                yield Copy(shard, number), replica

    def up(self, shard: int) -> dict[int, ShardEndpoint]:
        """The copies of a shard that are not down, by number."""
        return {n: r for n, r in sorted(self.replicas.get(shard, {}).items()) if not r.fell.is_set()}

    def loads(self, shard: int) -> list[float | None]:
        """What is under way at each copy of a shard, by number; None where it is down."""
        up = self.up(shard)
        return [
            self.in_flight.get(Copy(shard, number), 0) if number in up else None
            for number in range(max(up, default=-1) + 1)
        ]

    def committed(self, upto: int, delta: LogDelta | None, epoch: int = 0) -> None:
        """Note a commit and hand its rows to the copies; one that cannot take them reads the log.

        epoch: the stored map's as of the commit.
        """
        self._told_epoch = max(self._told_epoch, epoch)
        self._acknowledged = max(self._acknowledged, upto)
        for replicas in self.replicas.values():
            for replica in replicas.values():
                if delta is None or not replica.offer(delta):
                    replica.wake()
        for replica in self.joining:
            if delta is None or not replica.offer(delta):
                replica.wake()

    def heard(self, position: int) -> None:
        """The log has come so far, by a write of another gateway, which has handed its rows to the copies."""
        self._acknowledged = max(self._acknowledged, position)
        for replica in self.joining:
            replica.wake()

    @property
    def position(self) -> int:
        """The latest log position known: all that was acknowledged here, all that a replica has read."""
        position = self._acknowledged
        for replicas in self.replicas.values():
            for replica in replicas.values():
                position = max(position, replica.position)
        return position

    @property
    def lag_positions(self) -> int:
        """How far behind the log that is known of the slowest copy is."""
        position = self.position
        return position - min((replica.position for _, replica in self.copies()), default=position)

    @property
    def documents(self) -> int:
        """How many documents its shards have, each counted at the copy that has most."""
        return sum(
            max((int(replica.describe()["documents"]) for replica in replicas.values()), default=0)
            for replicas in self.replicas.values()
        )

    def look(self) -> None:
        """There may be something new in the log."""
        for _, replica in self.copies():
            replica.wake()

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether, before the deadline, every copy that may be asked has applied `position`.

        False where a shard has no copy that may: what is visible there nobody can say. Nor can anybody while
        a commit has told of a later map than is known here, for then others may have to be waited for.
        """
        while self.outdated:
            self._turned.clear()
            try:
                async with asyncio.timeout(deadline.left_s()):
                    await self._turned.wait()
            except TimeoutError:
                return False
        while True:
            asked = {shard: self.up(shard) for shard in self.state.shards}
            waits = [replica.wait_for(position, deadline) for up in asked.values() for replica in up.values()]
            reached = all(await asyncio.gather(*waits))
            if reached and all(asked.get(shard) for shard in self.shard_map.shards):
                return True
            # Whoever fell or left meanwhile is asked no more, as long as another copy is there.
            if deadline.left_s() <= 0 or asked == {shard: self.up(shard) for shard in self.state.shards}:
                return False

    async def each_shard(
        self, ask: Callable[[ShardEndpoint, int], Awaitable[T]], deadline: Deadline
    ) -> list[T]:
        """What one copy of every shard says, asked with the map's epoch: together, of every slot once.

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
        up = [self.up(shard) for shard in shards]
        if not all(up):
            raise ShardUnavailable(sum(map(bool, up)), len(shards), 1.0)
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
                await replica.serve(state.epoch, state.served_by(copy.shard))
            except ValueError:
                left.append(self.leave(copy))
        for copy, replica in list(self.copies()):
            await settle(replica, state, copy.shard)
        self._turned.set()
        return left

    def follow(self, state: MapState) -> None:
        """Go by another state of the map, over to which somebody else leads the copies."""
        if state.epoch >= self.state.epoch:
            self.state = state
            self._turned.set()

    def require_token(self, positions: Mapping[str, int]) -> int:
        """The position a read token asks for, 0 for an empty one; UnknownLog if it is of another log."""
        for log_id, position in positions.items():
            if log_id != self.log_id:
                raise UnknownLog(log_id, position)
        return positions.get(self.log_id, 0)


async def settle(replica: ShardEndpoint, state: MapState, shard: int) -> None:
    """Let a copy of a shard answer for what is its own in that state, and drop what it need not follow."""
    await replica.serve(state.epoch, state.served_by(shard))
    strange = replica.followed().difference(state.followed_by(shard))
    if strange:
        await replica.release(sorted(strange))
