"""Leases: who may still be believed to know, told without a common clock.

The holder counts from when it *sent* the renewal, the granter from when it answered, each on its own
monotonic clock; so the holder's lease ends first, whatever the network does (Gray and Cheriton, 1989; clocks
may differ as they like, but not run at speeds that differ by more than `drift`). A holder whose lease has
lapsed answers nothing until it has caught up with where things stand.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass
class HeldLease:
    """What a replica or a gateway knows of its own lease. Seconds of its own clock."""

    length_s: float
    #: Valid before then.
    until_s: float = float("-inf")
    #: Where it has to have caught up to before it answers again; None while it need not.
    behind: int | None = 0

    def renewed(self, sent_s: float, now_s: float, position: int) -> None:
        """The granter answered the renewal sent then, and said where the log stood when it did.

        A lease that had lapsed begins anew: the holder first has to catch up to there.
        """
        if not self.valid(now_s):
            self.behind = position
        self.until_s = max(self.until_s, sent_s + self.length_s)

    def caught_up(self, position: int) -> None:
        """The holder has applied the log up to there."""
        if self.behind is not None and position >= self.behind:
            self.behind = None

    def valid(self, now_s: float) -> bool:
        """Whether its time is not over."""
        return now_s < self.until_s

    def may_answer(self, now_s: float) -> bool:
        """Whether it is valid, and the holder has caught up since it last was not."""
        return self.valid(now_s) and self.behind is None


@dataclass
class GrantedLeases:
    """What the granter knows of everybody's leases. Seconds of its own clock."""

    length_s: float
    #: How much longer than the holder the granter waits, as a share: clocks may run so differently.
    drift: float = 0.01
    _until_s: dict[Hashable, float] = field(default_factory=dict)

    def grant(self, holder: Hashable, now_s: float) -> None:
        """A renewal is being answered now."""
        self._until_s[holder] = now_s + self.length_s * (1 + self.drift)

    def holders(self, now_s: float) -> set[Hashable]:
        """Those whose leases may still be valid; only they have to be waited for."""
        self._until_s = {holder: until_s for holder, until_s in self._until_s.items() if now_s < until_s}
        return set(self._until_s)

    def lapse_s(self, now_s: float) -> float:
        """Seconds until every lease granted so far is over; 0 where none is left."""
        return max([until_s - now_s for until_s in self._until_s.values()] + [0.0])
