"""The write path: a batch of writes is one transaction, and one more entry of the log."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import numpy as np
import psycopg
from psycopg import errors

from services.deadline import Deadline
from services.metadata.codec import STORED, row_from
from services.metadata.database import Connection, Database, first_line, hung_up, piped_transaction
from services.metadata.fold import Plan, conditional, fold
from services.metadata.ownership import Claim, Ownership
from services.metadata.statements import bare_statement, statement
from shard_router.errors import (
    DeadlineExceeded,
    GenerationChanged,
    InvalidField,
    NotFound,
    Overloaded,
    SegmentCorrupt,
    StorageUnavailable,
)
from shard_router.hashing import slots_of
from shard_router.model import Collection, Commit, LogDelta, LogRow, Write, WriteOutcome

log = logging.getLogger(__name__)

#: Rows of one transaction; the counter is never held for more.
TRANSACTION_ROWS = 2_048
#: Batches that may wait for a connection to write with; beyond it they are refused.
WAITING_BATCHES = 256
#: Transactions of a log that are remembered for those who never heard their COMMIT answered.
REMEMBERED = 4_096
#: A transaction whose fate is unknown and that was not committed is tried again so often in all.
ATTEMPTS = 2
#: Pause between questions to a server that is away.
PAUSE_S = 0.05

#: What the server refuses a batch for when one of its documents cannot be stored.
DATA_ERRORS = (errors.DataError, errors.ProgramLimitExceeded, UnicodeError)


class _Superseded(Exception):
    """Nothing was written: another claim than this write's holds the counter."""


class _Unconfirmed(Exception):
    """The connection was lost: the transaction may or may not have been committed."""

    def __init__(self, plan: Plan | None) -> None:
        super().__init__("the connection was lost before the commit was confirmed")
        #: None where it was lost before anything was sent.
        self.plan = plan


