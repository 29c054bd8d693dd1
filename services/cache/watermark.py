"""What a gateway knows of everybody's commits, and while it may rely on that: when a kept answer is exact.

Whoever commits tells every gateway that holds a lease, and answers a VISIBLE write once each of them has said
that it heard, or its lease is over (architecture.md, "Slots, shards, replicas"). So a gateway with a valid
lease knows of every write that was acknowledged so. Leases are Gray and Cheriton's (1989): the holder counts
from when it sent the renewal, the granter from when it answered, each on a clock of its own. A cache needs no
more than this to say "nothing later is known", and must not take it from Redis, which may forget.
"""

from collections.abc import Mapping


class Watermark:
    """One collection's positions as one gateway knows them. Seconds of its own monotonic clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        #: Before then every write that was acknowledged is known here.
        self._until_s = float("-inf")
        #: When the renewal was sent that told of the log; one sent earlier tells of no other.
        self._told_s = float("-inf")
        #: The log that the positions are of; an answer of another is never served.
        self._log_id = ""
        #: The latest position known; grows while the log is the same.
        self._position = 0

    def heard(self, log_id: str, position: int) -> bool:
        """A commit was made here or told by another gateway; repetitions and old news change nothing.

        False where it is of a log that is not followed here (yet): whoever told it must not take it for
        heard, as a renewal sent before the commit may still make us follow that log from an earlier position.
        """
        if log_id != self._log_id:
            return False
        self._position = max(self._position, position)
        return True

    def renewed(self, sent_s: float, log_id: str, position: int) -> None:
        """The granter answered the renewal sent then, and told where the log stood when it did.

        Where it is another log than before, nothing that was known counts any more.
        """
        if log_id != self._log_id:
            if sent_s <= self._told_s:
                return
            self._log_id, self._position = log_id, position
        self._told_s = max(self._told_s, sent_s)
        self._position = max(self._position, position)
        self._until_s = max(self._until_s, sent_s + self._lease_s)

    @property
    def log_id(self) -> str:
        """The log as last told."""
        return self._log_id

    @property
    def position(self) -> int:
        """The latest position heard of; there may be later ones once the lease is over."""
        return self._position

    def known(self, now_s: float) -> Mapping[str, int] | None:
        """log_id -> the position that an exact answer has to include; None where nobody here can say."""
        return {self._log_id: self._position} if now_s < self._until_s else None
