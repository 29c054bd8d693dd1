"""Who holds a lease, and what each has said that it goes by: whom something has to wait for, decided.

A lease is a promise to its holder: nobody is told that something is done before the holder has said that it
heard of it, as long as the lease lasts (Gray and Cheriton, 1989). The granter counts it from when the renewal
came, and a little longer than the holder, who counts from when it sent it, by a clock that may be slow. A
holder that says nothing any more loses it, however much it is told.
"""

#: By how much the clock of one machine may be slower than another's, as a share.
DRIFT = 0.05


class Holders:
    """The leases that were granted. Seconds of the granter's monotonic clock."""

    def __init__(self, lease_s: float, now_s: float) -> None:
        """A granter that begins may follow one whose leases are not over yet: it waits for as long."""
        self._granted_s = lease_s * (1 + DRIFT)
        self._former_until_s = now_s + self._granted_s
        #: By holder, the end of its lease.
        self._until_s: dict[str, float] = {}
        #: By holder, the latest version that it goes by, and of which it has done everything.
        self._heard: dict[str, int] = {}
        self._settled: dict[str, int] = {}

    def grant(self, holder: str, came_s: float, now_s: float) -> None:
        """A renewal that came then is answered now."""
        self._until_s[holder] = max(came_s + self._granted_s, self._until_s.get(holder, came_s))
        # Those whose lease is over are not waited for whatever they heard.
        for other in [other for other, until_s in self._until_s.items() if until_s <= now_s]:
            self.leave(other)

    def heard(self, holder: str, version: int, settled: int) -> None:
        """A holder has said what it goes by, and of what everything is done there."""
        if holder in self._until_s:
            self._heard[holder] = max(version, self._heard.get(holder, 0))
            self._settled[holder] = max(settled, self._settled.get(holder, 0))

    def leave(self, holder: str) -> None:
        """A holder has given its lease back, or it is over."""
        self._until_s.pop(holder, None)
        self._heard.pop(holder, None)
        self._settled.pop(holder, None)

    def wait_until_s(self, version: int, now_s: float, *, settled: bool = False) -> float | None:
        """When to wait no longer for those who have not heard of a version, or not `settled` it.

        None where nobody has to be waited for.
        """
        said = self._settled if settled else self._heard
        ends_s = [until_s for holder, until_s in self._until_s.items() if said.get(holder, 0) < version]
        return max((end_s for end_s in (self._former_until_s, *ends_s) if end_s > now_s), default=None)

    def leased(self, now_s: float) -> set[str]:
        """Those whose lease is not over."""
        return {holder for holder, until_s in self._until_s.items() if until_s > now_s}
