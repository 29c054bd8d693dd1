"""Removes from partitions what no collection needs: of one that was deleted, or was never made to the end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from services import tasks
from services.metadata.database import Database
from services.metadata.statements import bare_statement
from shard_router.errors import RingfortError

log = logging.getLogger(__name__)

#: Pause between two looks, and the age at which something is not a collection that is being made.
PAUSE_S, AGE_S = 60.0, 120.0

#: Removes a collection (uid, time) from a partition; raises what that one raises.
Abandon = Callable[[str, int, int], Awaitable[None]]


class Leftovers:
    """The list of them in the home database, and its end, in the background.

    An entry is there before the first table is, and goes with the last: a crash leaves nothing unknown.
    """

    def __init__(self, database: Database, abandon: Abandon) -> None:
        self._database, self._abandon = database, abandon
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="metadata-leftovers")

    async def close(self) -> None:
        """End."""
        await tasks.end(self._task)

    async def sweep(self, age_s: float = AGE_S) -> None:
        """Remove what is at least so old; what lies in a partition that is away stays on the list."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("leftovers"), {"age_s": age_s})
            found = await cursor.fetchall()
        for uid, created_at_us, database in found:
            await self.remove(uid, created_at_us, database)

    async def remove(self, uid: int, created_at_us: int, database: str) -> None:
        """Remove one, if nobody else does and its partition is there."""
        entry = {"uid": uid, "database": database}
        try:
            async with self._database.connection() as connection, connection.transaction():
                cursor = await connection.execute(bare_statement("take_leftover"), entry)
                if cursor.rowcount:
                    await self._abandon(database, uid, created_at_us)
                    await connection.execute(bare_statement("drop_leftover"), entry)
        except RingfortError as error:
            log.warning("collection %d stays in database %s for now: %s", uid, database, error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PAUSE_S)
            try:
                await self.sweep()
            except RingfortError as error:
                log.warning("what is left over in partitions cannot be looked up now: %s", error)
            except Exception:
                log.exception("what is left over in partitions cannot be removed")
