"""What a gateway knows of everybody's commits, and while it may rely on that: when a kept answer is exact.

Whoever commits tells every gateway that holds a lease, and answers a VISIBLE write once each of them has said
that it heard, or its lease is over (architecture.md, "Slots, shards, replicas"). So a gateway with a valid
lease knows of every write that was acknowledged so. Leases are Gray and Cheriton's (1989): the holder counts
from when it sent the renewal, the granter from when that came, each on a clock of its own. A cache needs no
more than this to say "nothing later is known", and must not take it from Redis, which may forget.
"""

from collections.abc import Mapping


class Watermark:
    """One collection's positions in each of its logs, as one gateway knows them.

    Seconds of its own monotonic clock.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        #: Before then every write that was acknowledged is known here.
        self._until_s = float("-inf")
        #: When the renewal was sent that told of these logs; one sent earlier tells of no others.
        self._told_s = float("-inf")
        #: The latest position known of each log; an answer of other logs is never served. Never changed, but
        #: replaced: those who were told of it may keep it.
        self._positions: Mapping[str, int] = {}

    def heard(self, log_id: str, position: int) -> bool:
        """A commit was made here or told by another gateway; repetitions and old news change nothing.

        False where it is of a log that is not followed here (yet): whoever told it must not take it for
        heard, as a renewal sent before the commit may still make us follow that log from an earlier position.
        """
        known = self._positions.get(log_id)
        if known is None:
            return False
        if position > known:
            self._positions = {**self._positions, log_id: position}
        return True

    def renewed(self, sent_s: float, positions: Mapping[str, int]) -> None:
        """The granter answered the renewal sent then, and told where each log stood when it did.

        Where they are other logs than before, nothing counts any more that was known of those that are gone.
        """
        if positions.keys() != self._positions.keys() and sent_s <= self._told_s:
            return
        known = self._positions
        self._positions = {log_id: max(at, known.get(log_id, at)) for log_id, at in positions.items()}
        self._told_s = max(self._told_s, sent_s)
        self._until_s = max(self._until_s, sent_s + self._lease_s)

    @property
    def positions(self) -> Mapping[str, int]:
        """The latest heard of each log; there may be later ones once the lease is over."""
        return self._positions

    def known(self, now_s: float) -> Mapping[str, int] | None:
        """log_id -> the position that an exact answer has to include; None where nobody here can say."""
        return self._positions if now_s < self._until_s else None
