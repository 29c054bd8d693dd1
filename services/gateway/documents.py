"""Reading documents: Get and Scan from Postgres, the truth; Count from the shards' columns.

All three are exact as of the call: Count first lets the shards pass the log's counter.
"""

import base64
import binascii

import msgspec

from protos.ringfort import v1 as pb
from services import wire
from services.config import Limits
from services.deadline import Deadline
from services.gateway.directory import Directory
from shard_router.errors import DeadlineExceeded, InvalidField
from shard_router.filters import check, matches

DEFAULT_PAGE = 256


class Documents:
    """The read side of DocumentService."""

    def __init__(self, catalog: Directory, limits: Limits) -> None:
        self._catalog = catalog
        self._limits = limits

    async def get(self, request: pb.GetRequest, tenant: str, deadline: Deadline) -> pb.GetResponse:
        """Documents by id, in the order asked."""
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_rows(request.ids, "ids", self._limits.max_batch_rows)
        ids = wire.keys(request.ids, "ids", self._limits.max_id_bytes)
        include = wire.include_from(request.include, request.HasField("include"))
        rows, vectors = await self._catalog.store.get(served.collection, ids, with_vectors=include.vector)
        response = pb.GetResponse()
        for i, (id, row) in enumerate(zip(ids, rows, strict=True)):
            if row is None:
                response.missing.append(id)
                continue
            vector = None if vectors is None else vectors[i]
            response.documents.append(wire.document_on_wire(row, vector, served.collection.schema, include))
        return response

    async def scan(self, request: pb.ScanRequest, tenant: str, deadline: Deadline) -> pb.ScanResponse:
        """One page of all documents (that match), in order of slot and id; each page is a read of its own.

        A filtered page may hold fewer documents than its size, and still have a successor.
        """
        served = self._catalog.resolve(tenant, request.collection)
        size = request.page_size or DEFAULT_PAGE
        if size > self._limits.max_batch_rows:
            raise InvalidField("page_size", f"{size} is over the limit of {self._limits.max_batch_rows}")
        after = _position_of(request.page_token)
        filter = wire.filter_from(request.filter)
        if filter is not None:
            filter = check(filter, served.collection.schema)
        include = wire.include_from(request.include, request.HasField("include"))
        rows, vectors = await self._catalog.store.scan(
            served.collection, after, size, with_vectors=include.vector
        )
        response = pb.ScanResponse()
        for i, row in enumerate(rows):
            if filter is None or matches(filter, row.attributes):
                vector = None if vectors is None else vectors[i]
                response.documents.append(
                    wire.document_on_wire(row, vector, served.collection.schema, include)
                )
        if len(rows) == size:
            response.next_page_token = _token_of(rows[-1].slot, rows[-1].id)
        return response

    async def count(self, request: pb.CountRequest, tenant: str, deadline: Deadline) -> pb.CountResponse:
        """How many documents there are (that match), every acknowledged write included."""
        served = self._catalog.resolve(tenant, request.collection)
        filter = wire.filter_from(request.filter)
        if filter is not None:
            filter = check(filter, served.collection.schema)
        if not await served.wait_for(await self._catalog.positions(served), deadline):
            raise DeadlineExceeded("waiting for the shards")
        counts = await served.each_shard(lambda replica, epoch: replica.count(filter, epoch=epoch), deadline)
        return pb.CountResponse(count=sum(counts))


def _token_of(slot: int, id: str) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((slot, id))).decode()


def _position_of(token: str) -> tuple[int, str] | None:
    if not token:
        return None
    try:
        slot, id = msgspec.msgpack.decode(base64.urlsafe_b64decode(token), type=tuple[int, str])
    except (msgspec.MsgspecError, binascii.Error, ValueError):
        slot, id = -1, ""
    if slot < 0 or "\0" in id:
        raise InvalidField("page_token", "is not one that Scan answered")
    return slot, id
