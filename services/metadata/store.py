"""The room's door: one database, opened, claimed and ready."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import psycopg

from services.deadline import Deadline
from services.metadata.database import Database, connection_arguments, first_line
from services.metadata.documents import Documents
from services.metadata.jobs import Jobs
from services.metadata.log import Log
from services.metadata.models import ModelVersions
from services.metadata.ownership import BorrowedClaim, Claim, Ownership
from services.metadata.registry import Registry
from services.metadata.schema import StartupRefused
from services.metadata.shard_maps import ShardMaps
from services.metadata.statements import bare_statement
from services.metadata.tombstones import Tombstones
from shard_router.model import Collection, Commit, LogDelta, LogRow, Metric, Schema, Write

__all__ = ["TAIL_ROWS", "StartupRefused", "Store"]

log = logging.getLogger(__name__)

#: Rows of one page of a log.
TAIL_ROWS = 4_096


class Store:
    """The truth about collections and documents, and the log of their writes.

    What `write` confirmed is durable; what `tail` has passed is complete. Every method may raise
    StorageUnavailable (no server, or it went away), DeadlineExceeded("database") and Overloaded.
    """

    def __init__(
        self, database: Database, ownership: Ownership, *, writers: int, tombstone_ttl_s: float
    ) -> None:
        """Use `open`; this only puts the parts together."""
        self._database = database
        self._ownership = ownership
        self._tombstones = Tombstones(database, ownership, ttl_s=tombstone_ttl_s)
        self._registry = Registry(database, ownership)
        self._documents = Documents(database, ownership)
        self._log = Log(database, ownership, writers=writers)
        #: Versions of models.
        self.models = ModelVersions(database, ownership)
        #: Who owns which slot of a collection.
        self.shard_maps = ShardMaps(database, ownership)
        #: Long operations.
        self.jobs = Jobs(database, ownership)

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        pool_size: int = 8,
        statement_timeout_ms: int = 10_000,
        wait_s: float = 8.0,
        say: Callable[[str], None] = log.info,
        tombstone_ttl_s: float = 7 * 24 * 3600.0,
    ) -> "Store":
        """Wait up to `wait_s` for the server, claim the database, bring its schema up to date.

        `say` hears, in a few words, why it is waited.
        What was deleted longer than `tombstone_ttl_s` ago is forgotten, in the background.

        Raises StartupRefused: not a URL, unreachable, in use by another service, too old a server, not UTF8,
        or last used by a newer release.
        """
        try:
            arguments = connection_arguments(url, statement_timeout_ms)
        except psycopg.ProgrammingError as error:
            raise StartupRefused(f"metadata.postgres_url: {first_line(error)}") from None
        ownership = Ownership(arguments)
        database = Database(
            arguments,
            pool_size=pool_size,
            statement_timeout_ms=statement_timeout_ms,
            check_identity=ownership.check_identity,
        )
        try:
            await ownership.take(wait_s, say)
            await database.open()
        except BaseException:
            await ownership.close()
            await database.close()
            raise
        store = cls(database, ownership, writers=max(1, pool_size // 2), tombstone_ttl_s=tombstone_ttl_s)
        store._tombstones.start()
        return store

    @classmethod
    async def borrow(
        cls, url: str, claim: BorrowedClaim, *, pool_size: int, statement_timeout_ms: int = 10_000
    ) -> "Store":
        """The store, for a process beside the one that holds the claim, migrates and forgets old deletes."""
        database = Database(
            connection_arguments(url, statement_timeout_ms),
            pool_size=pool_size,
            statement_timeout_ms=statement_timeout_ms,
            check_identity=claim.check_identity,
        )
        await database.open()
        return cls(database, claim, writers=max(1, pool_size // 2), tombstone_ttl_s=math.inf)

    @property
    def claim(self) -> Claim:
        """The claim to the database, held or not."""
        return self._ownership.claim

    @property
    def log_id(self) -> str:
        """The log's identity; another one after a restore or a failover to another timeline."""
        return self._ownership.claim.log_id

    async def create_collection(
        self,
        *,
        tenant: str,
        name: str,
        dim: int,
        metric: Metric,
        schema: Schema,
        model: str | None,
        slots: int,
        shards: int,
        replicas: int,
        index: str,
        max_staleness_ms: int,
        space: str,
    ) -> Collection:
        """A new, empty collection; AlreadyExists if a collection or an alias has its name."""
        return await self._registry.create(
            tenant=tenant,
            name=name,
            dim=dim,
            metric=metric,
            schema=schema,
            model=model,
            slots=slots,
            shards=shards,
            replicas=replicas,
            index=index,
            max_staleness_ms=max_staleness_ms,
            space=space,
        )

    async def collections(self) -> list[Collection]:
        """All collections of all tenants, oldest first."""
        return await self._registry.collections()

    async def delete_collection(self, tenant: str, name: str) -> None:
        """Forget a collection with its aliases and documents; NotFound."""
        await self._registry.delete(tenant, name)

    async def set_alias(self, tenant: str, alias: str, collection: str | None) -> None:
        """Point an alias at a collection, or remove it (None); NotFound, AlreadyExists."""
        await self._registry.set_alias(tenant, alias, collection)

    async def write(self, collection: Collection, writes: Sequence[Write], *, deadline: Deadline) -> Commit:
        """Commit writes in their order, each with an outcome of its own; NotFound if the collection is gone.

        After StorageUnavailable or DeadlineExceeded some or all of them may be committed.
        """
        return await self._log.write(collection, writes, deadline=deadline)

    async def get(
        self, collection: Collection, ids: Sequence[str], *, with_vectors: bool
    ) -> tuple[list[LogRow | None], np.ndarray | None]:
        """The live documents at their ids' places, else None; vectors float32 [ids, dim], zeros for None."""
        return await self._documents.get(collection, ids, with_vectors=with_vectors)

    async def scan(
        self, collection: Collection, after: tuple[int, str] | None, limit: int, *, with_vectors: bool
    ) -> tuple[list[LogRow], np.ndarray | None]:
        """A page of live documents in order of (slot, id), strictly after `after`; vectors [rows, dim]."""
        return await self._documents.scan(collection, after, limit, with_vectors=with_vectors)

    async def position(self, collection: Collection) -> int:
        """Where the collection's log stands."""
        return await self._documents.position(collection)

    async def tail(self, collection: Collection, after: int, limit: int = TAIL_ROWS) -> LogDelta:
        """The log beyond `after`, at most `limit` rows of it; UnknownLog if it never was at `after`.

        LogPurged if it has forgotten deletes beyond `after`.
        """
        delta, _ = await self._documents.tail(collection, after, limit)
        return delta

    def follow(self, collection: Collection) -> Callable[..., Awaitable[LogDelta]]:
        """`tail(after, slots=None)` for one replica, page by page up to the log's end and then on and on.

        Where slots are given, the pages are of those. Who begins with nothing, at 0, is not refused between
        its pages for deletes forgotten before.
        """
        #: By which slots are read, and where a page of them ended short of the log's end: where the log stood
        #: when its reader began at 0.
        began: dict[tuple[tuple[int, ...] | None, int], int] = {}

        async def tail(after: int, slots: Sequence[int] | None = None) -> LogDelta:
            which = None if slots is None else tuple(slots)
            delta, counter = await self._documents.tail(
                collection, after, TAIL_ROWS, began.get((which, after), 0), slots
            )
            empty_at = counter if after == 0 else began.pop((which, after), 0)
            if empty_at and delta.upto < counter:
                began[which, delta.upto] = empty_at
            return delta

        return tail

    async def purge_tombstones(self) -> None:
        """Forget now what is old enough to be forgotten; otherwise it is done in the background."""
        await self._tombstones.purge()

    async def ping(self) -> None:
        """Return if the server answers."""
        async with self._database.connection() as connection:
            await connection.execute(bare_statement("ping"))

    async def close(self) -> None:
        """Give up the claim and every connection."""
        await self._tombstones.close()
        await self._database.close()
        await self._ownership.close()

    def stats(self) -> dict[str, float]:
        """Counts since the start, and the pool as it is now."""
        return {
            "claim_held": float(self._ownership.held),
            **self._log.stats(),
            **self._tombstones.stats(),
            **self._database.stats(),
        }
