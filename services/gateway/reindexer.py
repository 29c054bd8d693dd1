"""Another generation of a collection: built beside the live one, made the live one, and taken back.

`reindex` builds it as a job; `activate` and `rollback` exchange it with the live one, as a job too, so that
whoever starts the service again brings that to its end. The one that was live goes on following the log.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from services import tasks
from services.deadline import Deadline
from services.gateway.backfill import Backfill
from services.gateway.catalog import Catalog
from services.gateway.comparison import Comparison
from services.gateway.jobs import FIRST_PAUSE_S, Job, Jobs, Kind, until_done
from services.gateway.models import Models, require_dimension, space_at
from services.gateway.served import Served
from services.metadata.generations import Generation, GenerationState
from services.metadata.jobs import JobState
from shard_router.errors import (
    InvalidField,
    NotFound,
    PreconditionFailed,
    RingfortError,
    Unavailable,
)
from shard_router.model import Collection

log = logging.getLogger(__name__)

#: How often a job tells how far it is.
TELL_S = 0.2
#: What copies on nodes say of themselves is not older than this.
FRESH_S = 0.75
#: Positions that a generation may be behind when writes are closed for it.
LAG_POSITIONS = 256
#: How long an activation waits for it to come so near, and writes for the rest.
NEAR_S, CLOSED_S = 600.0, 10.0
#: How long the answers that are asked for most may take to be computed in advance.
WARM_S = 5.0

Warm = Callable[[Served, Deadline], Awaitable[None]]


class Reindexer:
    """Builds generations, and exchanges them."""

    def __init__(self, catalog: Catalog, jobs: Jobs, models: Models, comparison: Comparison) -> None:
        self._catalog, self._jobs, self._models, self._comparison = catalog, jobs, models, comparison
        self._store = catalog.store
        #: By collection, what makes the vectors of its other generation.
        self._backfills: dict[int, Backfill] = {}
        #: One generation is begun at a time.
        self._beginning = asyncio.Lock()
        #: Computes the answers that are asked for most, of a generation that is about to be the live one.
        self.warm: Warm | None = None
        jobs.carry_out(self._build, Kind.REINDEX)
        jobs.carry_out(self._exchange, Kind.ACTIVATE)

    async def open(self) -> None:
        """Go on making vectors; before jobs are gone on with."""
        await self._resume()
        self._catalog.on_drop.append(self._stop)
        self._catalog.on_load.append(self._resume)

    async def close(self) -> None:
        """Stop; it is gone on with when the service is started again."""
        backfills, self._backfills = self._backfills, {}
        await asyncio.gather(*(each.close() for each in backfills.values()))

    async def reindex(self, served: Served, model: str, index: str) -> Job:
        """Build a generation beside the live one, by a model (NAME@VERSION) and an index; "" keeps either.

        Whatever other generation there was is given up. NotFound for a model; PreconditionFailed while
        another job runs, and where documents have no text that the model could read.
        """
        wanted = self._wanted(served, model, index)
        if wanted.space != served.collection.space:
            textless = await self._store.generations.textless(served.collection)
            if textless:
                raise PreconditionFailed(
                    f"{textless} documents of {served.collection.name!r} came as bare vectors, and have no "
                    "text that another model could read"
                )
        async with self._beginning:
            if self._jobs.running(served) is not None:
                raise PreconditionFailed(f"another job of collection {served.collection.name} is running")
            await self._give_up(served)
            made = await self._store.generations.begin(wanted)
            try:
                await self._open_beside(made)
                return await self._jobs.begin(served, Kind.REINDEX, made.generation)
            except BaseException:
                await self._give_up(served)
                raise

    async def activate(self, served: Served, number: int, deadline: Deadline) -> Served:
        """Make a built generation the live one (0: the one there is); returns that.

        PreconditionFailed where it is not complete, or cannot catch up; then nothing has changed.
        """
        if served.collection.generation == number:
            return served
        there = await self._beside(served)
        if there is None or number not in (0, there.collection.generation):
            raise NotFound("generation", str(number or "another than the live one"), "generation")
        return await self._begin_exchange(served, there, deadline)

    async def rollback(self, served: Served, deadline: Deadline) -> Served:
        """Make live again what was so before; PreconditionFailed where that is not kept."""
        there = await self._beside(served)
        if there is None or there.state is not GenerationState.PREVIOUS:
            raise PreconditionFailed(
                f"collection {served.collection.name!r} keeps no generation that was live before"
            )
        return await self._begin_exchange(served, there, deadline)

    def lag_positions(self, uid: int) -> int:
        """How many positions a collection's other generation is behind its log."""
        backfill = self._backfills.get(uid)
        if backfill is None:
            return 0
        done, end = backfill.progress
        return end - done

    def stats(self) -> dict[str, float]:
        """Generations beside live ones, and how far they are behind."""
        return {
            "backfills": float(len(self._backfills)),
            "backfilled_documents_total": float(sum(each.documents for each in self._backfills.values())),
            "lag_positions": float(sum(map(self.lag_positions, self._backfills))),
        }

    def _wanted(self, served: Served, model: str, index: str) -> Collection:
        collection = served.collection
        wanted = replace(collection, index=index or collection.index)
        if not model or model == collection.model:
            return wanted
        manifest = self._models.resolve(model)
        if manifest.image is not None:
            raise InvalidField("model", f"{manifest.model} reads images, and documents are texts")
        if collection.model is None:
            raise PreconditionFailed(
                f"collection {collection.name!r} has no model: its documents bring their vectors"
            )
        dim = require_dimension(manifest, 0, "model")
        return replace(wanted, model=manifest.model, dim=dim, space=space_at(manifest, dim))

    async def _beside(self, served: Served) -> Generation | None:
        found = await self._store.generations.beside([served.collection])
        return found[0] if found else None

    async def _begin_exchange(self, served: Served, there: Generation, deadline: Deadline) -> Served:
        if there.state is GenerationState.BUILDING:
            raise PreconditionFailed(f"generation {there.collection.generation} is being built")
        job = await self._jobs.begin(served, Kind.ACTIVATE, there.collection.generation)
        await self._jobs.ended(job, deadline)
        if job.record.state is JobState.FAILED:
            raise PreconditionFailed(job.message)
        live = self._catalog.of(served.collection.uid)
        if live is None or live.collection.generation != there.collection.generation:
            raise Unavailable(f"job {job.record.id} goes on making it the live one")
        return live

    async def _resume(self) -> None:
        running = await self._store.jobs.running()
        known = {record.collection_uid for record in running if record.kind == Kind.REINDEX}
        for there in await self._store.generations.beside([each.collection for each in self._catalog.all()]):
            uid = there.collection.uid
            served = self._catalog.of(uid)
            if served is None:
                continue
            if there.state is GenerationState.BUILDING and uid not in known:
                # The service ended before its job was written down.
                await self._give_up(served)
                continue
            self._fill(there.collection.uid)

    def _fill(self, uid: int) -> Backfill | None:
        """Have the vectors of the generation beside the live one made."""
        beside = self._catalog.beside(uid)
        if beside is None:
            return None
        backfill = self._backfills.get(uid)
        if backfill is None or backfill.served is not beside:
            backfill = self._backfills[uid] = Backfill(self._catalog, self._models, beside)
            backfill.start()
        return backfill

    async def _open_beside(self, made: Collection) -> None:
        await self._catalog.open_beside(made)
        self._fill(made.uid)

    async def _give_up(self, served: Served) -> None:
        """Forget the generation beside the live one, if there is one."""
        uid = served.collection.uid
        there = await self._beside(served)
        await self._end_backfill(uid)
        await self._catalog.close_beside(uid)
        if there is not None:
            await self._store.generations.drop(there.collection)

    async def _end_backfill(self, uid: int) -> None:
        if (backfill := self._backfills.pop(uid, None)) is not None:
            await backfill.close()

    async def _stop(self, served: Served) -> None:
        """A collection goes, or one of its generations."""
        backfill = self._backfills.get(served.collection.uid)
        if backfill is not None and backfill.served is served:
            await self._end_backfill(served.collection.uid)

    async def _build(self, job: Job) -> bool:
        """Build a generation; whether that was not cancelled."""
        uid = job.served.collection.uid
        try:
            done = await _unless_cancelled(job, self._built(job))
        except Exception:
            await self._given_up(uid)
            raise
        if not done:
            await self._given_up(uid)
        return done

    async def _given_up(self, uid: int) -> None:
        served = self._catalog.of(uid)
        if served is not None:
            await until_done(lambda: self._give_up(served))

    async def _built(self, job: Job) -> None:
        uid = job.served.collection.uid
        backfill, beside = self._fill(uid), self._catalog.beside(uid)
        if backfill is None or beside is None or beside.collection.generation != job.record.argument:
            raise PreconditionFailed(f"generation {job.record.argument} is not there any more")
        goal = await until_done(lambda: self._store.positions(job.served.collection))
        while not await backfill.reach(goal, Deadline.after(TELL_S)):
            job.tell(*backfill.progress, "making vectors")
        await self._copies_have(job, beside, goal)
        quiet_s = time.monotonic()
        while time.monotonic() - quiet_s < FRESH_S:
            pending = sum(int(replica.describe()["pending_rows"]) for _, replica in beside.copies())
            if pending:
                quiet_s = time.monotonic()
                job.tell(*backfill.progress, f"building its index: {pending} documents to go")
            if backfill.failed is not None:
                raise PreconditionFailed(backfill.failed)
            await asyncio.sleep(TELL_S)
        job.tell(*backfill.progress, "comparing it with the live one")
        live = self._catalog.of(uid)
        if live is not None:
            job.figures = await until_done(lambda: self._comparison.of(live, beside))
        await until_done(lambda: self._store.generations.set_state(beside.collection, GenerationState.READY))
        await self._catalog.spread()

    async def _copies_have(self, job: Job, served: Served, positions: Mapping[str, int]) -> None:
        """Return when every copy is there and has these positions, by database."""
        while True:
            if not served.wants_copies:
                with suppress(RingfortError):
                    if await served.wait_for(served.by_log(positions), Deadline.after(TELL_S)):
                        return
            else:
                self._catalog.hurry()
            job.tell(job.done, job.total, "opening its copies")
            await asyncio.sleep(FIRST_PAUSE_S)

    async def _exchange(self, job: Job) -> bool:
        """Make the generation beside the live one the live one."""
        uid, number = job.served.collection.uid, job.record.argument
        live = self._catalog.of(uid)
        if live is None:
            raise NotFound("collection", job.served.collection.name)
        generations = self._store.generations
        if live.collection.generation != number and not await self._made_live(job, live):
            return False
        # Also where this was begun by a service that ended here.
        await until_done(lambda: generations.open_writes(self._live(uid).collection))
        await self._catalog.spread()
        self._fill(uid)
        return True

    async def _made_live(self, job: Job, live: Served) -> bool:
        """Whether that was not cancelled before it was too late."""
        uid, number = live.collection.uid, job.record.argument
        generations = self._store.generations
        # A service that ended in the middle of this may have left them closed.
        await until_done(lambda: generations.open_writes(live.collection))
        there = await until_done(lambda: self._beside(live))
        backfill, beside = self._fill(uid), self._catalog.beside(uid)
        if there is None or backfill is None or beside is None or beside.collection.generation != number:
            raise PreconditionFailed(f"generation {number} is not there any more")
        left = GenerationState.READY if there.state is GenerationState.PREVIOUS else GenerationState.PREVIOUS
        if not await _unless_cancelled(job, self._prepared(job, backfill)):
            return False
        job.tell(0, 1, "writes wait for the last vectors")
        try:
            deadline = Deadline.after(CLOSED_S)
            closed = await generations.close_writes(live.collection)
            if not await backfill.reach(closed, deadline) or not await beside.wait_for(
                beside.by_log(closed), deadline
            ):
                raise Unavailable(f"it was not complete after {CLOSED_S:g} s")
        except Exception as error:  # whatever it is, writes must not stay closed
            await until_done(lambda: generations.open_writes(live.collection))
            if not isinstance(error, RingfortError):
                raise
            raise PreconditionFailed(
                f"generation {number} could not catch up, and {live.collection.generation} goes on: {error}"
            ) from error
        await until_done(lambda: generations.activate(beside.collection, left))
        await until_done(lambda: self._catalog.exchange(uid))
        await self._end_backfill(uid)
        return True

    async def _prepared(self, job: Job, backfill: Backfill) -> None:
        """Return when so little is missing that writes can wait for it."""
        await self._near(job, backfill)
        await self._copies_have(job, backfill.served, dict.fromkeys(backfill.served.logs, 0))
        await self._catalog.spread()
        if self.warm is not None:
            job.tell(0, 1, "computing what is asked for most")
            try:
                await self.warm(backfill.served, Deadline.after(WARM_S))
            except RingfortError as error:  # then they are computed when they are asked for
                log.warning("answers of generation %d cannot be warmed: %s", job.record.argument, error)

    async def _near(self, job: Job, backfill: Backfill) -> None:
        """Return when the generation has all but the last few vectors."""
        deadline = Deadline.after(NEAR_S)
        while True:
            positions = await until_done(lambda: self._store.positions(job.served.collection))
            near = {database: at - LAG_POSITIONS for database, at in positions.items()}
            if await backfill.reach(near, Deadline.after(TELL_S)):
                return
            job.tell(*backfill.progress, "catching up")
            if deadline.left_s() <= 0:
                raise PreconditionFailed(f"it did not catch up with what is written in {NEAR_S:g} s")

    def _live(self, uid: int) -> Served:
        served = self._catalog.of(uid)
        if served is None:
            raise NotFound("collection", str(uid))
        return served


async def _unless_cancelled(job: Job, work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done, and its job not cancelled before."""
    unwanted = asyncio.Event()
    job.cancel = unwanted.set
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(unwanted.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if unwanted.is_set():
            return False
        await working
        return True
    finally:
        job.cancel = None
        await tasks.end(working, stopping)
