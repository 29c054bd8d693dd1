"""Group commit: writes that wait together share a transaction, in order of arrival.

While one transaction is under way the next batch gathers; nobody waits for a timer. Bounded in rows. A batch
of many rows would keep the event loop from searches for long: so batches are small, and what is larger is
committed in several.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.deadline import Deadline
from services.gateway.served import Served
from services.metadata.store import Store
from shard_router.errors import GenerationChanged, NotFound, Overloaded, RingfortError, StorageUnavailable
from shard_router.model import Write, WriteOutcome

log = logging.getLogger(__name__)

#: Rows of one transaction: two to three milliseconds of the event loop, in two pieces.
BATCH_ROWS = 512
#: Rows that may wait for one log; beyond it writers are refused.
QUEUE_ROWS = 32_768
#: A transaction has this long, whoever waits for it.
COMMIT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of one caller's writes: outcomes in order, and the position to wait for, by log."""

    outcomes: Sequence[WriteOutcome]
    positions: Mapping[str, int]
    #: Whether some were refused because another generation is to be written.
    late: bool = False


@dataclass(eq=False, slots=True)
class _Call:
    """One writer, who waits for all parts of what it submitted."""

    done: asyncio.Future[Committed]
    missing_parts: int
    outcomes: list[WriteOutcome] = field(default_factory=list)
    upto: int = 0
    late: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    call: _Call
    writes: Sequence[Write]


class Committer:
    """The one writer of a collection's log in one database."""

    def __init__(self, store: Store, served: Served, database: str) -> None:
        self._store = store
        self._served = served
        self._database = database
        self._waiting: deque[_Part] = deque()
        #: Rows in `_waiting`; at most QUEUE_ROWS.
        self._rows = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def submit(self, writes: Sequence[Write]) -> asyncio.Future[Committed]:
        """Queue writes behind everything submitted before; Overloaded when too many wait.

        If it fails, some of more than BATCH_ROWS writes may be committed all the same.
        """
        if self._closed:
            raise NotFound("collection", self._served.collection.name)
        if self._rows + len(writes) > QUEUE_ROWS:
            raise Overloaded("the collection's write queue", QUEUE_ROWS)
        done: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
        starts = range(0, len(writes), BATCH_ROWS)
        call = _Call(done, len(starts))
        self._waiting += [_Part(call, writes[start : start + BATCH_ROWS]) for start in starts]
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

    async def _commit(self, batch: list[_Part]) -> None:
        writes = [write for part in batch for write in part.writes]
        try:
            commit = await self._store.write(
                self._served.collection,
                writes,
                deadline=Deadline.after(COMMIT_TIMEOUT_S),
                database=self._database,
            )
        except BaseException as error:
            failure: BaseException = error
            if not isinstance(error, RingfortError):
                log.error("a write batch failed", exc_info=error)
                failure = StorageUnavailable("the write batch failed; the log has the reason")
            # It may be committed all the same; then the replicas find it in the log.
            self._served.look()
            for part in batch:
                if not part.call.done.done():
                    part.call.done.set_exception(failure)
                    part.call.done.exception()  # a caller who left must not turn it into a warning
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        await asyncio.sleep(0)  # applying is another piece of a millisecond
        try:
            self._served.committed(self._database, commit)
        except Exception:  # it is committed whatever becomes of it here, and its writers are told so
            log.exception("a committed batch could not be handed on; the log is read instead")
            self._served.look()
        at = 0
        for part in batch:
            call, outcomes = part.call, commit.outcomes[at : at + len(part.writes)]
            call.outcomes += outcomes
            call.upto = max(call.upto, commit.upto)
            if commit.delta is None:  # as after whatever did not go smoothly
                call.late |= any(isinstance(outcome.error, GenerationChanged) for outcome in outcomes)
            call.missing_parts -= 1
            at += len(part.writes)
            if not call.missing_parts and not call.done.done():
                call.done.set_result(Committed(call.outcomes, {commit.log_id: call.upto}, call.late))
