"""What the head tells further gateways, as messages of protos/ringfort/internal and back."""

from protos.ringfort.internal import v1 as internal
from services.gateway.served import Served
from services.shard import parcels
from shard_router.model import Collection
from shard_router.resharding import Copy
from shard_router.shard_map import MapState, Migrating, Retiring, ShardMap, Steady

_PHASES: dict[type[MapState], str] = {Steady: "steady", Migrating: "migrating", Retiring: "retiring"}


def shape_of(served: Served, opened: dict[Copy, int]) -> internal.Shape:
    """A collection and who answers for it; `opened` are the copies that may be asked, with their numbers."""
    state = served.state
    owners, following = (
        (state.answering.owners, ()) if isinstance(state, Steady) else (state.old.owners, state.new.owners)
    )
    return internal.Shape(
        collection=parcels.collection_on_wire(served.collection),
        logs={log.database: log.log_id for log in served.logs.values() if log.log_id},
        phase=_PHASES[type(state)],
        epoch=state.epoch,
        owners=owners,
        next=following,
        copies=[
            internal.CopyNews(shard=copy.shard, replica=copy.replica, database=copy.database, opened=number)
            for copy, number in sorted(opened.items())
        ],
    )


def collection_of(shape: internal.Shape) -> Collection:
    """The collection itself."""
    return parcels.collection_from(shape.collection)


def state_of(shape: internal.Shape) -> MapState:
    """The state of its map."""
    epoch, owners = shape.epoch, tuple(shape.owners)
    if shape.phase == "steady":
        return Steady(ShardMap(epoch, owners))
    # An epoch of its own for each map, as they had one when they were stored.
    began = epoch - 1 if shape.phase == "migrating" else epoch - 2
    old, new = ShardMap(began, owners), ShardMap(began + 1, tuple(shape.next))
    return Migrating(epoch, old, new) if shape.phase == "migrating" else Retiring(epoch, old, new)


def copies_of(shape: internal.Shape) -> dict[Copy, int]:
    """The copies that may be asked, each with the number of its opening."""
    return {Copy(each.shard, each.replica, each.database): each.opened for each in shape.copies}
