"""The collections as the head of the cluster serves them: what a further gateway answers for.

The head opens and closes copies, leads them over to other maps, and says which may be asked. What it says is
gone by at once, in the order in which it was said; copies that are new are asked once they have been reached.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
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
        #: By collection, the copies that may be asked, each with the number of its opening.
        self._wanted: dict[int, dict[Copy, int]] = {}
        #: By collection, those that are asked.
        self._asked: dict[int, dict[Copy, int]] = {}
        #: What ends behind the scenes: writers and connections of what has gone.
        self._ending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ask no copy any more."""
        for served in self.all():
            self._lose(served)
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)
        self._clear()

    def hear(self, told: internal.News) -> None:
        """Go by what the head says from now on; copies that are new are asked after `settle`."""
        for each in told.collections:
            if each.HasField("shape"):
                self._take(each.collection, each.shape)
        if told.whole:
            here = {each.collection for each in told.collections}
            for served in self.all():
                if served.collection.uid not in here:
                    self._lose(served)
        self.log_id = told.log_id

    @property
    def settled(self) -> bool:
        """Whether every copy that may be asked is."""
        return all(
            self._asked[uid] == wanted and not any(replica.fell.is_set() for _, replica in served.copies())
            for uid, wanted in self._wanted.items()
            if (served := self.of(uid)) is not None
        )

    async def settle(self) -> None:
        """Try to reach every copy that may be asked and is not yet; returns when each has been tried."""
        missing: list[tuple[Served, Copy]] = []
        for uid, wanted in self._wanted.items():
            served = self._by_uid[uid]
            for copy, replica in list(served.copies()):
                if replica.fell.is_set():
                    self._leave(served, copy)
            missing += [(served, copy) for copy in wanted if copy not in self._asked[uid]]
        await asyncio.gather(*(self._reach(served, copy) for served, copy in missing))

    def _take(self, uid: int, shape: internal.Shape) -> None:
        served = self.of(uid)
        if served is not None and served.logs[HOME].log_id != shape.logs[HOME]:
            self._lose(served)
            served = None
        collection, state = news.collection_of(shape), news.state_of(shape)
        if served is None:
            served = Served(collection, state)
            served.assure = self._assure(served)
            self._asked[uid] = {}
        else:
            if served.collection.aliases != collection.aliases:
                self._unindex(served)
            served.collection = collection
            served.follow(state)
        self._follow_logs(served, shape.logs)
        self._index(served)
        wanted = self._wanted[uid] = news.copies_of(shape)
        for copy, number in list(self._asked[uid].items()):
            if wanted.get(copy) != number:
                self._leave(served, copy)

    def _follow_logs(self, served: Served, logs: Mapping[str, str]) -> None:
        """Go by the logs that the head knows."""
        for database, log in list(served.logs.items()):
            if log.log_id == logs.get(database, ""):
                continue
            if log.log_id:
                for copy in [
                    copy for copy in self._asked[served.collection.uid] if copy.database == database
                ]:
                    self._leave(served, copy)
                served.discard(database)
            if database in logs:
                # What was written before is known by what the copies have.
                served.logs[database].attach(logs[database], 0)

    def _lose(self, served: Served) -> None:
        """Answer for a collection no more."""
        uid = served.collection.uid
        self._unindex(served)
        self._wanted.pop(uid, None)
        for copy in list(self._asked.get(uid, ())):
            self._leave(served, copy)
        self._asked.pop(uid, None)
        self._end(self._dropped(served), f"drop {served.collection.name}")

    async def _dropped(self, served: Served) -> None:
        for tell in self.on_drop:
            await tell(served)

    def _leave(self, served: Served, copy: Copy) -> None:
        del self._asked[served.collection.uid][copy]
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
        uid, deadline = served.collection.uid, Deadline.after(REACH_S)
        number, its_log = self._wanted[uid][copy], served.logs[copy.database]
        replica: ShardEndpoint | None = None
        try:
            replica = await self._shards.attach(
                served.collection, copy.shard, copy.replica, copy.database, deadline
            )
            while True:
                position = its_log.position
                if not await replica.wait_for(position, deadline):
                    raise Unavailable(f"it is behind position {position}")
                if self.of(uid) is not served or self._wanted[uid].get(copy) != number:
                    return  # it may not be asked any more
                if its_log.position <= max(position, replica.position):
                    served.join(copy, replica)
                    self._asked[uid][copy], replica = number, None
                    return
        except RingfortError as error:
            log.info("%s of %s cannot be asked yet: %s", copy, served.collection.name, error)
        finally:
            if replica is not None:
                await replica.close()
