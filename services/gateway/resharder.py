"""Carries out changes of shards and replicas, as jobs: one of a collection at a time.

What a job is doing is read off the stored map, so whoever starts the service again goes on from there.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import TypeVar

from services import tasks
from services.deadline import Deadline
from services.gateway.catalog import Catalog
from services.gateway.endpoints import ShardEndpoint
from services.gateway.served import Served
from services.metadata.jobs import JobRecord, JobState
from shard_router.errors import NotFound, PreconditionFailed, RingfortError, Unavailable
from shard_router.resharding import (
    Applied,
    AwaitApplied,
    Backfill,
    Backfilled,
    CancelAsked,
    Copy,
    Event,
    Finish,
    Heard,
    Instruction,
    Joined,
    Left,
    Overtaken,
    PositionRead,
    ReadPosition,
    Resharding,
    Store,
    Stored,
    Tell,
)
from shard_router.shard_map import MapState, Migrating, Steady

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Pauses between attempts at what did not work, and how long a copy is waited for before it is asked again.
FIRST_PAUSE_S, LONGEST_PAUSE_S, APPLY_S = 0.05, 2.0, 10.0
#: A job that is watched tells of its progress this often at most.
WATCH_S = 0.1


class Kind(StrEnum):
    """What a job does."""

    ADD_SHARD = "add-shard"
    DRAIN_SHARD = "drain-shard"
    SET_REPLICAS = "set-replicas"


class Job:
    """A job that is being carried out, or has been."""

    def __init__(self, record: JobRecord, served: Served) -> None:
        self.record = record
        self.served = served
        self.done, self.total = 0, 1
        self.message = record.message
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


class Resharder:
    """Adds and drains shards, and changes the number of replicas, while everything is served."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._store = catalog.store
        #: By collection, the job that runs.
        self._running: dict[int, tuple[Job, asyncio.Task[None]]] = {}

    async def open(self) -> None:
        """Go on with what was running when the service stopped."""
        await self._resume()
        self._catalog.on_drop.append(self._stop)
        self._catalog.on_load.append(self._resume)

    async def close(self) -> None:
        """Stop; the jobs go on when the service is started again."""
        await tasks.end(*(task for _, task in self._running.values()))

    async def add_shard(self, served: Served) -> Job:
        """Give a collection one shard more; PreconditionFailed while another of its jobs runs."""
        shard = max(served.state.shards) + 1
        _added(served.state, shard)
        return await self._begin(served, Kind.ADD_SHARD, shard)

    async def drain_shard(self, served: Served, shard: int) -> Job:
        """Move a shard's slots to the others, and close it; NotFound, PreconditionFailed."""
        _drained(served.state, shard)
        return await self._begin(served, Kind.DRAIN_SHARD, shard)

    async def set_replicas(self, served: Served, replicas: int) -> Job:
        """Give every shard of a collection so many copies; PreconditionFailed as of `add_shard`."""
        return await self._begin(served, Kind.SET_REPLICAS, replicas)

    async def jobs(self, of: Sequence[Served]) -> list[Job]:
        """The jobs of these collections, the latest first."""
        by_uid = {served.collection.uid: served for served in of}
        return [self._job(record, by_uid) for record in await self._store.jobs.all(list(by_uid))]

    async def job(self, of: Sequence[Served], id: str) -> Job:
        """One of them; NotFound."""
        for job in await self.jobs(of):
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
            if record.collection_uid in by_uid and record.collection_uid not in self._running:
                log.info("going on with job %s: %s %d", record.id, record.kind, record.argument)
                self._start(Job(record, by_uid[record.collection_uid]))

    async def _begin(self, served: Served, kind: Kind, argument: int) -> Job:
        job = Job(await self._store.jobs.begin(served.collection, kind, argument), served)
        self._start(job)
        return job

    def _start(self, job: Job) -> None:
        uid = job.record.collection_uid
        task = asyncio.create_task(self._run(job), name=f"job {job.record.kind} {job.record.id}")
        self._running[uid] = job, task
        task.add_done_callback(lambda _: self._running.pop(uid, None))

    async def _stop(self, served: Served) -> None:
        running = self._running.get(served.collection.uid)
        if running is not None:
            await tasks.end(running[1])

    async def _run(self, job: Job) -> None:
        name, state = job.served.collection.name, JobState.FAILED
        try:
            moved = await self._carry_out(job)
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
        record = await _until_done(lambda: self._store.jobs.end(job.record.id, state, message))
        job.record = record or job.record
        job.tell(job.total, job.total, message)
        log.info("job %s of %s: %s %s", job.record.kind, name, state, message)

    async def _carry_out(self, job: Job) -> bool:
        """Whether it was done, and not cancelled."""
        served, argument = job.served, job.record.argument
        if job.record.kind == Kind.SET_REPLICAS:
            return await self._set_replicas(job, served, argument)
        state = served.state
        if isinstance(state, Steady):
            adds = job.record.kind == Kind.ADD_SHARD
            if adds == (argument in state.shards):
                return True  # it was done already
            target = _added(state, argument) if adds else _drained(state, argument)
            machine, first = Resharding.begin(target, _copies(served), tuple(served.logs))
        else:
            machine, first = Resharding.resume(state, _copies(served), tuple(served.logs))
        return await _Change(self._catalog, served, machine, job).run(first)

    async def _set_replicas(self, job: Job, served: Served, replicas: int) -> bool:
        unwanted = asyncio.Event()
        job.cancel = unwanted.set
        served.growing_to = replicas
        try:
            while served.wants_copies:
                here = sum(1 for _ in served.copies())
                job.tell(here, len(served.wanted()), "opening copies")
                opening = asyncio.ensure_future(_quietly(self._catalog.reconcile(served)))
                stopping = asyncio.ensure_future(unwanted.wait())
                try:
                    await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await tasks.end(opening, stopping)
                if unwanted.is_set():
                    return False
                await asyncio.sleep(FIRST_PAUSE_S)
            job.cancel = None
            await _until_done(lambda: self._store.shard_maps.set_replicas(served.collection, replicas))
            served.collection = replace(served.collection, replicas=replicas)
        finally:
            served.growing_to = 0
            await _quietly(self._catalog.reconcile(served))
        await self._catalog.spread()
        return True


