"""Forgets what was deleted long ago: tombstones go by age, a bounded page at a time."""

import asyncio
import logging

from psycopg import errors

from services import tasks
from services.metadata.database import Database
from services.metadata.ownership import Ownership
from services.metadata.statements import bare_statement, statement
from shard_router.errors import NotFound, RingfortError, StorageUnavailable

log = logging.getLogger(__name__)

#: Tombstones of one transaction, which holds the log's counter as a write does.
PURGE_ROWS = 1_000
#: Pause between two such transactions, so that writers go first.
PAUSE_S = 0.02
#: The age of a tombstone is told to within this share of the time it is kept.
PRECISION = 1 / 8
#: Shortest and longest time between two looks.
SHORTEST_S, LONGEST_S = 0.05, 600.0


class Tombstones:
    """Purges tombstones older than `ttl_s`, in the background.

    The age comes from the server's clock: where every log stands is noted now and then, and what lies at or
    below a note of long ago is older than that. Before a tombstone is gone the log's purge floor says so, in
    the same transaction: a reader that stands below it has to begin with nothing.
    """

    def __init__(self, database: Database, ownership: Ownership, *, ttl_s: float) -> None:
        self._database, self._ownership, self._ttl_s = database, ownership, ttl_s
        self._purged = 0
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="metadata-tombstones")

    async def close(self) -> None:
        """End; a page under way is given up."""
        await tasks.end(self._task)

    def stats(self) -> dict[str, float]:
        """Counts since the start."""
        return {"purged_total": float(self._purged), "purge_failures_total": float(self._failures)}

    async def _run(self) -> None:
        pause_s = min(max(self._ttl_s * PRECISION, SHORTEST_S), LONGEST_S)
        while True:
            await asyncio.sleep(pause_s)
            try:
                await self.purge()
            except RingfortError as error:
                self._failures += 1
                log.warning("tombstones cannot be purged now: %s", error)
            except Exception:
                self._failures += 1
                log.exception("tombstones cannot be purged")

    async def purge(self) -> None:
        """Note where the logs stand now; purge what was deleted before they stood there long enough ago."""
        async with self._database.connection() as connection:
            await connection.execute(bare_statement("mark_positions"))
            cursor = await connection.execute(bare_statement("old_positions"), {"age_s": self._ttl_s})
            due = await cursor.fetchall()
        for uid, upto in due:
            try:
                purged = PURGE_ROWS
                while purged == PURGE_ROWS:
                    purged = await self._purge_page(uid, upto)
                    await asyncio.sleep(PAUSE_S)
            except NotFound:
                continue
            async with self._database.connection() as connection:
                await connection.execute(bare_statement("drop_marks"), {"uid": uid, "upto": upto})

    async def _purge_page(self, uid: int, upto: int) -> int:
        """How many were purged; NotFound where the collection is gone."""
        claim = await self._ownership.require(1.0)
        async with self._database.connection() as connection, connection.transaction():
            try:
                await connection.execute(statement("lock_tables", uid), prepare=True)
            except errors.UndefinedTable:
                raise NotFound("collection", str(uid)) from None
            cursor = await connection.execute(
                bare_statement("lock_counter"), {"uid": uid, "claim": claim.id}, prepare=True
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("collection", str(uid))
            if not row[1]:
                raise StorageUnavailable("another service holds the claim")
            wanted = {"uid": uid, "upto": upto, "limit": PURGE_ROWS}
            cursor = await connection.execute(statement("purge", uid), wanted)
            (purged,) = await cursor.fetchone() or (0,)
        self._purged += purged
        return int(purged)