class Log:
    """Writes to every collection's log.

    One transaction a batch. Taking positions locks the log's counter row until the commit, so the order
    of positions is the order of visibility: who reads up to a position has read everything up to it.
    """

    def __init__(self, database: Database, ownership: Ownership, *, writers: int) -> None:
        self._database = database
        self._ownership = ownership
        #: Writers queue here, so that those who wait for a counter leave connections to the readers.
        self._writers = asyncio.Semaphore(writers)
        #: Batches in the queue for `_writers`; at most WAITING_BATCHES.
        self._waiting = 0
        #: The highest transaction number that is known of each collection.
        self._numbers: dict[int, int] = {}
        self._counts = dict.fromkeys(
            ("transactions", "documents", "bisections", "unconfirmed", "superseded"), 0
        )
        self._commit_ms = 0.0

    async def write(self, collection: Collection, writes: Sequence[Write], *, deadline: Deadline) -> Commit:
        """Commit writes in their order; each has its own outcome, in the same order.

        At most TRANSACTION_ROWS writes are one transaction, more are several. A document that cannot be
        stored fails alone. `delta` is None after either, and where a lost commit had to be looked up.
        Where the collection's generation is not the one that writes bring vectors of, GenerationChanged is
        the outcome.
        Raises NotFound (the collection is gone), Overloaded, StorageUnavailable, DeadlineExceeded; after
        the last two some or all of the batch may be committed.
        """
        parts = [writes[at : at + TRANSACTION_ROWS] for at in range(0, max(1, len(writes)), TRANSACTION_ROWS)]
        async with self._turn(deadline):
            return _joined([await self._part(collection, part, deadline) for part in parts])

    def stats(self) -> dict[str, float]:
        """Counts since the start."""
        totals = {f"{name}_total": float(count) for name, count in self._counts.items()}
        return totals | {"commit_ms_total": self._commit_ms, "waiting_batches": float(self._waiting)}

    @asynccontextmanager
    async def _turn(self, deadline: Deadline) -> AsyncIterator[None]:
        if self._waiting >= WAITING_BATCHES:
            raise Overloaded("the queue of write batches", WAITING_BATCHES)
        self._waiting += 1
        try:
            async with asyncio.timeout(deadline.require("database")):
                await self._writers.acquire()
        except TimeoutError:
            raise DeadlineExceeded("database") from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._writers.release()

    async def _part(self, collection: Collection, writes: Sequence[Write], deadline: Deadline) -> Commit:
        try:
            return await self._settle(collection, writes, deadline)
        except DATA_ERRORS as refused:
            if len(writes) == 1:
                outcome = WriteOutcome(error=InvalidField("", first_line(refused)))
                async with self._database.connection(deadline.require("database")) as connection:
                    upto = await read_position(connection, collection)
                return Commit(self._ownership.claim.log_id, upto, [outcome], None)
        except GenerationChanged as changed:
            # Nothing of this part; others may have been committed before.
            outcomes = [WriteOutcome(error=changed.again()) for _ in writes]
            return Commit(self._ownership.claim.log_id, 0, outcomes, None)
        self._counts["bisections"] += 1
        half = len(writes) // 2
        parts = (writes[:half], writes[half:])
        return _joined([await self._part(collection, part, deadline) for part in parts])

    async def _settle(self, collection: Collection, writes: Sequence[Write], deadline: Deadline) -> Commit:
        """One transaction, exactly once: what was lost at COMMIT is looked up, and repeated if it never was.

        Every attempt carries the same write_id, which is unique: should the lost one still be on its way
        and commit after all, the repetition fails and finds it.
        """
        write_id, known = uuid.uuid4(), self._numbers.get(collection.uid, 0)
        plans: list[Plan] = []
        for _ in range(ATTEMPTS):
            try:
                return await self._transact(collection, writes, write_id, deadline)
            except _Unconfirmed as lost:
                self._counts["unconfirmed"] += 1
                log.warning("collection %s: %s", collection.name, lost)
                if lost.plan is not None:
                    plans.append(lost.plan)
            except _Superseded:
                self._counts["superseded"] += 1
                log.warning("collection %s: a write carried a claim that is no longer held", collection.name)
                self._ownership.doubt("a counter carries another claim")
                continue
            except errors.UniqueViolation:
                log.warning("collection %s: a lost transaction was committed after all", collection.name)
            after = await self._remembered(collection, write_id, known, deadline)
            if after is not None:
                plan = next(plan for plan in plans if plan.checked_at in (None, after))
                log_id = self._ownership.claim.log_id
                return Commit(log_id, after + plan.positions, plan.outcomes(after), None)
        raise StorageUnavailable("the connection or the claim was lost at every attempt to commit")

    async def _transact(
        self, collection: Collection, writes: Sequence[Write], write_id: uuid.UUID, deadline: Deadline
    ) -> Commit:
        slots = slots_of((write.id for write in writes), collection.slots).tolist()
        needed = conditional(writes)
        claim = await self._ownership.require(deadline.require("database"))
        term, dim = claim.term, collection.dim
        plan = None if needed else fold(writes, slots, {}, None, term=term, dim=dim)
        await asyncio.sleep(0)  # the event loop's turn, between two pieces of a millisecond
        began_s = time.perf_counter()
        async with self._database.connection(deadline.require("database")) as connection:
            try:
                if plan is None:
                    async with piped_transaction(connection) as pipeline:
                        after, current = await _lock_and_read(connection, pipeline, collection, claim, needed)
                        plan = fold(writes, slots, current, after, term=term, dim=dim)
                        commit = await self._apply(connection, collection, claim, plan, write_id, pipeline)
                else:
                    commit = await self._apply(connection, collection, claim, plan, write_id)
            except errors.UndefinedTable as error:
                raise NotFound("collection", collection.name) from error
            except (
                psycopg.OperationalError,
                psycopg.InterfaceError,
                errors.IdleInTransactionSessionTimeout,
            ) as error:
                if hung_up(error, connection):
                    raise _Unconfirmed(plan) from error
                raise
        self._counts["transactions"] += 1
        self._counts["documents"] += len(plan.drafts)
        self._commit_ms += (time.perf_counter() - began_s) * 1000
        return commit

    async def _apply(
        self,
        connection: Connection,
        collection: Collection,
        claim: Claim,
        plan: Plan,
        write_id: uuid.UUID,
        pipeline: psycopg.AsyncPipeline | None = None,
    ) -> Commit:
        log_id = claim.log_id
        if not plan.drafts:
            at = (
                plan.checked_at
                if plan.checked_at is not None
                else await read_position(connection, collection)
            )
            nothing = LogDelta(log_id, at, at, [], np.zeros((0, collection.dim), np.float32))
            return Commit(log_id, at, plan.outcomes(at), nothing)
        matrix = plan.matrix(collection.dim)
        written = await _write_rows(connection, collection, claim, plan, matrix, write_id)
        removed = [draft for draft in plan.drafts if draft.deleted]
        if removed:
            await connection.execute(
                statement("drop_vectors", collection.uid, collection.generation),
                {"slots": [draft.slot for draft in removed], "ids": [draft.id for draft in removed]},
            )
        if plan.checked_at is not None and any(draft.moves for draft in plan.drafts):
            await _move_vectors(connection, collection, plan, plan.checked_at, matrix)
        if pipeline is not None:
            await pipeline.sync()
        row = await written.fetchone()
        if row is None:
            raise await _refusal(connection, collection, claim)
        after, number, epoch = row
        self._numbers[collection.uid] = max(number, self._numbers.get(collection.uid, 0))
        upto = after + plan.positions
        vectors = matrix.astype(np.float32, copy=False)
        delta = LogDelta(log_id, after, upto, plan.rows(after), vectors)
        return Commit(log_id, upto, plan.outcomes(after), delta, epoch)

    async def _remembered(
        self, collection: Collection, write_id: uuid.UUID, known: int, deadline: Deadline
    ) -> int | None:
        """The position that a transaction started from; None if it was not committed (so far).

        `known` is a transaction number from before it. Raises StorageUnavailable if nobody can tell.
        """
        wanted = {"uid": collection.uid, "write_id": write_id}
        why = "the deadline passed"
        while deadline.left_s() > 0:
            try:
                async with self._database.connection(deadline.left_s()) as connection:
                    cursor = await connection.execute(bare_statement("remembered"), wanted)
                    row = await cursor.fetchone()
            except StorageUnavailable as away:
                why = away.why
                await asyncio.sleep(PAUSE_S)
                continue
            except DeadlineExceeded:
                break
            if row is None:
                raise NotFound("collection", collection.name)
            numbers, after = row
            if after is None and numbers - known > REMEMBERED:
                why = f"{numbers - known} transactions have passed"
                break
            return None if after is None else int(after)
        raise StorageUnavailable(f"whether a transaction was committed cannot be told: {why}")


