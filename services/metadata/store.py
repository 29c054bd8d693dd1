"""The room's door: the home database and its partitions, opened, claimed and ready."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

from services.deadline import Deadline
from services.metadata.generations import Generations
from services.metadata.jobs import Jobs
from services.metadata.leftovers import Leftovers
from services.metadata.models import ModelVersions
from services.metadata.ownership import Belonging, BorrowedClaim, Claim
from services.metadata.partition import Partition
from services.metadata.schema import StartupRefused
from services.metadata.shard_maps import ShardMaps
from services.metadata.statements import bare_statement
from shard_router.databases import databases_of
from shard_router.errors import RingfortError, StorageUnavailable
from shard_router.model import HOME, Collection, Commit, LogDelta, LogRow, Metric, Schema, Write

__all__ = ["TAIL_ROWS", "StartupRefused", "Store"]

log = logging.getLogger(__name__)

#: Rows of one page of a log.
TAIL_ROWS = 4_096
#: Numbers that are tried for a new collection, where partitions have others of the same.
UID_ATTEMPTS = 64


class Store:
    """The truth about collections and documents, and the logs of their writes.

    What `write` confirmed is durable; what `tail` has passed is complete. Every method may raise
    StorageUnavailable (no server, or it went away; names the partition that is meant),
    DeadlineExceeded("database") and Overloaded. A partition that is away takes its own documents with it, and
    nothing else.
    """

    def __init__(self, home: Partition, partitions: Sequence[Partition] = ()) -> None:
        """Use `open` or `borrow`; this only puts the parts together."""
        self._home = home
        self._all = {each.name: each for each in (home, *partitions)}
        self._registry = home.registry
        self._leftovers = Leftovers(home.database, self._abandon)
        #: Versions of models.
        self.models = ModelVersions(home.database, home.ownership)
        #: Who owns which slot of a collection.
        self.shard_maps = ShardMaps(home.database, home.ownership, self._followers)
        #: Complete indexes of a collection, each in one embedding space.
        self.generations = Generations(home.database, home.ownership, self._databases)
        #: Long operations.
        self.jobs = Jobs(home.database, home.ownership)

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        partitions: Mapping[str, str] | None = None,
        pool_size: int = 8,
        statement_timeout_ms: int = 10_000,
        wait_s: float = 8.0,
        say: Callable[[str], None] = log.info,
        tombstone_ttl_s: float = 7 * 24 * 3600.0,
    ) -> "Store":
        """Wait up to `wait_s` for the home's server, claim the databases, bring their schemas up to date.

        partitions: by name, the URLs of further databases; one that is away is opened when it comes.
        `say` hears, in a few words, why it is waited, and what is missing.
        What was deleted longer than `tombstone_ttl_s` ago is forgotten, in the background.

        Raises StartupRefused: not a URL, unreachable, in use by another service, too old a server, not UTF8,
        a partition of another service, or last used by a newer release.
        """

        def made(name: str, url: str, belonging: Belonging | None) -> Partition:
            return Partition(
                name, url, belonging,
                pool_size=pool_size, statement_timeout_ms=statement_timeout_ms,
                tombstone_ttl_s=tombstone_ttl_s,
            )  # fmt: skip

        home = made(HOME, url, None)
        opened = [home]
        try:
            await home.open(wait_s, say)
            service = home.ownership.service
            opened += [made(name, at, Belonging(service, name)) for name, at in (partitions or {}).items()]
            store = cls(home, opened[1:])
            await asyncio.gather(*(partition.open_or_later(say) for partition in opened[1:]))
            await store._miss(say)
        except BaseException:
            await asyncio.gather(*(partition.close() for partition in opened))
            raise
        store._leftovers.start()
        return store

    @classmethod
    async def borrow(
        cls,
        url: str,
        claim: BorrowedClaim,
        *,
        partitions: Mapping[str, tuple[str, BorrowedClaim]] | None = None,
        pool_size: int,
        statement_timeout_ms: int = 10_000,
    ) -> "Store":
        """The store, for a process beside the one that holds the claims, migrates and forgets old deletes."""
        given = {HOME: (url, claim), **(partitions or {})}
        made = [
            Partition(name, at, its, pool_size=pool_size, statement_timeout_ms=statement_timeout_ms)
            for name, (at, its) in given.items()
        ]
        await asyncio.gather(*(partition.database.open() for partition in made))
        return cls(made[0], made[1:])

    @property
    def claim(self) -> Claim:
        """The claim to the home database, held or not."""
        return self._home.ownership.claim

    @property
    def claims(self) -> Mapping[str, Claim]:
        """By name, the claims to the partitions that were there so far, held or not."""
        return {
            name: partition.ownership.claim
            for name, partition in self._all.items()
            if name != HOME and partition.log_id
        }

    @property
    def log_id(self) -> str:
        """The home's logs' identity; another one after a restore or a failover to another timeline."""
        return self._home.ownership.claim.log_id

    def log_id_of(self, database: str) -> str:
        """The identity of a database's logs; empty where it has not been there yet, or is not configured."""
        partition = self._all.get(database)
        return "" if partition is None else partition.log_id

    @property
    def databases(self) -> Mapping[str, str]:
        """By name, why nothing can be written to a database; empty where it can."""
        return {name: partition.away for name, partition in self._all.items()}

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
        """A new, empty collection over all databases; AlreadyExists if a collection or alias has its name."""
        partitions = [database for database in self._all if database != HOME]
        for _ in range(UID_ATTEMPTS):
            uid, created_at_us = await self._registry.reserve(partitions)
            collection = Collection(
                uid=uid,
                tenant=tenant,
                name=name,
                dim=dim,
                metric=metric,
                schema=dict(schema),
                schema_version=1,
                model=model,
                slots=slots,
                shards=shards,
                replicas=replicas,
                index=index,
                max_staleness_ms=max_staleness_ms,
                generation=1,
                space=space,
                created_at_us=created_at_us,
                databases=(HOME, *partitions),
            )
            try:
                if await self._adopted(collection, partitions):
                    await self._registry.create(collection)
                    return collection
            except RingfortError:
                await self._clear(collection, partitions)
                raise
            await self._clear(collection, partitions)
        raise StorageUnavailable("partitions hold documents of collections that the home does not know")

    async def collections(self) -> list[Collection]:
        """All collections of all tenants, oldest first."""
        return await self._registry.collections()

    async def delete_collection(self, tenant: str, name: str) -> None:
        """Forget a collection with its aliases and documents; NotFound.

        What a partition has of it goes when that is there.
        """
        for uid, created_at_us, database in await self._registry.delete(tenant, name):
            await self._leftovers.remove(uid, created_at_us, database)

    async def set_alias(self, tenant: str, alias: str, collection: str | None) -> None:
        """Point an alias at a collection, or remove it (None); NotFound, AlreadyExists."""
        await self._registry.set_alias(tenant, alias, collection)

    async def attach(self, collection: Collection, database: str = HOME) -> tuple[str, int]:
        """The identity of the collection's log in a database, and where it ends for its generation.

        StorageUnavailable also where the database is not configured, or holds nothing of the collection.
        """
        partition = self._partition(database)
        with partition.named():
            log_id = partition.log_id
            if database != HOME and not await partition.registry.holds(collection):
                raise StorageUnavailable(f"it holds nothing of the collection {collection.name!r}")
            position = await partition.reached(collection)
            if partition.log_id != log_id:
                raise StorageUnavailable(f"the log is another than {log_id}")
        return log_id, position

    async def write(
        self, collection: Collection, writes: Sequence[Write], *, deadline: Deadline, database: str = HOME
    ) -> Commit:
        """Commit writes in their order, each with an outcome of its own; NotFound if the collection is gone.

        All of them are of that database's slots. After StorageUnavailable or DeadlineExceeded some or all of
        them may be committed.
        """
        return await self._partition(database).write(collection, writes, deadline)

    async def get(
        self, collection: Collection, ids: Sequence[str], *, with_vectors: bool
    ) -> tuple[list[LogRow | None], np.ndarray | None]:
        """The live documents at their ids' places, else None; vectors float32 [ids, dim], zeros for None.

        StorageUnavailable names the first id that lies in a database that is away.
        """
        if len(collection.databases) == 1:
            return await self._home.get(collection, ids, with_vectors=with_vectors)
        cut = databases_of(collection).cut(ids)

        async def part(database: str, places: Sequence[int]) -> tuple[list[LogRow | None], np.ndarray | None]:
            try:
                partition, its = self._partition(database), [ids[place] for place in places]
                return await partition.get(collection, its, with_vectors=with_vectors)
            except StorageUnavailable as error:
                raise error.within(f"ids[{places[0]}]") from None

        rows: list[LogRow | None] = [None] * len(ids)
        matrix = np.zeros((len(ids), collection.dim), np.float32) if with_vectors else None
        parts = await asyncio.gather(*(part(*each) for each in cut.items()))
        for places, (its_rows, its_vectors) in zip(cut.values(), parts, strict=True):
            for place, row in zip(places, its_rows, strict=True):
                rows[place] = row
            if matrix is not None and its_vectors is not None:
                matrix[places] = its_vectors
        return rows, matrix

    async def scan(
        self, collection: Collection, after: tuple[int, str] | None, limit: int, *, with_vectors: bool
    ) -> tuple[list[LogRow], np.ndarray | None]:
        """A page of live documents in order of (slot, id), strictly after `after`; vectors [rows, dim]."""
        partitions = [self._partition(database) for database in collection.databases]
        pages = await asyncio.gather(
            *(each.scan(collection, after, limit, with_vectors=with_vectors) for each in partitions)
        )
        if len(pages) == 1:
            return pages[0]
        # Each page is whole as far as it goes, so the first of all of them are the first of all there are.
        found = [
            (row.slot, row.id, page, at) for page, (its, _) in enumerate(pages) for at, row in enumerate(its)
        ]
        chosen = sorted(found)[:limit]
        rows = [pages[page][0][at] for _, _, page, at in chosen]
        vectors = [its for _, its in pages if its is not None]
        if not with_vectors:
            return rows, None
        matrix = np.array([vectors[page][at] for _, _, page, at in chosen], np.float32)
        return rows, matrix.reshape(len(rows), collection.dim)

    async def position(self, collection: Collection, database: str = HOME) -> int:
        """Where the collection's log in a database stands."""
        return await self._partition(database).position(collection)

    async def positions(self, collection: Collection) -> dict[str, int]:
        """By database, where the collection's logs stand."""
        databases = collection.databases
        found = await asyncio.gather(*(self.position(collection, database) for database in databases))
        return dict(zip(databases, found, strict=True))

    async def tail(self, collection: Collection, after: int, limit: int = TAIL_ROWS) -> LogDelta:
        """The home's log beyond `after`, at most `limit` rows of it; UnknownLog if it never was at `after`.

        LogPurged if it has forgotten deletes beyond `after`.
        """
        delta, _ = await self._home.tail(collection, after, limit, 0, None)
        return delta

    def follow(self, collection: Collection, database: str = HOME) -> Callable[..., Awaitable[LogDelta]]:
        """`tail(after, slots=None, rows=None)` for one replica, page by page to the log's end and on and on.

        Where slots are given, the pages are of those; `rows` is how many a page has at most. Who begins with
        nothing, at 0, is not refused between its pages for deletes forgotten before.
        """
        #: By which slots are read, and where a page of them ended short of the log's end: where the log stood
        #: when its reader began at 0.
        began: dict[tuple[tuple[int, ...] | None, int], int] = {}

        async def tail(after: int, slots: Sequence[int] | None = None, rows: int | None = None) -> LogDelta:
            which = None if slots is None else tuple(slots)
            delta, counter = await self._partition(database).tail(
                collection, after, rows or TAIL_ROWS, began.get((which, after), 0), slots
            )
            empty_at = counter if after == 0 else began.pop((which, after), 0)
            if empty_at and delta.upto < counter:
                began[which, delta.upto] = empty_at
            return delta

        return tail

    async def purge_tombstones(self) -> None:
        """Forget now what is old enough to be forgotten; otherwise it is done in the background."""
        for partition in self._all.values():
            await partition.tombstones.purge()

    async def sweep(self) -> None:
        """Remove now what partitions have of no collection; otherwise it is done in the background."""
        await self._leftovers.sweep(0.0)

    async def ping(self) -> None:
        """Return if the home's server answers."""
        async with self._home.database.connection() as connection:
            await connection.execute(bare_statement("ping"))

    async def close(self) -> None:
        """Give up the claims and every connection."""
        await self._leftovers.close()
        for partition in reversed(self._all.values()):
            await partition.close()

    def stats(self) -> dict[str, float]:
        """Counts of the home since the start, and its pool as it is now."""
        return self._home.stats()

    def stats_of_each(self) -> dict[str, dict[str, float]]:
        """The same of every partition, by name."""
        return {name: partition.stats() for name, partition in self._all.items() if name != HOME}

    def _partition(self, database: str) -> Partition:
        partition = self._all.get(database)
        if partition is None:
            raise StorageUnavailable("metadata.partitions does not name it", database)
        return partition

    def _followers(self, collection: Collection) -> list[Partition]:
        """The partitions that have documents of a collection."""
        return [self._partition(database) for database in collection.databases if database != HOME]

    def _databases(self, collection: Collection) -> list[Partition]:
        """All databases that have documents of a collection, the home first."""
        return [self._partition(database) for database in collection.databases]

    async def _miss(self, say: Callable[[str], None]) -> None:
        """Say which databases are needed and not configured."""
        needed = {database for collection in await self.collections() for database in collection.databases}
        for database in sorted(needed - self._all.keys()):
            say(f"collections need the database {database!r}, which metadata.partitions does not name")

    async def _adopted(self, collection: Collection, partitions: Sequence[str]) -> bool:
        """Whether every partition has tables for a new collection; False where a number is taken."""
        for database in partitions:
            partition = self._partition(database)
            with partition.named():
                if not await partition.registry.adopt(collection):
                    log.warning("database %s has a collection %d of its own", database, collection.uid)
                    return False
        return True

    async def _clear(self, collection: Collection, partitions: Sequence[str]) -> None:
        for database in partitions:
            await self._leftovers.remove(collection.uid, collection.created_at_us, database)

    async def _abandon(self, database: str, uid: int, created_at_us: int) -> None:
        partition = self._partition(database)
        with partition.named():
            if partition.away:  # not waited for: a transaction in the home is open meanwhile
                raise StorageUnavailable(partition.away)
            await partition.registry.abandon(uid, created_at_us)