class _Change:
    """One resharding, carried out: what the machine says is done, and what comes of it told to it."""

    def __init__(self, catalog: Catalog, served: Served, machine: Resharding, job: Job) -> None:
        self._catalog, self._served, self._machine, self._job = catalog, served, machine, job
        #: A few for every copy at most: each is the answer to an instruction, or a copy's coming or going.
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._doing: set[asyncio.Task[None]] = set()

    async def run(self, instructions: Sequence[Instruction]) -> bool:
        """Whether the slots have moved."""
        self._served.on_copy.append(self._copy_changed)
        self._job.cancel = self._cancel
        try:
            finished = self._begin(instructions)
            while finished is None:
                event = await self._events.get()
                finished = self._begin(self._machine.handle(event))
            return finished.moved
        finally:
            self._job.cancel = None
            self._served.on_copy.remove(self._copy_changed)
            await tasks.end(*self._doing)

    def _cancel(self) -> None:
        self._begin(self._machine.handle(CancelAsked()))

    def _begin(self, instructions: Sequence[Instruction]) -> Finish | None:
        done, total = self._machine.progress
        self._job.tell(done, total, f"epoch {self._machine.state.epoch}: {self._machine.stage}")
        for instruction in instructions:
            if isinstance(instruction, Finish):
                return instruction
            task = asyncio.create_task(self._carry_out(instruction), name=f"{type(instruction).__name__}")
            self._doing.add(task)
            task.add_done_callback(self._doing.discard)
        return None

    def _copy_changed(self, copy: Copy, here: bool) -> None:
        self._events.put_nowait(Joined(copy) if here else Left(copy))

    async def _carry_out(self, instruction: Instruction) -> None:
        event = await _until_done(lambda: self._do(instruction))
        if event is not None:
            self._events.put_nowait(event)

    async def _do(self, instruction: Instruction) -> Event | None:
        """What comes of it; None where it is of no meaning any more."""
        served, store = self._served, self._catalog.store
        match instruction:
            case Store(state):
                stored = await store.shard_maps.put(served.collection, state)
                return Stored() if stored == state else Overtaken(stored)
            case Tell(state):
                await self._catalog.turn(served, state)
                await _quietly(self._catalog.reconcile(served))
                await self._catalog.spread()
                return Heard(state.epoch)
            case Backfill(copy, slots):
                if (replica := self._replica(copy)) is None:
                    return None
                await replica.backfill(served.logs[copy.database].own(slots))
                return Backfilled(copy)
            case ReadPosition():
                return PositionRead(await store.positions(served.collection))
            case AwaitApplied(copy, position):
                if (replica := self._replica(copy)) is None:
                    return None
                replica.wake()
                if not await replica.wait_for(position, Deadline.after(APPLY_S)):
                    raise Unavailable(f"a copy of shard {copy.shard} is behind position {position}")
                return Applied(copy, position)
        raise AssertionError(f"{instruction} is not carried out here")

    def _replica(self, copy: Copy) -> ShardEndpoint | None:
        return self._served.logs[copy.database].up(copy.shard).get(copy.replica)


def _copies(served: Served) -> list[Copy]:
    return [copy for copy, _ in served.copies()]


def _added(state: MapState, shard: int) -> Migrating:
    return _require_steady(state).migrate(lambda shard_map: shard_map.add_shard(shard))


def _drained(state: MapState, shard: int) -> Migrating:
    return _require_steady(state).migrate(lambda shard_map: shard_map.drain_shard(shard))


def _require_steady(state: MapState) -> Steady:
    if not isinstance(state, Steady):
        raise PreconditionFailed("the collection's shards are being changed already")
    return state


async def _until_done(work: Callable[[], Awaitable[T]]) -> T:
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


async def _quietly(opening: Awaitable[None]) -> None:
    """Copies that cannot be opened now are opened by the catalog's review."""
    try:
        await opening
    except (RingfortError, OSError) as error:
        log.warning("a copy cannot be opened now: %s", error)
