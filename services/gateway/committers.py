"""The writers of all collections' logs: a call's writes are cut by database and committed side by side.

A database that is away fails its own writes, and no others.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.deadline import Deadline
from services.gateway.committer import Committed, Committer
from services.gateway.directory import Directory
from services.gateway.served import Served
from services.telemetry import stage
from shard_router.databases import databases_of
from shard_router.errors import DeadlineExceeded, RingfortError
from shard_router.model import Write, WriteOutcome

_COMMIT = stage("commit")


@dataclass(frozen=True, slots=True)
class Submission:
    """A call's writes, on their way."""

    writes: int
    #: Of each database that has some: their places in the call (none are told where it is the only one), and
    #: what becomes of them.
    parts: Sequence[tuple[Sequence[int], "asyncio.Future[Committed]"]]

    async def committed(self, deadline: Deadline) -> Committed:
        """What became of the writes, in order; the commits go on whatever becomes of their caller.

        Where there is one database, raises what its commit raised, and DeadlineExceeded; where there are
        several, those are the outcomes of its writes.
        """
        began_s = time.perf_counter()
        try:
            if not self.parts:
                return Committed((), {})
            places, done = self.parts[0]
            if not places:
                return await _in_time(done, deadline)
            waits = (_in_time(done, deadline) for _, done in self.parts)
            results = await asyncio.gather(*waits, return_exceptions=True)
            return joined(self.writes, [places for places, _ in self.parts], results)
        finally:
            _COMMIT.took(time.perf_counter() - began_s)


class Committers:
    """Every log's one writer, made when it is first needed."""

    def __init__(self, catalog: Directory) -> None:
        self._catalog = catalog
        self._of: dict[Served, dict[str, Committer]] = {}
        catalog.on_drop.append(self._drop)

    def submit(self, served: Served, writes: Sequence[Write]) -> Submission:
        """Queue writes behind everything submitted before; Overloaded where the one database's queue is full.

        Of several, a full one fails its own writes.
        """
        if not writes:
            return Submission(0, ())
        if len(served.logs) == 1:
            (database,) = served.logs
            return Submission(len(writes), [((), self._committer(served, database).submit(writes))])
        parts = []
        for database, places in databases_of(served.collection).cut(write.id for write in writes).items():
            try:
                done = self._committer(served, database).submit([writes[place] for place in places])
            except RingfortError as refused:
                done = asyncio.get_running_loop().create_future()
                done.set_exception(refused)
            parts.append((places, done))
        return Submission(len(writes), parts)

    async def close(self) -> None:
        """Commit what waits and end."""
        await asyncio.gather(*(each.close() for of in self._of.values() for each in of.values()))

    async def _drop(self, served: Served) -> None:
        of = self._of.pop(served, {})
        await asyncio.gather(*(each.close() for each in of.values()))

    def _committer(self, served: Served, database: str) -> Committer:
        of = self._of.setdefault(served, {})
        committer = of.get(database)
        if committer is None:
            committer = of[database] = Committer(self._catalog.store, served, database)
        return committer


def joined(
    writes: int, parts: Sequence[Sequence[int]], results: Sequence[Committed | BaseException]
) -> Committed:
    """Outcomes of all writes in their order: `parts[i]` are the places of those that `results[i]` is about.

    An error is the outcome of each of its writes; what is no RingfortError is raised.
    """
    outcomes = [WriteOutcome()] * writes
    positions: dict[str, int] = {}
    late = False
    for places, result in zip(parts, results, strict=True):
        if isinstance(result, Committed):
            positions.update(result.positions)
            late |= result.late
            for place, outcome in zip(places, result.outcomes, strict=True):
                outcomes[place] = outcome
        elif isinstance(result, RingfortError):
            for place in places:
                outcomes[place] = WriteOutcome(error=result.again())
        else:
            raise result
    return Committed(outcomes, positions, late)


async def _in_time(done: "asyncio.Future[Committed]", deadline: Deadline) -> Committed:
    try:
        return await asyncio.wait_for(asyncio.shield(done), deadline.require("the write queue"))
    except TimeoutError:
        raise DeadlineExceeded("the commit") from None
