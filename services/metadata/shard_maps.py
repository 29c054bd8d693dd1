"""The shard map of every collection, and its changes: each a compare-and-set on the epoch."""

from collections.abc import Callable, Sequence

from services.metadata.database import Connection, Database
from services.metadata.ownership import REGAIN_WAIT_S, Ownership
from services.metadata.partition import Partition
from services.metadata.statements import bare_statement
from shard_router.errors import NotFound, StorageUnavailable
from shard_router.model import Collection
from shard_router.shard_map import MapState, Migrating, Retiring, ShardMap, Steady

_PHASES: dict[type[MapState], str] = {Steady: "steady", Migrating: "migrating", Retiring: "retiring"}


class ShardMaps:
    """Stored map states. Every method raises NotFound (the collection is gone) and what the store raises."""

    def __init__(
        self,
        database: Database,
        ownership: Ownership,
        partitions: Callable[[Collection], Sequence[Partition]] = lambda _: (),
    ) -> None:
        """partitions: the further databases that a collection's documents lie in."""
        self._database = database
        self._ownership = ownership
        self._partitions = partitions

    async def get(self, collection: Collection) -> MapState:
        """The state that is stored; the collection's first map where it never changed."""
        async with self._database.connection() as connection:
            return await _read(connection, collection)

    async def put(self, collection: Collection, state: MapState) -> MapState:
        """Store a state if the one of one epoch less is stored; returns what is stored then, this one or not.

        It takes effect between two writes: those after it tell its epoch in their commits. In partitions it
        does so when this returns; where one is away this raises, and may be asked again.
        """
        claim = await self._ownership.require(REGAIN_WAIT_S)
        values = {
            "uid": collection.uid,
            "claim": claim.id,
            "epoch": state.epoch,
            "phase": _PHASES[type(state)],
            "owners": list(state.answering.owners if isinstance(state, Steady) else state.old.owners),
            "next": None if isinstance(state, Steady) else list(state.new.owners),
        }
        async with self._database.connection() as connection, connection.transaction():
            cursor = await connection.execute(bare_statement("advance_epoch"), values)
            if await cursor.fetchone() is None:
                stored = await _read(connection, collection)
                if stored.epoch == state.epoch - 1:
                    raise StorageUnavailable("the claim to the database is no longer held")
                if stored != state:
                    return stored
            else:
                await connection.execute(bare_statement("put_shard_map"), values)
        for partition in self._partitions(collection):
            await _follow(partition, collection, state.epoch)
        return state

    async def set_replicas(self, collection: Collection, replicas: int) -> None:
        """How many copies every shard is to have."""
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection:
            await connection.execute(
                bare_statement("set_replicas"), {"uid": collection.uid, "replicas": replicas}
            )


async def _follow(partition: Partition, collection: Collection, epoch: int) -> None:
    with partition.named():
        claim = await partition.ownership.require(REGAIN_WAIT_S)
        values = {"uid": collection.uid, "claim": claim.id, "epoch": epoch}
        async with partition.database.connection() as connection:
            cursor = await connection.execute(bare_statement("follow_epoch"), values)
            if await cursor.fetchone() is None:
                raise StorageUnavailable(
                    "the claim to it is no longer held, or it has nothing of the collection"
                )


async def _read(connection: Connection, collection: Collection) -> MapState:
    cursor = await connection.execute(bare_statement("shard_map"), {"uid": collection.uid})
    row = await cursor.fetchone()
    if row is None:
        raise NotFound("collection", collection.name)
    epoch, phase, owners, following = row
    if phase is None:
        return Steady(ShardMap.create(collection.slots, collection.shards))
    # An epoch of its own for each map, so that neither is taken for the state's.
    if phase == "steady":
        return Steady(ShardMap(epoch, tuple(owners)))
    began = epoch - 1 if phase == "migrating" else epoch - 2
    old, new = ShardMap(began, tuple(owners)), ShardMap(began + 1, tuple(following))
    return Migrating(epoch, old, new) if phase == "migrating" else Retiring(epoch, old, new)
