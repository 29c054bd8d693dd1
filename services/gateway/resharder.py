"""Carries out changes of shards and replicas, as jobs.

What a job is doing is read off the stored map, so whoever starts the service again goes on from there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Sequence

from services import tasks
from services.deadline import Deadline
from services.gateway.catalog import Catalog
from services.gateway.endpoints import ShardEndpoint
from services.gateway.jobs import FIRST_PAUSE_S, Job, Jobs, Kind, until_done
from services.gateway.served import Served
from shard_router.errors import PreconditionFailed, RingfortError, Unavailable
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

#: How long a copy is waited for before it is asked again.
APPLY_S = 10.0


class Resharder:
    """Adds and drains shards, and changes the number of replicas, while everything is served."""

    def __init__(self, catalog: Catalog, jobs: Jobs) -> None:
        self._catalog, self._jobs = catalog, jobs
        self._store = catalog.store
        jobs.carry_out(self._carry_out, Kind.ADD_SHARD, Kind.DRAIN_SHARD)
        jobs.carry_out(self._set_replicas, Kind.SET_REPLICAS)

    async def add_shard(self, served: Served) -> Job:
        """Give a collection one shard more; PreconditionFailed while another of its jobs runs."""
        shard = max(served.state.shards) + 1
        _added(served.state, shard)
        return await self._jobs.begin(served, Kind.ADD_SHARD, shard)

    async def drain_shard(self, served: Served, shard: int) -> Job:
        """Move a shard's slots to the others, and close it; NotFound, PreconditionFailed."""
        _drained(served.state, shard)
        return await self._jobs.begin(served, Kind.DRAIN_SHARD, shard)

    async def set_replicas(self, served: Served, replicas: int) -> Job:
        """Give every shard of a collection so many copies; PreconditionFailed as of `add_shard`."""
        return await self._jobs.begin(served, Kind.SET_REPLICAS, replicas)

    async def _carry_out(self, job: Job) -> bool:
        """Whether it was done, and not cancelled."""
        served, argument = job.served, job.record.argument
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

    async def _set_replicas(self, job: Job) -> bool:
        served, replicas = job.served, job.record.argument
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
            await until_done(lambda: self._store.shard_maps.set_replicas(served.collection, replicas))
            self._catalog.change(served, replicas=replicas)
        finally:
            served.growing_to = 0
            await _quietly(self._catalog.reconcile(served))
        self._catalog.hurry()
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
        event = await until_done(lambda: self._do(instruction))
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


async def _quietly(opening: Awaitable[None]) -> None:
    """Copies that cannot be opened now are opened by the catalog's review."""
    try:
        await opening
    except (RingfortError, OSError) as error:
        log.warning("a copy cannot be opened now: %s", error)
