"""Filters as requests bring them, read and checked once while they are asked for."""

from collections import OrderedDict

from protos.ringfort import v1 as pb
from services import wire
from shard_router.filters import Filter, check
from shard_router.model import Collection

#: Filters kept, and the bytes of the largest that is.
_KEPT, _KEPT_BYTES = 1_024, 4_096


class Conditions:
    """Checked filters of all collections, the recently used ones kept. Belongs to one event loop."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int, bytes], Filter] = OrderedDict()

    def checked(self, message: pb.Filter, collection: Collection, field: str = "filter") -> Filter | None:
        """The filter a message means, checked against the collection's schema; None where nothing is set.

        The same message gives the same object, so that its digest is at hand. InvalidFilter.
        """
        if message.WhichOneof("node") is None:
            return None
        key = (collection.uid, collection.schema_version, message.SerializeToString())
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        read = wire.filter_from(message, field)
        if read is None:
            return None
        made = check(read, collection.schema, field)
        if len(key[2]) <= _KEPT_BYTES:
            self._known[key] = made
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return made
