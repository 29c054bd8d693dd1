"""Who meets a canary: its share of the keys, the same ones every time, and with a larger share only more."""

from dataclasses import dataclass

from shard_router.hashing import digest


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that gets `percent` (1 to 100) of its name's traffic."""

    #: NAME@VERSION: every canary meets other keys than the one before it.
    model: str
    percent: int

    def takes(self, tenant: str, key: bytes) -> bool:
        """Whether this key of a tenant is among its share; depends on nothing else, in any process."""
        place = int.from_bytes(digest(self.model.encode(), tenant.encode(), key)[:8], "little")
        return place * 100 < self.percent << 64
