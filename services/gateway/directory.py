"""The collections that a gateway answers for, by name."""

from collections.abc import Awaitable, Callable, Mapping

from services.gateway.served import Served
from services.metadata.store import Store
from shard_router.errors import NotFound, Unavailable

#: Figures of which the greatest is told, not the sum.
_AGES = frozenset(("tail_age_s",))


class Directory:
    """Collections by name, alias and number. What fills it is a Catalog, or, beside a head, a Mirror."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._by_name: dict[tuple[str, str], Served] = {}
        self._by_alias: dict[tuple[str, str], Served] = {}
        self._by_uid: dict[int, Served] = {}
        #: By number, the generation of a collection that is not the live one.
        self._beside: dict[int, Served] = {}
        #: The log that everything was opened on.
        self.log_id = ""
        #: Whether other gateways write, too.
        self.shared = False
        #: Told of every collection that goes, so that its writers end.
        self.on_drop: list[Callable[[Served], Awaitable[None]]] = []

    def all(self) -> list[Served]:
        """Every collection, by tenant and name."""
        return [served for _, served in sorted(self._by_name.items())]

    def of_tenant(self, tenant: str) -> list[Served]:
        """A tenant's collections, by name; Unavailable as for `resolve`."""
        self._require_current()
        return [served for served in self.all() if served.collection.tenant == tenant]

    def resolve(self, tenant: str, name: str, field: str = "collection") -> Served:
        """The collection of that name or alias; NotFound names the request's field.

        Unavailable while the database holds another log than the collection was opened on.
        """
        self._require_current()
        found = self._by_name.get((tenant, name)) or self._by_alias.get((tenant, name))
        if found is None:
            raise NotFound("collection", name, field)
        return found

    def of(self, uid: int) -> Served | None:
        """The collection of that number."""
        return self._by_uid.get(uid)

    def beside(self, uid: int) -> Served | None:
        """That collection's other generation, where there is one beside the live one."""
        return self._beside.get(uid)

    async def positions(self, served: Served) -> Mapping[str, int]:
        """By log, where a collection stands, every acknowledged write included."""
        if not self.shared:
            return served.positions
        return served.by_log(await self.store.positions(served.collection))

    def stats(self) -> dict[str, float]:
        """The copies' figures, added up over all collections."""
        totals: dict[str, float] = {}
        for served in self.all():
            for _, replica in served.copies():
                for name, value in replica.stats().items():
                    known = totals.get(name, 0.0)
                    totals[name] = max(known, value) if name in _AGES else known + value
        lag = sum(served.lag_positions for served in self.all())
        return {"collections": len(self._by_name), "lag_positions": lag, **totals}

    def stats_of_each(self) -> dict[str, dict[str, float]]:
        """Documents and lag of every collection, by its name and, where it is not the default's, tenant."""
        told: dict[str, dict[str, float]] = {}
        for served in self.all():
            tenant, name = served.collection.tenant, served.collection.name
            told[name if tenant == "default" else f"{tenant}/{name}"] = {
                "documents": served.documents,
                "lag_positions": served.lag_positions,
            }
        return told

    def _index(self, served: Served) -> None:
        collection = served.collection
        self._by_name[collection.tenant, collection.name] = self._by_uid[collection.uid] = served
        for alias in collection.aliases:
            self._by_alias[collection.tenant, alias] = served

    def _require_current(self) -> None:
        if self.log_id != self.store.log_id:
            raise Unavailable(
                "the database holds another log than before; collections are being opened on it"
            )

    def _unindex(self, served: Served) -> None:
        """Answer for a collection no more."""
        collection = served.collection
        self._by_name = {key: each for key, each in self._by_name.items() if each is not served}
        self._by_alias = {key: each for key, each in self._by_alias.items() if each is not served}
        self._by_uid.pop(collection.uid, None)

    def _clear(self) -> None:
        self._by_name.clear()
        self._by_alias.clear()
        self._by_uid.clear()
        self._beside.clear()
