"""Writes: check, embed what has no vector, commit in groups, wait where the caller wants to see it.

One bad document fails alone; a call in which every document is bad fails as a whole. Nothing of a refused
document is written.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np
from msgspec import structs

from protos.ringfort import v1 as pb
from services import status, wire
from services.config import Limits
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.gateway.committer import Committed
from services.gateway.committers import Committers, Submission
from services.gateway.directory import Directory
from services.gateway.models import Models
from services.gateway.served import Served
from services.gateway.streams import in_order
from services.gateway.turns import Turns
from services.telemetry import stage
from shard_router.errors import (
    GenerationChanged,
    InvalidField,
    NotFound,
    RingfortError,
    SpaceMismatch,
    VersionConflict,
)
from shard_router.filters import Filter, check
from shard_router.model import AttributeValue, Patch, Remove, Upsert, Version, Write, WriteOutcome

_VISIBLE = stage("visible")

Response = TypeVar("Response", pb.UpsertResponse, pb.PatchResponse)
#: Whether a collection's logs are visible everywhere up to these positions, before a deadline.
Visible = Callable[[Served, Mapping[str, int], Deadline], Awaitable[bool]]

#: Batches of one stream that are embedded, and that are committed, at once; reading pauses beyond it.
STREAM_BATCHES = 4
#: Documents checked before the event loop gets its turn: about half a millisecond.
SLICE_ROWS = 32
#: Pause before what another generation is to take is written again.
AGAIN_S = 0.02
#: Documents one round of a Delete by filter takes.
DELETE_ROWS = 2_048


class _Wanting(msgspec.Struct, frozen=True):
    """A checked document whose text has to be embedded first."""

    id: str
    text: str
    attributes: dict[str, AttributeValue]
    if_version: Version | None

    def with_vector(self, vector: np.ndarray) -> Upsert:
        """The write it becomes; vector float32 [dim]."""
        return Upsert(self.id, self.text, self.attributes, vector, self.if_version)


@dataclass(frozen=True, slots=True)
class _Checked:
    """A call's writes, each ready for the log or refused, in order.

    `made` are the places of those whose vectors were made here, of their texts.
    """

    served: Served
    #: The request's field that they came in, and their ids.
    field: str
    ids: Sequence[str]
    writes: Sequence[Write | RingfortError]
    wait: "pb.Wait.ValueType"
    made: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Sent:
    """A stream's batch on its way, behind others."""

    checked: _Checked
    submission: Submission
    #: Set when what was submitted before is written.
    after: Sequence[asyncio.Event]
    written: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Written:
    """What became of a call's writes, in order; `token` is None where nothing was committed."""

    ids: Sequence[str]
    outcomes: Sequence[WriteOutcome]
    visible: bool
    token: pb.WriteToken | None

    def told(self, response: Response) -> Response:
        """The response, with all of it."""
        add = response.statuses.add
        for id, outcome in zip(self.ids, self.outcomes, strict=True):
            if outcome.version is not None:
                # Filled in place: a message built beside and copied in costs four times as much.
                version = add(id=id).version
                version.term, version.seq = outcome.version.term, outcome.version.seq
            elif outcome.error is None:
                add(id=id)
            else:
                error = outcome.error
                code = status.number(status.code_of(error))
                add(id=id, code=code, message=str(error), field=error.field)
        response.visible = self.visible
        if self.token is not None:
            response.token.CopyFrom(self.token)
        return response


