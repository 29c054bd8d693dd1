"""What a shard node is told and answers, as messages of protos/ringfort/internal and back."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from index_builder.segments.index_spec import Effort, IndexKind
from protos.ringfort.internal import v1 as internal
from services.shard.layout import SegmentStatus
from services.shard.rendering import RenderedHits, RenderedRow
from services.shard.replica import Replica, ShardAnswer
from shard_router import filters
from shard_router.filters import Filter
from shard_router.model import HOME, Collection, Include, LogDelta, LogRow, Version

#: Texts of filters whose parsed forms are kept.
_FILTERS_KEPT = 1_024

_encoder = msgspec.msgpack.Encoder()
_collections = msgspec.msgpack.Decoder(Collection)
_rows = msgspec.msgpack.Decoder(list[LogRow])


class Asked(NamedTuple):
    """All of a search but its queries: searches that ask alike travel together."""

    k: int
    #: The text of a checked filter; empty for none.
    filter: str
    exact: bool
    effort: Effort
    include: Include
    exclude: frozenset[str]
    epoch: int | None


class ReplicaId(NamedTuple):
    """Which replica of a node is meant."""

    collection: int
    generation: int
    shard: int
    replica: int
    database: str

    @classmethod
    def of(cls, key: internal.ReplicaKey) -> "ReplicaId":
        """As a message says it."""
        return cls(key.collection, key.generation, key.shard, key.replica, key.database or HOME)


def key_of(collection: Collection, shard: int, replica: int, database: str) -> internal.ReplicaKey:
    """Names a replica on its node."""
    return internal.ReplicaKey(
        collection=collection.uid,
        generation=collection.generation,
        shard=shard,
        replica=replica,
        database=database,
    )


def open_request(
    collection: Collection, replica: internal.ReplicaKey, slots: Sequence[int], epoch: int, log_id: str
) -> internal.OpenRequest:
    """Asks for a replica that answers for these slots from that epoch on."""
    return internal.OpenRequest(
        collection=collection_on_wire(collection), replica=replica, slots=slots, epoch=epoch, log_id=log_id
    )


def collection_on_wire(collection: Collection) -> bytes:
    """All that is known of a collection, as MessagePack."""
    return _encoder.encode(collection)


def collection_from(told: bytes) -> Collection:
    """The collection that `collection_on_wire` told."""
    return _collections.decode(told)


def delta_on_wire(delta: LogDelta) -> internal.Delta:
    """A committed batch as a message."""
    return internal.Delta(
        log_id=delta.log_id,
        after=delta.after,
        upto=delta.upto,
        rows=_encoder.encode(delta.rows),
        vectors=np.ascontiguousarray(delta.vectors, np.float32).tobytes(),
    )


def delta_from(message: internal.Delta, dim: int) -> LogDelta:
    """A committed batch of a collection of `dim` dimensions."""
    vectors = np.frombuffer(message.vectors, np.float32).reshape(-1, dim)
    return LogDelta(message.log_id, message.after, message.upto, _rows.decode(message.rows), vectors)


def filter_text(filter: Filter | None) -> str:
    """A checked filter as text; empty for none."""
    return "" if filter is None else filters.render(filter)


@functools.lru_cache(_FILTERS_KEPT)
def filter_from(text: str) -> Filter | None:
    """The checked filter of a text that `filter_text` made; the same object while it is asked for."""
    return filters.parse(text) if text else None


def search_request(replica: internal.ReplicaKey, asked: Asked, queries: np.ndarray) -> internal.SearchRequest:
    """A search of float32 [n, dim] queries."""
    return internal.SearchRequest(
        replica=replica,
        queries=queries.tobytes(),
        k=asked.k,
        filter=asked.filter,
        exact=asked.exact,
        share=asked.effort.share,
        recall=asked.effort.recall,
        attributes=asked.include.attributes,
        text=asked.include.text,
        vector=asked.include.vector,
        exclude=asked.exclude,
        epoch=asked.epoch,
    )


def queries_from(request: internal.SearchRequest, dim: int) -> np.ndarray:
    """The queries of a search, float32 [n, dim]."""
    return np.frombuffer(request.queries, np.float32).reshape(-1, dim)


def epoch_from(
    request: internal.SearchRequest
    | internal.CountRequest
    | internal.MatchingRequest
    | internal.VectorsRequest,
) -> int | None:
    """The epoch of the map by which a replica is asked; None where it is not to be checked."""
    return request.epoch if request.HasField("epoch") else None


def effort_from(request: internal.SearchRequest) -> Effort:
    """How hard a search is to look."""
    return Effort(
        request.share if request.HasField("share") else None,
        request.recall if request.HasField("recall") else None,
    )


def answer_on_wire(answer: ShardAnswer[RenderedHits]) -> internal.SearchResponse:
    """A search's answer as a message."""
    rows = [row for hits in answer.hits for row in hits.rows]
    return internal.SearchResponse(
        position=answer.position,
        took_ms=answer.took_ms,
        complete=answer.complete,
        counts=[len(hits.rows) for hits in answer.hits],
        ids=[row.id for row in rows],
        terms=[row.version.term for row in rows],
        seqs=[row.version.seq for row in rows],
        heads=[row.head for row in rows],
        scores=b"".join([hits.scores for hits in answer.hits]),
    )


