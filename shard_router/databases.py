"""Which of a collection's databases keeps which slots: fixed with the list of their names."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from shard_router.hashing import slots_of
from shard_router.model import Collection
from shard_router.ring import even


class DatabaseMap:
    """Every slot's database. The same names make the same map on every machine and in every release."""

    def __init__(self, slots: int, names: tuple[str, ...]) -> None:
        """Within one slot of even: of more names than slots, some have none. ValueError without names."""
        self.names = names
        self._slots = slots
        number = {name: at for at, name in enumerate(names)}
        owners = even([f"slot-{slot}" for slot in range(slots)], names)
        #: By slot, the number of its database.
        self._owners = np.array([number[owner] for owner in owners], np.int32)

    def slots_of(self, name: str) -> frozenset[int]:
        """The slots of a database."""
        return frozenset(np.flatnonzero(self._owners == self.names.index(name)).tolist())

    def cut(self, ids: Iterable[str]) -> dict[str, list[int]]:
        """By database, the places of its ids, in order; databases without any are left out."""
        places: dict[str, list[int]] = {}
        for place, number in enumerate(self._owners[slots_of(ids, self._slots)].tolist()):
            places.setdefault(self.names[number], []).append(place)
        return places


def databases_of(collection: Collection) -> DatabaseMap:
    """The map of a collection."""
    return _made(collection.slots, collection.databases)


@lru_cache(256)
def _made(slots: int, names: tuple[str, ...]) -> DatabaseMap:
    return DatabaseMap(slots, names)
