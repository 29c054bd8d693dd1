"""Calls of the DocumentService, and the cutting of documents into batches."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.calls.call import Call
from ringfort.documents import Document, Patch, Vector
from ringfort.errors import InvalidArgument
from ringfort.results import DeleteResult, WriteResult, documents_in_order

#: Well below the service's limit for one request.
MAX_BATCH_BYTES = 4 * 1024 * 1024

AnyDocument = Document | Mapping[str, object]


class Batcher:
    """Cuts documents into requests of at most `batch` documents and about MAX_BATCH_BYTES.

    Where all documents of a batch have a vector of one dimension, they travel as one packed matrix.
    """

    def __init__(self, collection: str, wait: str, batch: int, truncate: bool) -> None:
        if batch < 1:
            raise InvalidArgument("batch: at least 1 document", field="batch")
        self._collection = collection
        self._wait = wire.enum_value(pb.Wait, wait, "wait")
        self._batch, self._truncate = batch, truncate
        self._documents: list[pb.Document] = []
        self._vectors: list[Vector | None] = []
        self._bytes = 0

    def add(self, document: AnyDocument) -> pb.UpsertRequest | None:
        """Takes one more document; the request that is full before it or with it, if one is."""
        message, vector = wire.to_document(document)
        size = message.ByteSize() + (0 if vector is None else vector.nbytes)
        full = self.rest() if self._documents and self._bytes + size > MAX_BATCH_BYTES else None
        self._documents.append(message)
        self._vectors.append(vector)
        self._bytes += size
        return self.rest() if len(self._documents) >= self._batch else full

    def rest(self) -> pb.UpsertRequest | None:
        """The request of what is left, if anything is."""
        if not self._documents:
            return None
        documents, vectors = self._documents, self._vectors
        self._documents, self._vectors, self._bytes = [], [], 0
        request = pb.UpsertRequest(collection=self._collection, wait=self._wait, truncate=self._truncate)
        if (
            all(vector is not None for vector in vectors)
            and len({v.size for v in vectors if v is not None}) == 1
        ):
            request.vectors.CopyFrom(
                wire.to_matrix(np.stack([v for v in vectors if v is not None]), "vectors")
            )
        else:
            for document, vector in zip(documents, vectors, strict=True):
                if vector is not None:
                    document.vector.CopyFrom(wire.to_matrix(vector[None, :], "vector"))
        request.documents.extend(documents)
        return request


def upsert_requests(documents: Iterable[AnyDocument], batcher: Batcher) -> Iterator[pb.UpsertRequest]:
    """The requests that write the documents, made as they are asked for."""
    for document in documents:
        if request := batcher.add(document):
            yield request
    if request := batcher.rest():
        yield request


async def upsert_requests_async(
    documents: Iterable[AnyDocument] | AsyncIterable[AnyDocument], batcher: Batcher
) -> AsyncIterator[pb.UpsertRequest]:
    """The same for an iterable of either kind."""
    if isinstance(documents, AsyncIterable):
        async for document in documents:
            if request := batcher.add(document):
                yield request
        if request := batcher.rest():
            yield request
    else:
        for request in upsert_requests(documents, batcher):
            yield request


def patch(
    collection: str, patches: Iterable[Patch | Mapping[str, object]], *, wait: str = "VISIBLE"
) -> Call[pb.PatchResponse, WriteResult]:
    """Changes the attributes named and no others; None clears one. Text and vector stay.

    Patches are `Patch` or dicts with its fields. One that cannot be done fails alone.
    """
    messages = [_patch(each if isinstance(each, Patch) else Patch(**each)) for each in patches]  # type: ignore[arg-type]
    request = pb.PatchRequest(
        collection=collection, patches=messages, wait=wire.enum_value(pb.Wait, wait, "wait")
    )
    # Repeated, a patch that did succeed would meet its own version.
    repeatable = not any(message.HasField("if_version") for message in messages)
    return Call("DocumentService/Patch", request, pb.PatchResponse, WriteResult.of, repeatable)


def _patch(patch: Patch) -> pb.Patch:
    return pb.Patch(
        id=patch.id,
        attributes=wire.to_values(patch.attributes),
        clear=[name for name, value in patch.attributes.items() if value is None],
        if_version=wire.to_version(patch.if_version),
    )


def delete(
    collection: str,
    *,
    ids: Sequence[str] | None = None,
    filter: str | pb.Filter | None = None,
    wait: str = "VISIBLE",
) -> Call[pb.DeleteResponse, DeleteResult]:
    """Removes the documents with these ids (unknown ones are ignored), or all that match a filter."""
    if (ids is None) == (filter is None):
        raise InvalidArgument("ids: exactly one of ids and filter is needed", field="ids")
    request = pb.DeleteRequest(
        collection=collection,
        ids=_ids(ids or ()),
        filter=wire.to_filter(filter),
        wait=wire.enum_value(pb.Wait, wait, "wait"),
    )
    return Call("DocumentService/Delete", request, pb.DeleteResponse, DeleteResult.of)


def get(
    collection: str, ids: Sequence[str], *, include: Iterable[str] | None = None
) -> Call[pb.GetResponse, list[Document | None]]:
    """The documents with these ids, in their order; None in the place of one there is not.

    `include` names the parts wanted: attributes, text, vector (by default the first two).
    """
    ids = _ids(ids)
    request = pb.GetRequest(collection=collection, ids=ids, include=wire.to_include(include))
    return Call("DocumentService/Get", request, pb.GetResponse, partial(documents_in_order, ids))


def _ids(ids: Sequence[str]) -> Sequence[str]:
    if isinstance(ids, str):
        raise InvalidArgument("ids: a sequence of ids is needed, not one string", field="ids")
    return ids


def scan_page(
    collection: str,
    *,
    filter: str | pb.Filter | None = None,
    include: Iterable[str] | None = None,
    page_size: int = 0,
    page_token: str = "",
) -> Call[pb.ScanResponse, tuple[list[Document], str]]:
    """One page of all documents in a fixed order, and the token of the next page ("" after the last)."""
    request = pb.ScanRequest(
        collection=collection,
        filter=wire.to_filter(filter),
        page_size=page_size,
        page_token=page_token,
        include=wire.to_include(include),
    )
    return Call("DocumentService/Scan", request, pb.ScanResponse, _page)


def _page(answer: pb.ScanResponse) -> tuple[list[Document], str]:
    return [wire.from_document(message) for message in answer.documents], answer.next_page_token


def count(collection: str, *, filter: str | pb.Filter | None = None) -> Call[pb.CountResponse, int]:
    """How many documents there are, or how many match a filter."""
    request = pb.CountRequest(collection=collection, filter=wire.to_filter(filter))
    return Call("DocumentService/Count", request, pb.CountResponse, _count)


def _count(answer: pb.CountResponse) -> int:
    return answer.count
