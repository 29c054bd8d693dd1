"""The collections as the head of the cluster serves them: what a further gateway answers for.

The head opens and closes copies, leads them over to other maps, and says which may be asked. What it says is
gone by at once, in the order in which it was said; copies that are new are asked once they have been reached.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from protos.ringfort.internal import v1 as internal
from services.deadline import Deadline
from services.gateway import news
from services.gateway.directory import Directory
from services.gateway.endpoints import ShardEndpoint
from services.gateway.remote_shards import RemoteShards
from services.gateway.served import Assure, Served
from services.metadata.store import Store
from shard_router.errors import RingfortError, Unavailable
from shard_router.model import HOME
from shard_router.resharding import Copy

log = logging.getLogger(__name__)

#: How long a copy that is new is tried to be reached, before it is tried again.
REACH_S = 1.0


class Mirror(Directory):
    """Every collection that the head told of; names and aliases resolve here."""

    def __init__(self, store: Store, shards: RemoteShards, assure: Callable[[Served], Assure]) -> None:
        """`assure` makes what a collection is asked about before its copies are; see Served."""
        super().__init__(store)
        self.shared = True
        self._shards = shards
        self._assure = assure
        #: Of every generation, the copies that may be asked, each with the number of its opening.
        self._wanted: dict[Served, dict[Copy, int]] = {}
        #: Those that are asked.
        self._asked: dict[Served, dict[Copy, int]] = {}
        #: What ends behind the scenes: writers and connections of what has gone.
        self._ending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ask no copy any more."""
        for served in list(self._wanted):
            self._lose(served)
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)
        self._clear()

    def hear(self, told: internal.News) -> None:
        """Go by what the head says from now on; copies that are new are asked after `settle`."""
        for each in told.collections:
            if each.HasField("shape"):
                self._take(each)
        if told.whole:
            here = {each.collection for each in told.collections}
            for served in list(self._wanted):
                if served.collection.uid not in here:
                    self._lose(served)
        self.log_id = told.log_id

    @property
    def settled(self) -> bool:
        """Whether every copy that may be asked is."""
        return all(
            self._asked[served] == wanted and not any(replica.fell.is_set() for _, replica in served.copies())
            for served, wanted in self._wanted.items()
        )

    async def settle(self) -> None:
        """Try to reach every copy that may be asked and is not yet; returns when each has been tried."""
        missing: list[tuple[Served, Copy]] = []
        for served, wanted in self._wanted.items():
            for copy, replica in list(served.copies()):
                if replica.fell.is_set():
                    self._leave(served, copy)
            missing += [(served, copy) for copy in wanted if copy not in self._asked[served]]
        await asyncio.gather(*(self._reach(served, copy) for served, copy in missing))

    def _take(self, told: internal.CollectionNews) -> None:
        """A collection is so now, and so is the generation beside the live one."""
        uid = told.collection
        before = {each for each in (self.of(uid), self.beside(uid)) if each is not None}
        for served in list(before):
            if served.logs[HOME].log_id != told.shape.logs[HOME]:
                before.discard(served)
                self._lose(served)
        was = self.of(uid)
        live = self._shaped(told.shape, before)
        beside = self._shaped(told.beside, before) if told.HasField("beside") else None
        if was is not None and was is not live:
            # What was written to the one that was is in the one that is.
            live.heard(was.positions)
            self._unindex(was)
        self._beside.pop(uid, None)
        if beside is not None:
            self._beside[uid] = beside
        self._index(live)
        for served in before - {live, beside}:
            self._lose(served)

    def _shaped(self, shape: internal.Shape, known: Iterable[Served]) -> Served:
        """A generation, as it is told of: one of those that are known, or another."""
        collection, state = news.collection_of(shape), news.state_of(shape)
        served = next((each for each in known if each.collection.generation == collection.generation), None)
        if served is None:
            served = Served(collection, state)
            served.assure = self._assure(served)
            self._asked[served] = {}
        else:
            if served.collection.aliases != collection.aliases:
                self._unindex(served)
            served.collection = collection
            served.follow(state)
        self._follow_logs(served, shape.logs)
        wanted = self._wanted[served] = news.copies_of(shape)
        for copy, number in list(self._asked[served].items()):
            if wanted.get(copy) != number:
                self._leave(served, copy)
        return served

    def _follow_logs(self, served: Served, logs: Mapping[str, str]) -> None:
        """Go by the logs that the head knows."""
        for database, log in list(served.logs.items()):
            if log.log_id == logs.get(database, ""):
                continue
            if log.log_id:
                for copy in [copy for copy in self._asked[served] if copy.database == database]:
                    self._leave(served, copy)
                served.discard(database)
            if database in logs:
                # What was written before is known by what the copies have.
                served.logs[database].attach(logs[database], 0)

    def _lose(self, served: Served) -> None:
        """Answer for a collection no more."""
        uid = served.collection.uid
        if self._beside.get(uid) is served:
            del self._beside[uid]
        if self.of(uid) is served:
            self._unindex(served)
        self._wanted.pop(served, None)
        for copy in list(self._asked.get(served, ())):
            self._leave(served, copy)
        self._asked.pop(served, None)
        self._end(self._dropped(served), f"drop {served.collection.name}")

    async def _dropped(self, served: Served) -> None:
        for tell in self.on_drop:
            await tell(served)

    def _leave(self, served: Served, copy: Copy) -> None:
        del self._asked[served][copy]
        self._end(served.leave(copy).close(), f"leave {copy}")

    def _end(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    async def _reach(self, served: Served, copy: Copy) -> None:
        """Ask a copy from now on, once it has all that was committed here."""
        deadline = Deadline.after(REACH_S)
        number, its_log = self._wanted[served][copy], served.logs[copy.database]
        replica: ShardEndpoint | None = None
        try:
            replica = await self._shards.attach(
                served.collection, copy.shard, copy.replica, copy.database, deadline
            )
            while True:
                position = its_log.position
                if not await replica.wait_for(position, deadline):
                    raise Unavailable(f"it is behind position {position}")
                if self._wanted.get(served, {}).get(copy) != number:
                    return  # it may not be asked any more
                if its_log.position <= max(position, replica.position):
                    served.join(copy, replica)
                    self._asked[served][copy], replica = number, None
                    return
        except RingfortError as error:
            log.info("%s of %s cannot be asked yet: %s", copy, served.collection.name, error)
        finally:
            if replica is not None:
                await replica.close()
