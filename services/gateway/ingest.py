"""Writes: check, embed what has no vector, commit in groups, wait where the caller wants to see it.

One bad document fails alone; a call in which every document is bad fails as a whole. Nothing of a refused
document is written.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from protos.ringfort import v1 as pb
from services import status, wire
from services.config import Limits
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.gateway.catalog import Catalog, Served
from services.gateway.committer import Committed, Committer
from services.gateway.models import Models
from services.gateway.streams import in_order
from shard_router.errors import DeadlineExceeded, InvalidField, RingfortError, VersionConflict
from shard_router.filters import Filter, check
from shard_router.model import AttributeValue, Patch, Remove, Upsert, Version, Write, WriteOutcome

#: Batches of one stream that are embedded, and that are committed, at once; reading pauses beyond it.
STREAM_BATCHES = 4
#: Documents one round of a Delete by filter takes.
DELETE_ROWS = 2_048


@dataclass(slots=True)
class _Draft:
    """A document on its way: checked, perhaps still without a vector."""

    id: str
    text: str | None
    attributes: dict[str, AttributeValue]
    vector: np.ndarray | None
    if_version: Version | None


@dataclass(frozen=True, slots=True)
class _Checked:
    """A call's writes, each ready for the log or refused, in order."""

    served: Served
    ids: Sequence[str]
    writes: Sequence[Write | RingfortError]
    wait: "pb.Wait.ValueType"


@dataclass(frozen=True, slots=True)
class _Written:
    """What became of a call's writes; `upto` is 0 where nothing was committed."""

    statuses: list[pb.WriteStatus]
    visible: bool
    token: pb.WriteToken | None


