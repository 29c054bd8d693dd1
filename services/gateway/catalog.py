"""The collections this gateway serves, each with its shard map and its replicas.

A replica that cannot follow its log any more is opened anew, and so is everything when the database holds
another log than before; what is asked meanwhile is answered with Unavailable, not from the old log.

Every shard has one replica, opened by what the composition hands in (endpoints.py); the collection's wish for
more is kept for a composition with more nodes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from services import tasks
from services.deadline import Deadline
from services.gateway.endpoints import ShardEndpoint, Shards
from services.metadata.store import Store
from services.shard.local_shards import slice_of
from shard_router.errors import NotFound, RingfortError, Unavailable, UnknownLog
from shard_router.model import Collection, LogDelta, Metric, Schema
from shard_router.shard_map import ShardMap

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How often it is looked whether something has to be opened anew; after a failure, with longer pauses.
#: Figures of which the greatest is told, not the sum.
_AGES = frozenset(("tail_age_s",))
REVIEW_S, LONGEST_PAUSE_S = 0.25, 5.0


class Served:
    """One collection as this gateway serves it."""

    def __init__(self, collection: Collection, shard_map: ShardMap, log_id: str) -> None:
        self.collection = collection
        self.shard_map = shard_map
        self.log_id = log_id
        #: The log's position after the last write that was acknowledged here, or at the start.
        self._acknowledged = 0
        #: By shard.
        self.replicas: dict[int, ShardEndpoint] = {}
        #: By shard, bool [slots].
        self.masks: dict[int, np.ndarray] = {}

    def committed(self, upto: int, delta: LogDelta | None) -> None:
        """Note a commit and hand its rows to the replicas; one that cannot take them reads the log."""
        self._acknowledged = max(self._acknowledged, upto)
        for shard, replica in self.replicas.items():
            if delta is None or not replica.offer(slice_of(delta, self.masks[shard])):
                replica.wake()

    @property
    def position(self) -> int:
        """The latest log position known: all that was acknowledged here, all that a replica has read."""
        return max(self._acknowledged, *(replica.position for replica in self.replicas.values()))

    @property
    def lag_positions(self) -> int:
        """How far behind the log that is known of the slowest replica is."""
        return self.position - min(replica.position for replica in self.replicas.values())

    def look(self) -> None:
        """There may be something new in the log."""
        for replica in self.replicas.values():
            replica.wake()

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether every replica has applied `position` before the deadline."""
        reached = await asyncio.gather(*(r.wait_for(position, deadline) for r in self.replicas.values()))
        return all(reached)

    def require_token(self, positions: Mapping[str, int]) -> int:
        """The position a read token asks for, 0 for an empty one; UnknownLog if it is of another log."""
        for log_id, position in positions.items():
            if log_id != self.log_id:
                raise UnknownLog(log_id, position)
        return positions.get(self.log_id, 0)


