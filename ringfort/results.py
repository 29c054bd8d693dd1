"""What the service answers, as plain values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import overload

import grpc

from protos.ringfort import v1 as pb
from ringfort import wire
from ringfort.documents import AttributeValue, Document, Vector, Version, WriteToken
from ringfort.errors import code_of_number

SearchAnswer = pb.SearchResponse | pb.RecommendResponse


@dataclass(frozen=True, slots=True)
class Failure:
    """One document that was refused, while the others of its batch were written."""

    id: str
    code: grpc.StatusCode
    message: str
    field: str


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What became of a write. `visible`: every written document is searchable now."""

    written: int = 0
    failures: tuple[Failure, ...] = ()
    token: WriteToken = field(default_factory=WriteToken)
    visible: bool = True

    @classmethod
    def of(cls, answer: pb.UpsertResponse | pb.PatchResponse) -> "WriteResult":
        """The result of one batch."""
        failures = tuple(
            Failure(status.id, code_of_number(status.code), status.message, status.field)
            for status in answer.statuses
            if status.code
        )
        written = len(answer.statuses) - len(failures)
        return cls(written, failures, WriteToken(dict(answer.token.positions)), answer.visible)

    @classmethod
    def total(cls, results: Iterable["WriteResult"]) -> "WriteResult":
        """The result of several batches as one; nothing written is visible."""
        written, failures, token, visible = 0, list[Failure](), WriteToken(), True
        for result in results:
            written += result.written
            failures += result.failures
            token |= result.token
            visible &= result.visible
        return cls(written, tuple(failures), token, visible)


@dataclass(frozen=True, slots=True)
class DeleteResult:
    """How many documents a delete removed. `visible`: no search finds them any more."""

    deleted: int
    visible: bool
    token: WriteToken

    @classmethod
    def of(cls, answer: pb.DeleteResponse) -> "DeleteResult":
        """The answer as a value."""
        return cls(answer.deleted, answer.visible, WriteToken(dict(answer.token.positions)))


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of the shards an answer speaks for."""

    shards_asked: int
    shards_answered: int

    @property
    def complete(self) -> bool:
        """Whether every shard answered."""
        return self.shards_answered >= self.shards_asked


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds the service spent, by stage; a stage that did not run is 0."""

    total_ms: float
    queue_ms: float
    tokenize_ms: float
    inference_ms: float
    cache_ms: float
    embed_ms: float
    search_ms: float
    merge_ms: float
    rank_ms: float

    @classmethod
    def of(cls, timings: pb.Timings) -> "Timings":
        """The answer's timings as a value."""
        return cls(**{each.name: getattr(timings, each.name) for each in fields(cls)})


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of a recommendation did; `skipped` says why it did not run, "" where it did."""

    name: str
    took_ms: float
    candidates: int
    skipped: str


@dataclass(frozen=True, slots=True)
class Hit:
    """One found document; a larger score is always better.

    `features` is what the ranker saw (recommendations only), `vector` is float32 [dim] where asked for.
    """

    id: str
    score: float
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    text: str | None = None
    vector: Vector | None = field(default=None, compare=False)
    version: Version | None = None
    features: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an answer comes from. `served_from` is INDEX, L1 or REDIS."""

    coverage: Coverage
    generation: int
    space: str
    variant: str
    epoch: int
    served_from: str
    timings: Timings


def _provenance(answer: SearchAnswer | pb.BatchSearchResponse) -> dict[str, object]:
    return {
        "coverage": Coverage(answer.coverage.shards_asked, answer.coverage.shards_answered),
        "generation": answer.generation,
        "space": answer.space,
        "variant": answer.variant,
        "epoch": answer.epoch,
        "served_from": pb.ServedFrom.Name(answer.served_from),
        "timings": Timings.of(answer.timings),
    }


@dataclass(frozen=True, slots=True)
class SearchResult(Provenance, Sequence[Hit]):
    """The hits, best first, as a sequence; `stages` and `ranker` are those of a recommendation."""

    hits: tuple[Hit, ...]
    stages: tuple[Stage, ...] = ()
    ranker: str = ""

    @classmethod
    def of(cls, answer: SearchAnswer) -> "SearchResult":
        """The answer as a value."""
        stages: tuple[Stage, ...] = ()
        ranker = ""
        if isinstance(answer, pb.RecommendResponse):
            stages = tuple(Stage(s.name, s.took_ms, s.candidates, s.skipped) for s in answer.stages)
            ranker = answer.ranker
        return cls(
            **_provenance(answer),  # type: ignore[arg-type]  # by name
            hits=tuple(_hit(hit) for hit in answer.hits),
            stages=stages,
            ranker=ranker,
        )

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


def _hit(hit: pb.Hit) -> Hit:
    return Hit(
        id=hit.id,
        score=hit.score,
        attributes=wire.from_values(hit.attributes),
        text=hit.text if hit.HasField("text") else None,
        vector=wire.from_matrix(hit.vector)[0] if hit.HasField("vector") else None,
        version=Version(hit.version.term, hit.version.seq) if hit.HasField("version") else None,
        features=dict(hit.features),
    )


@dataclass(frozen=True, slots=True)
class BatchSearchResult(Provenance):
    """The answers to many queries.

    `ids[i]` are the hits of query i, best first; `scores` is float32 [queries, k], -inf beyond a query's
    last hit; `row_served_from[i]` says where answer i came from.
    """

    ids: tuple[tuple[str, ...], ...]
    scores: Vector
    row_served_from: tuple[str, ...]

    @classmethod
    def of(cls, answer: pb.BatchSearchResponse) -> "BatchSearchResult":
        """The answer as a value."""
        k = answer.scores.dim
        ids = tuple(tuple(answer.ids[row * k : row * k + count]) for row, count in enumerate(answer.counts))
        return cls(
            **_provenance(answer),  # type: ignore[arg-type]  # by name
            ids=ids,
            scores=wire.from_matrix(answer.scores),
            row_served_from=tuple(pb.ServedFrom.Name(served) for served in answer.row_served_from),
        )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class RerankHit:
    """The score of one text; `index` is its place among the texts that were sent."""

    index: int
    score: float


@dataclass(frozen=True, slots=True)
class Collection:
    """A named set of documents with one schema. `model` is "" where documents bring their own vectors."""

    name: str
    model: str
    dim: int
    metric: str
    attributes: Mapping[str, str]
    slots: int
    shards: int
    replicas: int
    index: str
    max_staleness_ms: int
    generation: int
    space: str
    epoch: int
    aliases: tuple[str, ...]
    created_at: datetime

    @classmethod
    def of(cls, answer: pb.Collection) -> "Collection":
        """The answer as a value."""
        return cls(
            name=answer.name,
            model=answer.model,
            dim=answer.dim,
            metric=pb.Metric.Name(answer.metric).lower(),
            attributes={
                name: pb.AttributeType.Name(type_).lower()
                for name, type_ in sorted(answer.attributes.items())
            },
            slots=answer.slots,
            shards=answer.shards,
            replicas=answer.replicas,
            index=answer.index.kind or "auto",
            max_staleness_ms=answer.max_staleness_ms,
            generation=answer.generation,
            space=answer.space,
            epoch=answer.epoch,
            aliases=tuple(answer.aliases),
            created_at=answer.created_at.ToDatetime(tzinfo=UTC),
        )


def documents_in_order(ids: Sequence[str], answer: pb.GetResponse) -> list[Document | None]:
    """The documents found, each in the place of its id; None where there is none."""
    found = {message.id: wire.from_document(message) for message in answer.documents}
    return [found.get(id) for id in ids]
