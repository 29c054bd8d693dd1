"""Which server of a Redis Cluster has a key, as the Cluster last told it.

Redis Cluster specification: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from binascii import crc_hqx
from collections.abc import Iterable, Sequence
from typing import Any

SLOTS = 16_384

#: Host and port of a server.
Address = tuple[str, int]


def slot_of(key: bytes) -> int:
    """The slot of a key, 0 to 16383: CRC16 of the key, or of what its first braces enclose."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS


class SlotTable:
    """The owner of every slot; a slot without one belongs to nobody we know."""

    def __init__(self) -> None:
        self._owners: list[Address | None] = [None] * SLOTS

    @classmethod
    def of(cls, reply: Sequence[Any], asked: Address) -> "SlotTable":
        """The table in the reply to CLUSTER SLOTS: [[first, last, [host, port, ...], replicas ...], ...].

        A server that does not know its own host means the address it was `asked` at. ValueError where the
        reply is something else.
        """
        table = cls()
        try:
            for first, last, primary, *_ in reply:
                host, port = primary[:2]
                told = host.decode() if isinstance(host, bytes) else host
                owner = (told if told and told != "?" else asked[0], int(port))
                for slot in range(int(first), int(last) + 1):
                    table._owners[slot] = owner
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"not the slots of a cluster: {error}") from None
        return table

    @property
    def addresses(self) -> set[Address]:
        """Every server that owns a slot."""
        return {owner for owner in self._owners if owner is not None}

    def owner(self, key: bytes) -> Address | None:
        """The server that has the key."""
        return self._owners[slot_of(key)]

    def moved(self, slot: int, owner: Address) -> None:
        """The Cluster said that a slot is elsewhere now."""
        self._owners[slot] = owner

    def group(self, keys: Iterable[bytes]) -> dict[Address | None, list[bytes]]:
        """The keys by the server that has them, in order; under None those that nobody has."""
        groups: dict[Address | None, list[bytes]] = {}
        for key in keys:
            groups.setdefault(self._owners[slot_of(key)], []).append(key)
        return groups
