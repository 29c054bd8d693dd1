"""One log of a collection, and the copies of its shards that follow it."""

from collections.abc import Iterable, Iterator, Sequence

from services.gateway.endpoints import ShardEndpoint
from shard_router.model import LogDelta
from shard_router.resharding import Copy


class CollectionLog:
    """Who follows a log, and how far it is known. A collection has one in each of its databases."""

    def __init__(self, database: str, slots: frozenset[int] | None) -> None:
        """slots: those of the documents in that database; None for all."""
        self.database = database
        self.slots = slots
        #: Empty while it is not known: the database was not there yet, or holds another log than before.
        self.log_id = ""
        #: The log's position after the last write that was acknowledged here, or at the start.
        self._acknowledged = 0
        #: By shard and number, the copies that have caught up and are asked.
        self.replicas: dict[int, dict[int, ShardEndpoint]] = {}
        #: Those that are catching up: they hear of commits, or they never would.
        self.joining: set[ShardEndpoint] = set()
        #: By copy, how many searches are under way there.
        self.in_flight: dict[Copy, int] = {}

    def own(self, slots: Iterable[int]) -> tuple[int, ...]:
        """Those of the slots whose documents lie in this database."""
        mine = self.slots
        return tuple(slots) if mine is None else tuple(slot for slot in slots if slot in mine)

    def attach(self, log_id: str, position: int) -> None:
        """The log is this one, and stood there."""
        self.log_id, self._acknowledged = log_id, position

    def copies(self) -> Iterator[tuple[Copy, ShardEndpoint]]:
        """Every copy that has caught up, in order."""
        for shard, replicas in sorted(self.replicas.items()):
            for number, replica in sorted(replicas.items()):
                yield Copy(shard, number, self.database), replica

    def up(self, shard: int) -> dict[int, ShardEndpoint]:
        """The copies of a shard that are not down, by number."""
        return {n: r for n, r in sorted(self.replicas.get(shard, {}).items()) if not r.fell.is_set()}

    def loads(self, shard: int) -> list[float | None]:
        """What is under way at each copy of a shard, by number; None where it is down."""
        up = self.up(shard)
        return [
            self.in_flight.get(Copy(shard, number, self.database), 0) if number in up else None
            for number in range(max(up, default=-1) + 1)
        ]

    def committed(self, upto: int, delta: LogDelta | None) -> None:
        """Note a commit and hand its rows to the copies; one that cannot take them reads the log."""
        self._acknowledged = max(self._acknowledged, upto)
        for replicas in self.replicas.values():
            for replica in replicas.values():
                if delta is None or not replica.offer(delta):
                    replica.wake()
        for replica in self.joining:
            if delta is None or not replica.offer(delta):
                replica.wake()

    def heard(self, position: int) -> None:
        """It has come so far, by a write of another gateway, which has handed its rows to the copies."""
        self._acknowledged = max(self._acknowledged, position)
        for replica in self.joining:
            replica.wake()

    @property
    def position(self) -> int:
        """The latest position known: all that was acknowledged here, all that a replica has read."""
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

    def forget(self, shards: Sequence[int]) -> None:
        """No other shards than these are left."""
        for shard in [shard for shard in self.replicas if shard not in shards]:
            del self.replicas[shard]
