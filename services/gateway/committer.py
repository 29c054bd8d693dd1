"""Group commit: writes that wait together share a transaction, in order of arrival.

While one transaction is under way the next batch gathers; nobody waits for a timer. Bounded in rows.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.deadline import Deadline
from services.gateway.catalog import Served
from services.metadata.store import Store
from shard_router.errors import NotFound, Overloaded, RingfortError, StorageUnavailable
from shard_router.model import Write, WriteOutcome

log = logging.getLogger(__name__)

#: Rows of one transaction.
BATCH_ROWS = 2_048
#: Rows that may wait for one collection; beyond it writers are refused.
QUEUE_ROWS = 32_768
#: A transaction has this long, whoever waits for it.
COMMIT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Committed:
    """One writer's share of a batch: its outcomes in order, and the position to wait for."""

    outcomes: Sequence[WriteOutcome]
    upto: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    writes: Sequence[Write]
    done: asyncio.Future[Committed]


class Committer:
    """The one writer of one collection's log."""

    def __init__(self, store: Store, served: Served) -> None:
        self._store = store
        self._served = served
        self._waiting: deque[_Waiting] = deque()
        #: Rows in `_waiting`; at most QUEUE_ROWS.
        self._rows = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def submit(self, writes: Sequence[Write]) -> asyncio.Future[Committed]:
        """Queue writes behind everything submitted before; Overloaded when too many wait."""
        if self._closed:
            raise NotFound("collection", self._served.collection.name)
        if self._rows + len(writes) > QUEUE_ROWS:
            raise Overloaded("the collection's write queue", QUEUE_ROWS)
        done: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(writes, done))
        self._rows += len(writes)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return done

    async def close(self) -> None:
        """Refuse what is new, commit what waits."""
        self._closed = True
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft()]
                rows = len(batch[0].writes)
                while self._waiting and rows + len(self._waiting[0].writes) <= BATCH_ROWS:
                    batch.append(self._waiting.popleft())
                    rows += len(batch[-1].writes)
                self._rows -= rows
                await self._commit(batch)
        finally:
            self._task = None

    async def _commit(self, batch: list[_Waiting]) -> None:
        writes = [write for waiting in batch for write in waiting.writes]
        try:
            commit = await self._store.write(
                self._served.collection, writes, deadline=Deadline.after(COMMIT_TIMEOUT_S)
            )
        except BaseException as error:
            failure: BaseException = error
            if not isinstance(error, RingfortError):
                log.error("a write batch failed", exc_info=error)
                failure = StorageUnavailable("the write batch failed; the log has the reason")
            # It may be committed all the same; then the replicas find it in the log.
            self._served.look()
            for waiting in batch:
                if not waiting.done.done():
                    waiting.done.set_exception(failure)
                    waiting.done.exception()  # a caller who left must not turn it into a warning
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        self._served.committed(commit.upto, commit.delta, commit.epoch)
        at = 0
        for waiting in batch:
            outcomes = commit.outcomes[at : at + len(waiting.writes)]
            at += len(waiting.writes)
            if not waiting.done.done():
                waiting.done.set_result(Committed(outcomes, commit.upto))
