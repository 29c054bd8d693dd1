"""What the figures of a Redis, read now and then, say about what happened in between."""

from dataclasses import dataclass

#: So much of what was held, gone between two looks, is a storm or a purge; of less than MANY it is nothing.
SHARE, MANY = 0.1, 100


@dataclass(frozen=True, slots=True)
class Numbers:
    """A server's entries and bytes now, and the keys evicted and expired since it started."""

    entries: int
    bytes: int
    evicted: int
    expired: int


class Survey:
    """Follows one server. Everything counted is a lower bound: what was written meanwhile hides losses."""

    def __init__(self) -> None:
        self.last: Numbers | None = None
        #: Keys evicted for want of room, since we began to look.
        self.evicted = 0
        #: Looks between which the server evicted a tenth of its keys.
        self.eviction_storms = 0
        #: Keys that went without being evicted or expiring: deleted, flushed, lost in a restart.
        self.removed = 0
        #: Looks between which a tenth of the keys were removed.
        self.purges = 0

    def look(self, now: Numbers) -> str:
        """Take the figures of this moment; what deserves a line in the log, or nothing."""
        before, self.last = self.last, now
        if before is None:
            return ""
        restarted = now.evicted < before.evicted or now.expired < before.expired
        evicted = now.evicted if restarted else now.evicted - before.evicted
        expired = now.expired if restarted else now.expired - before.expired
        removed = max(0, before.entries - now.entries - (0 if restarted else evicted + expired))
        self.evicted += evicted
        self.removed += removed
        much = max(MANY, SHARE * before.entries)
        if evicted >= much:
            self.eviction_storms += 1
            return f"redis evicted {evicted} of {before.entries} keys in a moment"
        if removed >= much:
            self.purges += 1
            return f"{removed} of {before.entries} keys of redis were removed"
        return ""
