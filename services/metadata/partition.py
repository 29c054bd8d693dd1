"""One database: its claim, the documents that lie in it, and their logs."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import psycopg

from services import tasks
from services.deadline import Deadline
from services.metadata.database import Database, connection_arguments, first_line
from services.metadata.documents import Documents
from services.metadata.log import Log
from services.metadata.ownership import Belonging, BorrowedClaim, Ownership
from services.metadata.registry import Registry
from services.metadata.schema import StartupRefused
from services.metadata.tombstones import Tombstones
from shard_router.errors import StorageUnavailable
from shard_router.model import HOME, Collection, Commit, LogDelta, LogRow, Write

#: A partition is waited for so long at the start; then the service starts without it.
PARTITION_WAIT_S = 2.0


class Partition:
    """A database and what is done in it; the home is one, too.

    Every method may raise StorageUnavailable, which names a partition that is away,
    DeadlineExceeded("database") and Overloaded.
    """

    def __init__(
        self,
        name: str,
        url: str,
        claimed: Belonging | BorrowedClaim | None,
        *,
        pool_size: int,
        statement_timeout_ms: int,
        tombstone_ttl_s: float = math.inf,
    ) -> None:
        """claimed: what the database is to be, None for a home; or the claim of whoever took it.

        StartupRefused where that is no URL.
        """
        setting = "metadata.postgres_url" if name == HOME else f"metadata.partitions.{name}"
        try:
            arguments = connection_arguments(url, statement_timeout_ms)
        except psycopg.ProgrammingError as error:
            raise StartupRefused(f"{setting}: {first_line(error)}") from None
        self.name = name
        borrowed = isinstance(claimed, BorrowedClaim)
        self.ownership = claimed if isinstance(claimed, BorrowedClaim) else Ownership(arguments, claimed)
        self.database = Database(
            arguments,
            pool_size=pool_size,
            statement_timeout_ms=statement_timeout_ms,
            check_identity=self.ownership.check_identity,
        )
        self.registry = Registry(self.database, self.ownership)
        self.tombstones = Tombstones(self.database, self.ownership, ttl_s=tombstone_ttl_s)
        self._documents = Documents(self.database, self.ownership)
        self._log = Log(self.database, self.ownership, writers=max(1, pool_size // 2))
        self._opened = borrowed
        self._opening: asyncio.Task[None] | None = None

    async def open(self, wait_s: float, say: Callable[[str], None]) -> None:
        """Wait up to `wait_s` for the server, claim the database, bring its schema up to date.

        StartupRefused.
        """
        await self.ownership.take(wait_s, say)
        await self._open()

    async def open_or_later(self, say: Callable[[str], None]) -> None:
        """The same for one that need not be there; tried again in the background until it is."""
        try:
            await self.open(PARTITION_WAIT_S, say)
        except StartupRefused as refused:
            say(f"the service starts without the database {self.name!r}: {refused}")
            self.ownership.take_later(str(refused))
            self._opening = asyncio.create_task(self._open_later(), name=f"open database {self.name}")

    async def close(self) -> None:
        """Give up the claim and every connection."""
        await tasks.end(self._opening)
        await self.tombstones.close()
        await self.database.close()
        await self.ownership.close()

    @property
    def log_id(self) -> str:
        """The identity of its logs; empty until it was claimed for the first time."""
        return self.ownership.claim.log_id

    @property
    def away(self) -> str:
        """Why nothing can be written to it; empty while it can."""
        return self.ownership.lost

    async def write(self, collection: Collection, writes: Sequence[Write], deadline: Deadline) -> Commit:
        """Commit writes to documents of this database, in order; see `Log.write`."""
        with self.named():
            return await self._log.write(collection, writes, deadline=deadline)

    async def get(
        self, collection: Collection, ids: Sequence[str], *, with_vectors: bool
    ) -> tuple[list[LogRow | None], np.ndarray | None]:
        """Documents by id; see `Documents.get`."""
        with self.named():
            return await self._documents.get(collection, ids, with_vectors=with_vectors)

    async def scan(
        self, collection: Collection, after: tuple[int, str] | None, limit: int, *, with_vectors: bool
    ) -> tuple[list[LogRow], np.ndarray | None]:
        """A page of documents; see `Documents.scan`."""
        with self.named():
            return await self._documents.scan(collection, after, limit, with_vectors=with_vectors)

    async def position(self, collection: Collection) -> int:
        """Where the collection's log here stands."""
        with self.named():
            return await self._documents.position(collection)

    async def reached(self, collection: Collection) -> int:
        """Where that log ends for who follows it for the collection's generation."""
        with self.named():
            return await self._documents.reached(collection)

    async def tail(
        self, collection: Collection, after: int, limit: int, empty_at: int, slots: Sequence[int] | None
    ) -> tuple[LogDelta, int]:
        """A page of the collection's log here; see `Documents.tail`."""
        with self.named():
            return await self._documents.tail(collection, after, limit, empty_at, slots)

    @contextmanager
    def named(self) -> Iterator[None]:
        """StorageUnavailable within says which partition is away; at once where it never was there."""
        try:
            if not self._opened:
                raise StorageUnavailable(self.away or "it is being opened")
            yield
        except StorageUnavailable as error:
            if self.name == HOME:
                raise
            raise StorageUnavailable(error.why, self.name) from error

    def stats(self) -> dict[str, float]:
        """Counts since the start, and the pool as it is now."""
        return {
            "claim_held": float(self.ownership.held),
            **self._log.stats(),
            **self.tombstones.stats(),
            **self.database.stats(),
        }

    async def _open(self) -> None:
        await self.database.open()
        self.tombstones.start()
        self._opened = True

    async def _open_later(self) -> None:
        await self.ownership.taken()
        await self._open()