def answer_from(message: internal.SearchResponse) -> ShardAnswer[RenderedHits]:
    """A search's answer as the replica gave it."""
    versions = map(Version, message.terms, message.seqs)
    rows = list(map(RenderedRow, message.ids, versions, message.heads))
    scores, hits, at = message.scores, [], 0
    for count in message.counts:
        hits.append(RenderedHits(rows[at : at + count], scores[4 * at : 4 * (at + count)]))
        at += count
    return ShardAnswer(message.position, hits, message.took_ms, message.complete)


def state_of(replica: Replica) -> internal.ReplicaState:
    """All that a replica says of itself."""
    condition, detail = replica.condition()
    return internal.ReplicaState(
        position=replica.position,
        full=True,
        condition=condition,
        detail=detail,
        figures=replica.describe(),
        stats=replica.stats(),
        segments=[
            internal.SegmentState(
                name=each.name, kind=each.kind, rows=each.rows, live=each.live, size_bytes=each.size_bytes
            )
            for each in replica.segments()
        ],
        fell=replica.fell.is_set(),
        followed=sorted(replica.followed()),
    )


def segments_from(state: internal.ReplicaState) -> list[SegmentStatus]:
    """The segments that a replica told of."""
    return [
        SegmentStatus(each.name, IndexKind(each.kind), each.rows, each.live, each.size_bytes)
        for each in state.segments
    ]


def vectors_on_wire(vectors: Mapping[str, np.ndarray]) -> internal.VectorsResponse:
    """Vectors by id as a message."""
    return internal.VectorsResponse(
        ids=vectors.keys(), vectors=b"".join([vector.tobytes() for vector in vectors.values()])
    )


def vectors_from(message: internal.VectorsResponse, dim: int) -> dict[str, np.ndarray]:
    """Vectors by id, float32 [dim], read-only."""
    rows = np.frombuffer(message.vectors, np.float32).reshape(-1, dim)
    return dict(zip(message.ids, rows, strict=True))


def matches_on_wire(found: Iterable[tuple[str, Version]]) -> internal.MatchingResponse:
    """Ids and versions as a message."""
    matches = list(found)
    return internal.MatchingResponse(
        ids=[id for id, _ in matches],
        terms=[version.term for _, version in matches],
        seqs=[version.seq for _, version in matches],
    )


def matches_from(message: internal.MatchingResponse) -> list[tuple[str, Version]]:
    """Ids and versions."""
    return list(zip(message.ids, map(Version, message.terms, message.seqs), strict=True))
