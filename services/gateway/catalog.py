"""The collections this gateway serves, each with its shard map and the copies of its shards.

A copy that cannot follow its log any more is opened anew, and is asked again once it has caught up; so is
everything when the database holds another log than before, and what is asked meanwhile is answered with
Unavailable, not from the old log.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from services import tasks
from services.deadline import Deadline
from services.gateway.directory import Directory
from services.gateway.endpoints import Shards
from services.gateway.served import Served
from services.metadata.store import Store
from shard_router.errors import NotFound, RingfortError, Unavailable
from shard_router.model import HOME, Collection, Metric, Schema
from shard_router.resharding import Copy
from shard_router.shard_map import MapState

__all__ = ["Catalog", "Served"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A copy that is opened has so long to catch up with what was written meanwhile; then it is tried again.
JOIN_S = 30.0
#: How often it is looked whether something has to be opened anew; after a failure, with longer pauses.
REVIEW_S, LONGEST_PAUSE_S = 0.25, 5.0


class Catalog(Directory):
    """Every collection of the store, open; the only one to change what there is."""

    def __init__(self, store: Store, shards: Shards) -> None:
        """`shards` opens the copies of shards."""
        super().__init__(store)
        self._shards = shards
        #: Lets other gateways know of what has changed, and returns when they do; None where there are none.
        self._tell_others: Callable[[], Awaitable[None]] | None = None
        #: Changes of the catalog happen one at a time.
        self._changing = asyncio.Lock()
        self._reviewing: asyncio.Task[None] | None = None
        #: Set when there may be something to open anew.
        self._hurried = asyncio.Event()
        #: Told when everything was opened on another log.
        self.on_load: list[Callable[[], Awaitable[None]]] = []

    async def load(self) -> None:
        """Open every collection the store has; returns when all of them can answer."""
        await self._load()
        self._reviewing = asyncio.create_task(self._review(), name="catalog-review")

    async def close(self) -> None:
        """Close every copy."""
        await tasks.end(self._reviewing)
        for served in self._open_ones():
            await _close(served)
        self._clear()

    def share(self, tell_others: Callable[[], Awaitable[None]]) -> None:
        """There are other gateways, and this lets them know of what has changed, and waits until they do."""
        self.shared, self._tell_others = True, tell_others

    async def spread(self) -> None:
        """Return when every gateway goes by what there is now."""
        if self._tell_others is not None:
            await self._tell_others()

    def hurry(self) -> None:
        """Look at once whether something can be opened anew: a node has come back."""
        self._hurried.set()

    async def turn(self, served: Served, state: MapState) -> None:
        """Go over to another state of a collection's map; copies that cannot are closed, and opened anew."""
        beside = self._other(served)
        for each in (served,) if beside is None else (served, beside):
            for left in await each.turn(state):
                await left.close()

    def change(self, served: Served, *, replicas: int) -> None:
        """A collection is to have so many copies of each shard, in all generations."""
        for each in (served, self._other(served)):
            if each is not None:
                each.collection = replace(each.collection, replicas=replicas)

    async def open_beside(self, collection: Collection) -> Served:
        """Follow the log with another generation of a collection that is here, too; it answers nobody yet.

        Its copies are opened in the background.
        """
        async with self._changing:
            self._require_current()
            return await self._open_beside(collection)

    async def close_beside(self, uid: int) -> None:
        """Follow the log no more with a collection's other generation, and remove its segments."""
        async with self._changing:
            served = self._beside.pop(uid, None)
            if served is None:
                return
            await self.spread()
            for tell in self.on_drop:
                await tell(served)
            async with served.reconciling:
                await _close(served)
            await self._shards.forget_all(served.collection)

    async def exchange(self, uid: int) -> Served:
        """A collection's other generation is the live one from now on, and the one that was is beside it.

        Whoever was admitted before is answered by the one that was.
        """
        async with self._changing:
            self._require_current()
            live, coming = self._by_uid.get(uid), self._beside.get(uid)
            if live is None or coming is None:
                raise NotFound("collection", str(uid))
            coming.heard(live.positions)
            self._unindex(live)
            self._index(coming)
            self._beside[uid] = live
            return coming

    async def reconcile(self, served: Served) -> None:
        """Open the copies that its map and its number of replicas ask for, and close all others.

        Each is asked as soon as it has caught up; returns, or raises what opening one of them did, when all
        have come to an end.
        """
        async with served.reconciling:
            state, wanted = served.state, served.wanted()
            for copy, replica in list(served.copies()):
                if copy not in wanted or replica.fell.is_set():
                    await served.leave(copy).close()
                if copy not in wanted:
                    await self._shards.forget(
                        served.collection, copy.shard, copy.replica, database=copy.database
                    )
            for log in served.logs.values():
                log.forget(state.shards)
            discarded, served.discarded = served.discarded, []
            await asyncio.gather(*(replica.close() for replica in discarded))
            here = {copy for copy, _ in served.copies()}
            opening = [self._join(served, copy) for copy in sorted(wanted - here)]
            results = await asyncio.gather(*opening, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    def resolve(self, tenant: str, name: str, field: str = "collection") -> Served:
        """As of every directory; a log that a database has exchanged is followed no more from here on."""
        found = super().resolve(tenant, name, field)
        if len(found.logs) > 1:
            self._discard(found)
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
            try:
                served = await self._open(collection)
            except BaseException:
                # Nobody was told of it, and nobody would open it before the next start.
                with contextlib.suppress(RingfortError):
                    await self.store.delete_collection(tenant, name)
                raise
            self._index(served)
            await self.spread()
            return served

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a collection, its documents and its segments; an alias is not enough to name it."""
        async with self._changing:
            self._require_current()
            served = self._by_name.get((tenant, name))
            if served is None:
                raise NotFound("collection", name, "name")
            # Its readers end first: a log that goes away under one would look like a failure.
            beside = self._other(served)
            await self._drop(served)
            try:
                await self.store.delete_collection(tenant, name)
            except BaseException:
                # Still there, as far as we know; the review opens it again.
                for each in (served, beside):
                    if each is not None:
                        for log in each.logs.values():
                            log.replicas.clear()
                self._index(served)
                if beside is not None:
                    self._beside[beside.collection.uid] = beside
                raise
            await self._shards.forget_all(served.collection)
            if beside is not None:
                await self._shards.forget_all(beside.collection)

    async def set_alias(self, tenant: str, alias: str, name: str | None) -> None:
        """Point an alias at a collection, or remove it."""
        async with self._changing:
            await self.store.set_alias(tenant, alias, name)
            for collection in await self.store.collections():
                served = self._by_name.get((collection.tenant, collection.name))
                if served is not None:
                    served.collection = collection
                    if (beside := self._other(served)) is not None:
                        beside.collection = replace(beside.collection, aliases=collection.aliases)
            self._by_alias = {
                (served.collection.tenant, a): served
                for served in self.all()
                for a in served.collection.aliases
            }
            await self.spread()

    async def _load(self) -> None:
        log_id, collections = self.store.log_id, await self.store.collections()
        beside = [each.collection for each in await self.store.generations.beside(collections)]
        for served in await _all_or_none((self._open(c) for c in collections), _close):
            self._index(served)
        await self._shards.keep_only((c.uid, c.generation) for c in (*collections, *beside))
        for collection in beside:
            await self._open_beside(collection)
        self.log_id = log_id

    async def _drop(self, *dropped: Served) -> None:
        """Answer for collections no more: end their writers, then their readers."""
        others = (self._other(served) for served in dropped)
        dropped = (*dropped, *(other for other in others if other is not None))
        for served in dropped:
            self._unindex(served)
            self._beside.pop(served.collection.uid, None)
        for served in dropped:
            for tell in self.on_drop:
                await tell(served)
        await self.spread()
        for served in dropped:
            await _close(served)

    async def _review(self) -> None:
        """Open anew what cannot go on as it is, until that works."""
        pause_s = REVIEW_S
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    await self._hurried.wait()
            except TimeoutError:
                pass
            self._hurried.clear()
            try:
                async with self._changing:
                    await self._reopen()
                pause_s = REVIEW_S
            except Exception as error:
                known = isinstance(error, RingfortError | OSError)
                log.warning("collections cannot be opened anew now: %s", error, exc_info=not known)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _reopen(self) -> None:
        if self.log_id != self.store.log_id:
            log.warning("opening every collection anew, on log %s", self.store.log_id)
            await self._drop(*self.all())
            await self._load()
            await self.spread()
            for tell in self.on_load:
                await tell()
        failures: list[Exception] = []
        for served in self._open_ones():
            try:
                self._discard(served)
                failures += await self._attach(served)
                if served.outdated:
                    await self.turn(served, await self.store.shard_maps.get(served.collection))
                if served.wants_copies and not served.reconciling.locked():
                    await self.reconcile(served)
            except Exception as error:  # the others' copies can be opened all the same
                failures.append(error)
        if failures:
            raise failures[0]

    async def _open(self, collection: Collection) -> Served:
        served = Served(collection, await self.store.shard_maps.get(collection))
        try:
            failures = await self._attach(served)
            try:
                await self.reconcile(served)
            except RingfortError as error:
                if not served.wanted(HOME) <= {copy for copy, _ in served.copies()}:
                    raise
                failures.append(error)
            for failure in failures:
                log.warning("%s is opened in part: %s", collection.name, failure)
        except BaseException:
            await _close(served)
            raise
        return served

    async def _open_beside(self, collection: Collection) -> Served:
        live = self._by_uid.get(collection.uid)
        if live is None:
            raise NotFound("collection", collection.name)
        served = Served(collection, live.state)
        await self._attach(served)
        self._beside[collection.uid] = served
        self.hurry()
        return served

    def _open_ones(self) -> list[Served]:
        return [*self.all(), *self._beside.values()]

    def _other(self, served: Served) -> Served | None:
        """The generation beside the live one."""
        other = self._beside.get(served.collection.uid)
        return None if other is served else other

    async def _attach(self, served: Served) -> list[RingfortError]:
        """Learn of the logs that are not known and can be; why not of others, the home's excepted: raised."""
        failures: list[RingfortError] = []
        for its_log in list(served.logs.values()):
            if its_log.log_id or not self.store.log_id_of(its_log.database):
                continue
            try:
                its_log.attach(*await self.store.attach(served.collection, its_log.database))
            except RingfortError as error:
                if its_log.database == HOME:
                    raise
                failures.append(error)
        return failures

    def _discard(self, served: Served) -> None:
        """Follow no log any more that its database has exchanged; the review attaches the new one."""
        for its_log in list(served.logs.values()):
            if its_log.log_id and its_log.log_id != self.store.log_id_of(its_log.database):
                log.warning(
                    "database %s holds another log of %s than before",
                    its_log.database,
                    served.collection.name,
                )
                served.discard(its_log.database)
                self.hurry()

    async def _join(self, served: Served, copy: Copy) -> None:
        """Open a copy, and let it be asked as soon as it has everything that is known of the log."""
        state, its_log = served.state, served.logs[copy.database]
        replica = await self._shards.open(
            served.collection, copy.shard, copy.replica, database=copy.database,
            slots=served.slots_of(copy), epoch=state.epoch, log_id=its_log.log_id,
        )  # fmt: skip
        its_log.joining.add(replica)
        try:
            deadline = Deadline.after(JOIN_S)
            while served.logs[copy.database] is its_log:
                state, position = served.state, its_log.position
                await replica.backfill(served.slots_of(copy))
                replica.wake()
                if not await replica.wait_for(position, deadline):
                    raise Unavailable(f"shard {copy.shard} of {served.collection.name} cannot catch up")
                if served.state is state and its_log.position <= max(position, replica.position):
                    await served.settle(replica, copy)
                    if served.logs[copy.database] is its_log:
                        served.join(copy, replica)
                        return
            raise Unavailable(f"database {copy.database} holds another log than before")
        except BaseException:
            await replica.close()
            raise
        finally:
            its_log.joining.discard(replica)


async def _close(served: Served) -> None:
    discarded, served.discarded = served.discarded, []
    await asyncio.gather(*(replica.close() for replica in (*discarded, *(its for _, its in served.copies()))))


async def _all_or_none(opening: Iterable[Awaitable[T]], close: Callable[[T], Awaitable[None]]) -> Sequence[T]:
    """What is opened side by side; where one fails the others are closed again, and it is raised."""
    results = await asyncio.gather(*opening, return_exceptions=True)
    opened = [result for result in results if not isinstance(result, BaseException)]
    failed = next((result for result in results if isinstance(result, BaseException)), None)
    if failed is not None:
        await asyncio.gather(*map(close, opened))
        raise failed
    return opened