class Ingest:
    """Everything that changes documents."""

    def __init__(
        self, catalog: Directory, models: Models, limits: Limits, visible: Visible = Served.wait_for
    ) -> None:
        """`visible`: whether every read that begins anywhere sees positions, by log, before a deadline."""
        self._catalog = catalog
        self._visible = visible
        self._models = models
        self._limits = limits
        self._committers = Committers(catalog)
        self._turns = Turns()

    async def upsert(self, request: pb.UpsertRequest, tenant: str, deadline: Deadline) -> pb.UpsertResponse:
        """Replace whole documents; a status each, in order."""
        checked = await self._check_upsert(request, tenant, deadline)
        written = await self._finish(checked, self._submit(checked), deadline, refuse_all=True)
        return written.told(pb.UpsertResponse())

    async def upsert_stream(
        self, requests: AsyncIterator[pb.UpsertRequest], tenant: str, deadline: Deadline
    ) -> AsyncIterator[pb.UpsertResponse]:
        """The same for a stream: batches are embedded side by side and committed in order."""

        #: Set when a batch that was submitted is written; those that are not, in order.
        unwritten: list[asyncio.Event] = []

        async def queued() -> AsyncIterator[_Sent]:
            before: Served | None = None
            checks = in_order(requests, lambda r: self._check_upsert(r, tenant, deadline), STREAM_BATCHES)
            async with aclosing(checks):
                async for checked in checks:
                    unwritten[:] = [each for each in unwritten if not each.is_set()]
                    if before not in (None, checked.served):
                        # The former generation's may have to be written again, which comes first.
                        for each in unwritten:
                            await each.wait()
                    before = checked.served
                    sent = _Sent(checked, self._submit(checked), tuple(unwritten))
                    unwritten.append(sent.written)
                    yield sent

        async def finished(sent: _Sent) -> _Written:
            try:
                return await self._finish(sent.checked, sent.submission, deadline, after=sent.after)
            finally:
                sent.written.set()

        written = in_order(queued(), finished, STREAM_BATCHES)
        async with aclosing(written):
            async for w in written:
                yield w.told(pb.UpsertResponse())

    async def patch(self, request: pb.PatchRequest, tenant: str, deadline: Deadline) -> pb.PatchResponse:
        """Set and clear attributes; text and vector stay."""
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_wait(request.wait)
        wire.check_rows(request.patches, "patches", self._limits.max_batch_rows)
        reader = wire.AttributeReader(served.collection.schema, self._limits.max_attributes_bytes)
        writes: list[Write | RingfortError] = []
        for i, patch in enumerate(request.patches):
            try:
                writes.append(self._patch(served, patch, reader))
            except RingfortError as error:
                writes.append(error.within(f"patches[{i}]"))
        ids = [patch.id for patch in request.patches]
        checked = _Checked(served, "patches", ids, writes, request.wait)
        written = await self._finish(checked, self._submit(checked), deadline, refuse_all=True)
        return written.told(pb.PatchResponse())

    async def delete(self, request: pb.DeleteRequest, tenant: str, deadline: Deadline) -> pb.DeleteResponse:
        """Remove documents by id, or all that match a filter at the time."""
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_wait(request.wait)
        if bool(request.ids) == request.HasField("filter"):
            raise InvalidField("ids", "give ids or a filter, one of the two")
        if request.ids:
            wire.check_rows(request.ids, "ids", self._limits.max_batch_rows)
            ids = wire.keys(request.ids, "ids", self._limits.max_id_bytes)
            served, done = await self._committed(served, [Remove(id) for id in ids], deadline)
            for i, outcome in enumerate(done.outcomes):
                if outcome.error is not None:
                    raise outcome.error.within(f"ids[{i}]")
            deleted, upto = sum(outcome.version is not None for outcome in done.outcomes), done.positions
        else:
            filter = wire.filter_from(request.filter)
            if filter is None:
                raise InvalidField("filter", "is empty")
            filter = check(filter, served.collection.schema)
            served, deleted, upto = await self._delete_matching(served, filter, deadline)
        return pb.DeleteResponse(
            deleted=deleted,
            visible=request.wait == pb.VISIBLE and await self._visible(served, upto, deadline),
            token=wire.token_on_wire(upto),
        )

    async def close(self) -> None:
        """Commit what waits and end."""
        await self._committers.close()

    async def _check_upsert(self, request: pb.UpsertRequest, tenant: str, deadline: Deadline) -> _Checked:
        served = self._catalog.resolve(tenant, request.collection)
        wire.check_wait(request.wait)
        wire.check_rows(request.documents, "documents", self._limits.max_batch_rows)
        checked = await self._documents(served, request)
        texts = [one.text for one in checked if isinstance(one, _Wanting)]
        vectors: Iterator[np.ndarray] = iter(())
        remade: frozenset[int] = frozenset()
        if texts:
            remade = frozenset(i for i, one in enumerate(checked) if isinstance(one, _Wanting))
            # Documents are rarely embedded twice; caching them would only push queries out.
            made = await self._models.embed_for(
                served.collection, texts, InputType.DOCUMENT, deadline, use_cache=False
            )
            vectors = iter(made.vectors)
        writes = [one.with_vector(next(vectors)) if isinstance(one, _Wanting) else one for one in checked]
        ids = [document.id for document in request.documents]
        return _Checked(served, "documents", ids, writes, request.wait, remade)

    async def _documents(
        self, served: Served, request: pb.UpsertRequest
    ) -> list[Upsert | _Wanting | RingfortError]:
        """Every document of a request, checked; one that is refused as its error."""
        rows: Iterable[np.ndarray | None] = itertools.repeat(None, len(request.documents))
        sound: Iterable[bool] = itertools.repeat(True, len(request.documents))
        if request.HasField("vectors"):
            matrix = wire.array_from(request.vectors, "vectors", dim=served.collection.dim, check=False)
            if len(matrix) != len(request.documents):
                raise InvalidField("vectors.rows", f"{len(matrix)} rows, {len(request.documents)} documents")
            rows, sound = list(matrix), wire.rows_in_bounds(matrix).tolist()
        reader = wire.AttributeReader(served.collection.schema, self._limits.max_attributes_bytes)
        checked: list[Upsert | _Wanting | RingfortError] = []
        for document, vector, inside in zip(request.documents, rows, sound, strict=True):
            if len(checked) % SLICE_ROWS == SLICE_ROWS - 1:
                await self._turns.next()
            try:
                if not inside:
                    raise InvalidField("vector", wire.OUT_OF_BOUNDS)
                checked.append(self._document(served, document, vector, reader, request.truncate))
            except RingfortError as error:
                checked.append(error.within(f"documents[{len(checked)}]"))
        return checked

    def _document(
        self,
        served: Served,
        document: pb.Document,
        vector: np.ndarray | None,
        reader: wire.AttributeReader,
        truncate: bool,
    ) -> Upsert | _Wanting:
        """One document; fields of its errors are its own. vector: float32 [dim], from beside it."""
        id = wire.key(document.id, "id", self._limits.max_id_bytes)
        text = document.text if document.HasField("text") else None
        if text is not None:
            if "\0" in text:
                raise InvalidField("text", "holds a NUL character")
            text = self._models.check_text(text, "text", truncate=truncate)
        attributes = reader.read(document.attributes, document.ByteSize())
        if document.HasField("vector"):
            if vector is not None:
                raise InvalidField("vector", "is given, and so is `vectors`")
            if document.vector.rows != 1:
                raise InvalidField("vector.rows", f"{document.vector.rows} rows where one is meant")
            vector = wire.array_from(document.vector, "vector", dim=served.collection.dim)[0]
        if_version = wire.version_from(document.if_version) if document.HasField("if_version") else None
        if vector is not None:
            return Upsert(id, text, attributes, vector, if_version)
        if served.collection.model is None:
            raise InvalidField("vector", "is missing, and the collection has no model to make it")
        if not text:
            raise InvalidField("text", "is empty, and there is no vector")
        return _Wanting(id, text, attributes, if_version)

    def _patch(self, served: Served, patch: pb.Patch, reader: wire.AttributeReader) -> Patch:
        wire.key(patch.id, "id", self._limits.max_id_bytes)
        for i, name in enumerate(patch.clear):
            if name not in served.collection.schema:
                raise InvalidField(f"clear[{i}]", f"the collection declares no attribute {name!r}")
        attributes = reader.read(patch.attributes, patch.ByteSize())
        if_version = wire.version_from(patch.if_version) if patch.HasField("if_version") else None
        return Patch(patch.id, attributes, tuple(patch.clear), if_version)

    async def _delete_matching(
        self, served: Served, filter: Filter, deadline: Deadline
    ) -> tuple[Served, int, dict[str, int]]:
        deleted = 0
        upto = served.by_log(await self._catalog.store.positions(served.collection))
        while True:
            if not await served.wait_for(upto, deadline):
                deadline.require("waiting for the shards")
            matches = await served.each_shard(
                lambda replica, epoch: replica.matching(filter, DELETE_ROWS, epoch=epoch), deadline
            )
            found = [match for of_shard in matches for match in of_shard][:DELETE_ROWS]
            if not found:
                return served, deleted, upto
            # By version: a document that changed meanwhile is looked at again in the next round.
            writes = [Remove(id, version) for id, version in found]
            served, done = await self._committed(served, writes, deadline)
            deleted += sum(outcome.version is not None for outcome in done.outcomes)
            upto |= {log: max(upto.get(log, 0), position) for log, position in done.positions.items()}
            for outcome in done.outcomes:
                if outcome.error is not None and not isinstance(outcome.error, VersionConflict):
                    raise outcome.error

    def _submit(self, checked: _Checked) -> Submission:
        writes = [write for write in checked.writes if not isinstance(write, RingfortError)]
        return self._committers.submit(checked.served, writes)

    async def _finish(
        self,
        checked: _Checked,
        committing: Submission,
        deadline: Deadline,
        *,
        refuse_all: bool = False,
        after: Sequence[asyncio.Event] = (),
    ) -> _Written:
        """Wait for the commit and, where asked, for the shards; statuses in the order of the call.

        With `refuse_all`, a call of which every write was refused fails with the first one's error. What has
        to be written again is so `after` all of these are set.
        """
        done, served = await committing.committed(deadline), checked.served
        if done.late:
            for each in after:
                await each.wait()
            served, done = await self._once_more(checked, done, deadline)
        left = iter(done.outcomes)
        outcomes = [
            WriteOutcome(error=write) if isinstance(write, RingfortError) else next(left)
            for write in checked.writes
        ]
        for i, (write, outcome) in enumerate(zip(checked.writes, outcomes, strict=True)):
            if outcome.error is not None and outcome.error is not write:
                outcome.error.within(f"{checked.field}[{i}]")
        if refuse_all and outcomes[0].error is not None and all(o.error is not None for o in outcomes):
            raise outcomes[0].error
        visible = False
        if checked.wait == pb.VISIBLE:
            began_s = time.perf_counter()
            visible = await self._visible(served, done.positions, deadline)
            _VISIBLE.took(time.perf_counter() - began_s)
        token = wire.token_on_wire(done.positions) if any(done.positions.values()) else None
        return _Written(checked.ids, outcomes, visible, token)

    async def _committed(
        self, served: Served, writes: Sequence[Write], deadline: Deadline
    ) -> tuple[Served, Committed]:
        """Writes without vectors, committed; and the generation that was the live one by then."""
        done = await self._committers.submit(served, writes).committed(deadline)
        if not done.late:
            return served, done
        return await self._once_more(_Checked(served, "", (), writes, pb.DURABLE), done, deadline)

    async def _once_more(
        self, checked: _Checked, done: Committed, deadline: Deadline
    ) -> tuple[Served, Committed]:
        """Write again what was refused because another generation becomes the live one, when it is that.

        Vectors that were made here are made again, in its space; those that were brought have to be of it.
        """
        served = checked.served
        writes: list[Write] = [write for write in checked.writes if not isinstance(write, RingfortError)]
        places = [i for i, write in enumerate(checked.writes) if not isinstance(write, RingfortError)]
        made = {at for at, place in enumerate(places) if place in checked.made}
        outcomes, positions = list(done.outcomes), dict(done.positions)
        while late := [i for i, o in enumerate(outcomes) if isinstance(o.error, GenerationChanged)]:
            await asyncio.sleep(min(AGAIN_S, deadline.require("the change of generations")))
            now = self._catalog.of(served.collection.uid)
            if now is None:
                raise NotFound("collection", served.collection.name)
            if now is not served:
                texts = [
                    write.text or "" for i in late if i in made and isinstance(write := writes[i], Upsert)
                ]
                vectors: Iterator[np.ndarray] = iter(())
                if texts:
                    again = await self._models.embed_for(
                        now.collection, texts, InputType.DOCUMENT, deadline, use_cache=False
                    )
                    vectors = iter(again.vectors)
                for i in late:
                    if i in made and isinstance(write := writes[i], Upsert):
                        writes[i] = structs.replace(write, vector=next(vectors))
                    elif isinstance(writes[i], Upsert) and now.collection.space != served.collection.space:
                        refusal = SpaceMismatch(served.collection.space, now.collection.space)
                        outcomes[i] = WriteOutcome(error=refusal.within("vector"))
                served = now
                late = [i for i in late if isinstance(outcomes[i].error, GenerationChanged)]
            told = await self._committers.submit(served, [writes[i] for i in late]).committed(deadline)
            for i, outcome in zip(late, told.outcomes, strict=True):
                outcomes[i] = outcome
            for log_id, position in told.positions.items():
                positions[log_id] = max(positions.get(log_id, 0), position)
        return served, Committed(outcomes, positions)