async def _refusal(connection: Connection, collection: Collection, claim: Claim) -> Exception:
    """Why a counter did not take a write."""
    wanted = {"uid": collection.uid, "claim": claim.id}
    cursor = await connection.execute(bare_statement("written_by"), wanted)
    row = await cursor.fetchone()
    if row is None:
        return NotFound("collection", collection.name)
    # A claim that is held was held all along. Then it was the generation, whatever it is by now: writes may
    # have been opened again meanwhile.
    held, _ = row
    return GenerationChanged(collection.name, collection.generation) if held else _Superseded()


async def read_position(connection: Connection, collection: Collection) -> int:
    """The log's counter; NotFound where the collection is gone."""
    cursor = await connection.execute(bare_statement("position"), {"uid": collection.uid}, prepare=True)
    row = await cursor.fetchone()
    if row is None:
        raise NotFound("collection", collection.name)
    return int(row[0])


async def _lock_and_read(
    connection: Connection,
    pipeline: psycopg.AsyncPipeline,
    collection: Collection,
    claim: Claim,
    needed: Mapping[str, bool],
) -> tuple[int, dict[str, LogRow]]:
    locked, found = connection.cursor(binary=True), connection.cursor(binary=True)
    await connection.execute(statement("lock_tables", collection.uid), prepare=True)
    held = {"uid": collection.uid, "claim": claim.id}
    await locked.execute(bare_statement("lock_counter"), held, prepare=True)
    wanted = {
        "slots": slots_of(needed, collection.slots).tolist(),
        "ids": list(needed),
        "whole": list(needed.values()),
    }
    await found.execute(statement("current", collection.uid), wanted, prepare=True)
    await pipeline.sync()
    counter = await locked.fetchone()
    if counter is None:
        raise NotFound("collection", collection.name)
    if not counter[1]:
        raise _Superseded
    if counter[2] != collection.generation:
        raise GenerationChanged(collection.name, collection.generation)
    rows = [row_from(row, collection.schema) for row in await found.fetchall()]
    return counter[0], {row.id: row for row in rows}


async def _write_rows(
    connection: Connection,
    collection: Collection,
    claim: Claim,
    plan: Plan,
    matrix: np.ndarray,
    write_id: uuid.UUID,
) -> psycopg.AsyncCursor[psycopg.rows.TupleRow]:
    cursor = connection.cursor(binary=True)
    drafts = plan.drafts
    values = {
        "uid": collection.uid,
        "claim": claim.id,
        "generation": collection.generation,
        "term": claim.term,
        "write_id": write_id,
        "remembered": REMEMBERED,
        "positions": plan.positions,
        "slots": [draft.slot for draft in drafts],
        "ids": [draft.id for draft in drafts],
        "ordinals": [draft.ordinal for draft in drafts],
        "deleted": [draft.deleted for draft in drafts],
        "has_vector": [draft.vector is not None for draft in drafts],
        "texts": [draft.text for draft in drafts],
        "attributes": [draft.attributes_json for draft in drafts],
        "matrix": matrix.data.cast("B"),
        "row_bytes": collection.dim * STORED.itemsize,
    }
    return await cursor.execute(
        statement("write_rows", collection.uid, collection.generation), values, prepare=True
    )


async def _move_vectors(
    connection: Connection, collection: Collection, plan: Plan, after: int, matrix: np.ndarray
) -> None:
    """Keep the stored vectors of patched documents, and put them into their rows of `matrix`."""
    rows = {draft.id: row for row, draft in enumerate(plan.drafts) if draft.moves}
    moved = [plan.drafts[row] for row in rows.values()]
    values = {
        "slots": [draft.slot for draft in moved],
        "ids": [draft.id for draft in moved],
        "seqs": [after + draft.ordinal for draft in moved],
    }
    cursor = connection.cursor(binary=True)
    table = statement("move_vectors", collection.uid, collection.generation)
    await cursor.execute(table, values, prepare=True)
    for id, vector in await cursor.fetchall():
        matrix[rows.pop(id)] = np.frombuffer(vector, STORED)
    if rows:
        raise SegmentCorrupt(
            f"collection {collection.name}", f"documents without a vector: {sorted(rows)[:3]}"
        )


def _joined(commits: Sequence[Commit]) -> Commit:
    if len(commits) == 1:
        return commits[0]
    outcomes = [outcome for commit in commits for outcome in commit.outcomes]
    upto, epoch = max(commit.upto for commit in commits), max(commit.epoch for commit in commits)
    return Commit(commits[-1].log_id, upto, outcomes, None, epoch)