class Ingest:
    """Everything that changes documents."""

    def __init__(self, catalog: Catalog, models: Models, limits: Limits) -> None:
        self._catalog = catalog
        self._models = models
        self._limits = limits
        self._committers: dict[int, Committer] = {}
        catalog.on_drop.append(self._drop)

    async def upsert(self, request: pb.UpsertRequest, tenant: str, deadline: Deadline) -> pb.UpsertResponse:
        """Replace whole documents; a status each, in order."""
        checked = await self._check_upsert(request, tenant, deadline)
        written = await self._finish(checked, self._submit(checked), deadline, refuse_all=True)
        return pb.UpsertResponse(statuses=written.statuses, visible=written.visible, token=written.token)

    async def upsert_stream(
        self, requests: AsyncIterator[pb.UpsertRequest], tenant: str, deadline: Deadline
    ) -> AsyncIterator[pb.UpsertResponse]:
        """The same for a stream: batches are embedded side by side and committed in order."""

        async def queued() -> AsyncIterator[tuple[_Checked, "asyncio.Future[Committed] | None"]]:
            checks = in_order(requests, lambda r: self._check_upsert(r, tenant, deadline), STREAM_BATCHES)
            async with aclosing(checks):
                async for checked in checks:
                    yield checked, self._submit(checked)

        written = in_order(queued(), lambda pair: self._finish(*pair, deadline), STREAM_BATCHES)
        async with aclosing(written):
            async for w in written:
                yield pb.UpsertResponse(statuses=w.statuses, visible=w.visible, token=w.token)

    async def patch(self, request: pb.PatchRequest, tenant: str, deadline: Deadline) -> pb.PatchResponse:
        """Set and clear attributes; text and vector stay."""
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_wait(request.wait)
        wire.check_rows(request.patches, "patches", self._limits.max_batch_rows)
        writes: list[Write | RingfortError] = []
        for i, patch in enumerate(request.patches):
            try:
                writes.append(self._patch(served, patch, f"patches[{i}]"))
            except RingfortError as error:
                writes.append(error)
        checked = _Checked(served, [patch.id for patch in request.patches], writes, request.wait)
        written = await self._finish(checked, self._submit(checked), deadline, refuse_all=True)
        return pb.PatchResponse(statuses=written.statuses, visible=written.visible, token=written.token)

    async def delete(self, request: pb.DeleteRequest, tenant: str, deadline: Deadline) -> pb.DeleteResponse:
        """Remove documents by id, or all that match a filter at the time."""
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_wait(request.wait)
        if bool(request.ids) == request.HasField("filter"):
            raise InvalidField("ids", "give ids or a filter, one of the two")
        if request.ids:
            wire.check_rows(request.ids, "ids", self._limits.max_batch_rows)
            ids = wire.keys(request.ids, "ids", self._limits.max_id_bytes)
            done = await self._wait(self._committer(served).submit([Remove(id) for id in ids]), deadline)
            deleted, upto = sum(outcome.version is not None for outcome in done.outcomes), done.upto
        else:
            filter = wire.filter_from(request.filter)
            if filter is None:
                raise InvalidField("filter", "is empty")
            filter = check(filter, served.collection.schema)
            deleted, upto = await self._delete_matching(served, filter, deadline)
        return pb.DeleteResponse(
            deleted=deleted,
            visible=request.wait == pb.VISIBLE and await served.wait_for(upto, deadline),
            token=wire.token_on_wire({served.log_id: upto}),
        )

    async def close(self) -> None:
        """Commit what waits and end."""
        await asyncio.gather(*(committer.close() for committer in self._committers.values()))

    async def _drop(self, served: Served) -> None:
        committer = self._committers.pop(served.collection.uid, None)
        if committer is not None:
            await committer.close()

    def _committer(self, served: Served) -> Committer:
        committer = self._committers.get(served.collection.uid)
        if committer is None:
            committer = self._committers[served.collection.uid] = Committer(self._catalog.store, served)
        return committer

    async def _check_upsert(self, request: pb.UpsertRequest, tenant: str, deadline: Deadline) -> _Checked:
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_wait(request.wait)
        wire.check_rows(request.documents, "documents", self._limits.max_batch_rows)
        drafts = self._drafts(served, request)
        wanting = [draft for draft in drafts if isinstance(draft, _Draft) and draft.vector is None]
        if wanting:
            # Documents are rarely embedded twice; caching them would only push queries out.
            made = await self._models.embed_for(
                served.collection, [draft.text or "" for draft in wanting], InputType.DOCUMENT, deadline,
                use_cache=False,
            )  # fmt: skip
            for draft, vector in zip(wanting, made.vectors, strict=True):
                draft.vector = vector
        writes = [
            draft
            if isinstance(draft, RingfortError)
            else Upsert(draft.id, draft.text, draft.attributes, _present(draft.vector), draft.if_version)
            for draft in drafts
        ]
        return _Checked(served, [document.id for document in request.documents], writes, request.wait)

    def _drafts(self, served: Served, request: pb.UpsertRequest) -> list[_Draft | RingfortError]:
        matrix, sound = None, None
        if request.HasField("vectors"):
            matrix = wire.array_from(request.vectors, "vectors", dim=served.collection.dim, check=False)
            if len(matrix) != len(request.documents):
                raise InvalidField("vectors.rows", f"{len(matrix)} rows, {len(request.documents)} documents")
            sound = wire.rows_in_bounds(matrix)
        drafts: list[_Draft | RingfortError] = []
        for i, document in enumerate(request.documents):
            field = f"documents[{i}]"
            try:
                draft = self._draft(served, document, field, request.truncate)
                if matrix is not None and sound is not None:
                    if draft.vector is not None:
                        raise InvalidField(f"{field}.vector", "is given, and so is `vectors`")
                    if not sound[i]:
                        raise InvalidField(f"{field}.vector", wire.OUT_OF_BOUNDS)
                    draft.vector = matrix[i]
                self._require_vector_or_text(served, draft, field)
                drafts.append(draft)
            except RingfortError as error:
                drafts.append(error)
        return drafts

    def _draft(self, served: Served, document: pb.Document, field: str, truncate: bool) -> _Draft:
        collection, limits = served.collection, self._limits
        id = wire.key(document.id, f"{field}.id", limits.max_id_bytes)
        text = document.text if document.HasField("text") else None
        if text is not None:
            if "\0" in text:
                raise InvalidField(f"{field}.text", "holds a NUL character")
            text = self._models.check_text(text, f"{field}.text", truncate=truncate)
        attributes = wire.attributes_from(
            document.attributes, collection.schema, f"{field}.attributes", limits.max_attributes_bytes
        )
        vector = None
        if document.HasField("vector"):
            if document.vector.rows != 1:
                raise InvalidField(f"{field}.vector.rows", f"{document.vector.rows} rows where one is meant")
            vector = wire.array_from(document.vector, f"{field}.vector", dim=collection.dim)[0]
        if_version = wire.version_from(document.if_version) if document.HasField("if_version") else None
        return _Draft(id, text, attributes, vector, if_version)

    def _require_vector_or_text(self, served: Served, draft: _Draft, field: str) -> None:
        if draft.vector is not None:
            return
        if served.collection.model is None:
            raise InvalidField(f"{field}.vector", "is missing, and the collection has no model to make it")
        if not draft.text:
            raise InvalidField(f"{field}.text", "is empty, and there is no vector")

    def _patch(self, served: Served, patch: pb.Patch, field: str) -> Patch:
        wire.key(patch.id, f"{field}.id", self._limits.max_id_bytes)
        schema = served.collection.schema
        for i, name in enumerate(patch.clear):
            if name not in schema:
                raise InvalidField(f"{field}.clear[{i}]", f"the collection declares no attribute {name!r}")
        attributes = wire.attributes_from(
            patch.attributes, schema, f"{field}.attributes", self._limits.max_attributes_bytes
        )
        if_version = wire.version_from(patch.if_version) if patch.HasField("if_version") else None
        return Patch(patch.id, attributes, tuple(patch.clear), if_version)

    async def _delete_matching(self, served: Served, filter: Filter, deadline: Deadline) -> tuple[int, int]:
        deleted = 0
        upto = await self._catalog.store.position(served.collection)
        while True:
            if not await served.wait_for(upto, deadline):
                deadline.require("waiting for the shards")
            found = [
                match
                for replica in served.replicas.values()
                for match in await replica.matching(filter, DELETE_ROWS)
            ][:DELETE_ROWS]
            if not found:
                return deleted, upto
            # By version: a document that changed meanwhile is looked at again in the next round.
            writes = [Remove(id, version) for id, version in found]
            done = await self._wait(self._committer(served).submit(writes), deadline)
            deleted += sum(outcome.version is not None for outcome in done.outcomes)
            upto = max(upto, done.upto)
            for outcome in done.outcomes:
                if outcome.error is not None and not isinstance(outcome.error, VersionConflict):
                    raise outcome.error

    def _submit(self, checked: _Checked) -> "asyncio.Future[Committed] | None":
        writes = [write for write in checked.writes if not isinstance(write, RingfortError)]
        return self._committer(checked.served).submit(writes) if writes else None

    async def _finish(
        self,
        checked: _Checked,
        committing: "asyncio.Future[Committed] | None",
        deadline: Deadline,
        *,
        refuse_all: bool = False,
    ) -> _Written:
        """Wait for the commit and, where asked, for the shards; statuses in the order of the call.

        With `refuse_all`, a call of which every write was refused fails with the first one's error.
        """
        done = await self._wait(committing, deadline) if committing is not None else Committed((), 0)
        left = iter(done.outcomes)
        outcomes = [
            WriteOutcome(error=write) if isinstance(write, RingfortError) else next(left)
            for write in checked.writes
        ]
        if refuse_all and outcomes[0].error is not None and all(o.error is not None for o in outcomes):
            raise outcomes[0].error
        visible = checked.wait == pb.VISIBLE and await checked.served.wait_for(done.upto, deadline)
        token = wire.token_on_wire({checked.served.log_id: done.upto}) if done.upto else None
        statuses = [_status(id, outcome) for id, outcome in zip(checked.ids, outcomes, strict=True)]
        return _Written(statuses, visible, token)

    async def _wait(self, done: "asyncio.Future[Committed]", deadline: Deadline) -> Committed:
        """The commit goes on whatever becomes of its caller."""
        try:
            return await asyncio.wait_for(asyncio.shield(done), deadline.require("the write queue"))
        except TimeoutError:
            raise DeadlineExceeded("the commit") from None


def _present(vector: np.ndarray | None) -> np.ndarray:
    assert vector is not None, "every draft has a vector once the texts are embedded"
    return vector


def _status(id: str, outcome: WriteOutcome) -> pb.WriteStatus:
    if outcome.error is None:
        version = None if outcome.version is None else wire.version_on_wire(outcome.version)
        return pb.WriteStatus(id=id, version=version)
    error = outcome.error
    return pb.WriteStatus(
        id=id, code=status.number(status.code_of(error)), message=str(error), field=error.field
    )