class Catalog:
    """Every collection of the store, open; names and aliases resolve here."""

    def __init__(self, store: Store, shards: Shards) -> None:
        self.store = store
        self._shards = shards
        self._by_name: dict[tuple[str, str], Served] = {}
        self._by_alias: dict[tuple[str, str], Served] = {}
        #: Changes of the catalog happen one at a time.
        self._changing = asyncio.Lock()
        self._reviewing: asyncio.Task[None] | None = None
        #: The log that everything was opened on.
        self._log_id = ""
        #: Told of every collection that goes, so that its writers end.
        self.on_drop: list[Callable[[Served], Awaitable[None]]] = []

    async def load(self) -> None:
        """Open every collection the store has; returns when all of them can answer."""
        await self._load()
        self._reviewing = asyncio.create_task(self._review(), name="catalog-review")

    async def close(self) -> None:
        """Close every replica."""
        await tasks.end(self._reviewing)
        for served in self.all():
            await _close(served)
        self._by_name.clear()
        self._by_alias.clear()

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

    async def create(
        self,
        *,
        tenant: str,
        name: str,
        dim: int,
        metric: Metric,
        schema: Schema,
        model: str | None,
        slots: int,
        shards: int,
        replicas: int,
        index: str,
        max_staleness_ms: int,
        space: str,
    ) -> Served:
        """Create a collection and open it; AlreadyExists if the name or an alias has it."""
        async with self._changing:
            collection = await self.store.create_collection(
                tenant=tenant, name=name, dim=dim, metric=metric, schema=schema, model=model, slots=slots,
                shards=shards, replicas=replicas, index=index, max_staleness_ms=max_staleness_ms, space=space,
            )  # fmt: skip
            served = await self._open(collection)
            self._index(served)
            return served

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a collection, its documents and its segments; an alias is not enough to name it."""
        async with self._changing:
            self._require_current()
            served = self._by_name.get((tenant, name))
            if served is None:
                raise NotFound("collection", name, "name")
            # Its readers end first: a log that goes away under one would look like a failure.
            await self._drop(served)
            try:
                await self.store.delete_collection(tenant, name)
            except BaseException:
                # Still there, as far as we know; the review opens it again.
                for replica in served.replicas.values():
                    replica.fell.set()
                self._index(served)
                raise
            await self._shards.forget(served.collection)

    async def set_alias(self, tenant: str, alias: str, name: str | None) -> None:
        """Point an alias at a collection, or remove it."""
        async with self._changing:
            await self.store.set_alias(tenant, alias, name)
            for collection in await self.store.collections():
                served = self._by_name.get((collection.tenant, collection.name))
                if served is not None:
                    served.collection = collection
            self._by_alias = {
                (served.collection.tenant, a): served
                for served in self.all()
                for a in served.collection.aliases
            }

    def stats(self) -> dict[str, float]:
        """The replicas' figures, added up over all collections."""
        totals: dict[str, float] = {}
        for served in self.all():
            for replica in served.replicas.values():
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
            replicas = served.replicas.values()
            told[name if tenant == "default" else f"{tenant}/{name}"] = {
                "documents": sum(replica.describe()["documents"] for replica in replicas),
                "lag_positions": served.lag_positions,
            }
        return told

    def _index(self, served: Served) -> None:
        collection = served.collection
        self._by_name[collection.tenant, collection.name] = served
        for alias in collection.aliases:
            self._by_alias[collection.tenant, alias] = served

    def _require_current(self) -> None:
        if self._log_id != self.store.log_id:
            raise Unavailable(
                "the database holds another log than before; collections are being opened on it"
            )

    async def _load(self) -> None:
        log_id, collections = self.store.log_id, await self.store.collections()
        for served in await _all_or_none((self._open(c) for c in collections), _close):
            self._index(served)
        await self._shards.keep_only(collections)
        self._log_id = log_id

    async def _drop(self, served: Served) -> None:
        """Answer for a collection no more: end its writers, then its readers."""
        self._by_name.pop((served.collection.tenant, served.collection.name), None)
        self._by_alias = {key: s for key, s in self._by_alias.items() if s is not served}
        for tell in self.on_drop:
            await tell(served)
        await _close(served)

    async def _review(self) -> None:
        """Open anew what cannot go on as it is, until that works."""
        pause_s = REVIEW_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                async with self._changing:
                    await self._reopen()
                pause_s = REVIEW_S
            except Exception as error:
                known = isinstance(error, RingfortError | OSError)
                log.warning("collections cannot be opened anew now: %s", error, exc_info=not known)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _reopen(self) -> None:
        if self._log_id != self.store.log_id:
            log.warning("opening every collection anew, on log %s", self.store.log_id)
            for served in self.all():
                await self._drop(served)
            await self._load()
        for served in self.all():
            for shard, replica in served.replicas.items():
                if replica.fell.is_set():
                    await replica.close()
                    served.replicas[shard] = await self._open_shard(served, shard)

    async def _open(self, collection: Collection) -> Served:
        shard_map = ShardMap.create(collection.slots, collection.shards)
        served = Served(collection, shard_map, self.store.log_id)
        for shard in shard_map.shards:
            mask = np.zeros(collection.slots, bool)
            mask[shard_map.slots_of(shard)] = True
            served.masks[shard] = mask
        opening = (self._open_shard(served, shard) for shard in shard_map.shards)
        opened = await _all_or_none(opening, lambda replica: replica.close())
        served.replicas = dict(zip(shard_map.shards, opened, strict=True))
        try:
            served.committed(await self.store.position(collection), None)
        except BaseException:
            await _close(served)
            raise
        return served

    async def _open_shard(self, served: Served, shard: int) -> ShardEndpoint:
        return await self._shards.open(served.collection, shard, served.masks[shard], served.log_id)


async def _close(served: Served) -> None:
    await asyncio.gather(*(replica.close() for replica in served.replicas.values()))


async def _all_or_none(opening: Iterable[Awaitable[T]], close: Callable[[T], Awaitable[None]]) -> Sequence[T]:
    """What is opened side by side; where one fails the others are closed again, and it is raised."""
    results = await asyncio.gather(*opening, return_exceptions=True)
    opened = [result for result in results if not isinstance(result, BaseException)]
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    if failed is not None:
        await asyncio.gather(*map(close, opened))
        raise failed
    return opened
