"""Long operations of collections, as jobs: one of a collection at a time.

Whoever starts the service again goes on with those that were running.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import TypeVar

from services import tasks
from services.deadline import Deadline
from services.gateway.catalog import Catalog
from services.gateway.served import Served
from services.metadata.jobs import JobRecord, JobState
from shard_router.errors import NotFound, PreconditionFailed, RingfortError

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Pauses between attempts at what did not work.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
#: A job that is watched tells of its progress this often at most.
WATCH_S = 0.1


class Kind(StrEnum):
    """What a job does."""

    ADD_SHARD = "add-shard"
    DRAIN_SHARD = "drain-shard"
    SET_REPLICAS = "set-replicas"
    REINDEX = "reindex"
    ACTIVATE = "activate"


#: Carries a job out: whether it was done, and not cancelled. PreconditionFailed says why it failed.
Work = Callable[["Job"], Awaitable[bool]]


class Job:
    """A job that is being carried out, or has been."""

    def __init__(self, record: JobRecord, served: Served) -> None:
        self.record = record
        self.served = served
        self.done, self.total = 0, 1
        self.message = record.message
        #: What it has found out, by name.
        self.figures: Mapping[str, float] = record.figures
        #: Asks what it is doing to end early; raises PreconditionFailed where it cannot.
        self.cancel: Callable[[], None] | None = None
        self._changed = asyncio.Event()

    def tell(self, done: int, total: int, message: str) -> None:
        """It has come so far."""
        self.done, self.total, self.message = done, total, message
        self._changed.set()

    async def change(self) -> None:
        """Return once something has changed since this was last awaited."""
        await self._changed.wait()
        self._changed.clear()


class Jobs:
    """Runs jobs, and tells of them."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._works: dict[str, Work] = {}
        #: By collection, the job that runs.
        self._running: dict[int, tuple[Job, asyncio.Task[None]]] = {}

    def carry_out(self, work: Work, *kinds: Kind) -> None:
        """Jobs of these kinds are carried out so."""
        self._works |= dict.fromkeys(kinds, work)

    async def open(self) -> None:
        """Go on with what was running when the service stopped."""
        await self._resume()
        self._catalog.on_drop.append(self._stop)
        self._catalog.on_load.append(self._resume)

    async def close(self) -> None:
        """Stop; the jobs go on when the service is started again."""
        await tasks.end(*(task for _, task in self._running.values()))

    async def begin(self, served: Served, kind: Kind, argument: int) -> Job:
        """A new job; PreconditionFailed while another of the collection runs."""
        job = Job(await self._store.jobs.begin(served.collection, kind, argument), served)
        self._start(job)
        return job

    def running(self, served: Served) -> Job | None:
        """The collection's job that runs."""
        found = self._running.get(served.collection.uid)
        return None if found is None else found[0]

    async def all(self, of: Sequence[Served]) -> list[Job]:
        """The jobs of these collections, the latest first."""
        by_uid = {served.collection.uid: served for served in of}
        return [self._job(record, by_uid) for record in await self._store.jobs.all(list(by_uid))]

    async def job(self, of: Sequence[Served], id: str) -> Job:
        """One of them; NotFound."""
        for job in await self.all(of):
            if job.record.id == id:
                return job
        raise NotFound("job", id, "id")

    async def watch(self, of: Sequence[Served], id: str) -> AsyncIterator[Job]:
        """A job as it goes on, until it has ended; NotFound."""
        while True:
            job = await self.job(of, id)
            yield job
            if job.record.state is not JobState.RUNNING:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await job.change()
            await asyncio.sleep(WATCH_S)

    async def ended(self, job: Job, deadline: Deadline) -> Job:
        """A job once it has ended, or the deadline has passed."""
        running = self._running.get(job.record.collection_uid)
        if running is not None and running[0] is job:
            await asyncio.wait([running[1]], timeout=max(0.0, deadline.left_s()))
        return job

    async def cancel(self, of: Sequence[Served], id: str, deadline: Deadline) -> Job:
        """Undo a job that runs; returns when that is done. NotFound, PreconditionFailed if it is too late."""
        job = await self.job(of, id)
        running = self._running.get(job.record.collection_uid)
        if running is None or running[0] is not job or job.cancel is None:
            raise PreconditionFailed(f"job {id} is not running")
        job.cancel()
        await asyncio.wait([running[1]], timeout=max(0.0, deadline.left_s()))
        return await self.job(of, id)

    def _job(self, record: JobRecord, served: dict[int, Served]) -> Job:
        running = self._running.get(record.collection_uid)
        if running is not None and running[0].record.id == record.id:
            running[0].record = record
            return running[0]
        job = Job(record, served[record.collection_uid])
        if record.state is JobState.SUCCEEDED:
            job.done = 1
        return job

    async def _resume(self) -> None:
        by_uid = {served.collection.uid: served for served in self._catalog.all()}
        for record in await self._store.jobs.running():
            if record.kind not in self._works:
                log.error("job %s: nobody here knows how to %s", record.id, record.kind)
                continue
            if record.collection_uid in by_uid and record.collection_uid not in self._running:
                log.info("going on with job %s: %s %d", record.id, record.kind, record.argument)
                self._start(Job(record, by_uid[record.collection_uid]))

    def _start(self, job: Job) -> None:
        uid = job.record.collection_uid
        task = asyncio.create_task(self._run(job), name=f"job {job.record.kind} {job.record.id}")
        self._running[uid] = job, task
        task.add_done_callback(lambda _: self._running.pop(uid, None))

    async def _stop(self, served: Served) -> None:
        running = self._running.get(served.collection.uid)
        # What goes may be another generation than the live one, and a job's own.
        if running is not None and self._catalog.of(served.collection.uid) is None:
            await tasks.end(running[1])

    async def _run(self, job: Job) -> None:
        name, state = job.served.collection.name, JobState.FAILED
        try:
            moved = await self._works[job.record.kind](job)
            state = JobState.SUCCEEDED if moved else JobState.CANCELLED
            message = ""
        except NotFound as gone:
            log.info("job %s of %s ends: %s", job.record.kind, name, gone)
            return
        except PreconditionFailed as error:
            message = str(error)
        except Exception:
            log.exception("job %s of %s failed", job.record.kind, name)
            message = "it failed; the log has the reason"
        record = await until_done(lambda: self._store.jobs.end(job.record.id, state, message, job.figures))
        job.record = record or job.record
        job.tell(job.total, job.total, message)
        log.info("job %s of %s: %s %s", job.record.kind, name, state, message)


async def until_done(work: Callable[[], Awaitable[T]]) -> T:
    """Do it again and again, with longer pauses, until nothing is unavailable any more."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await work()
        except (NotFound, PreconditionFailed):
            raise
        except (RingfortError, OSError) as error:
            log.warning("tried again in %g s: %s", pause_s, error)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
