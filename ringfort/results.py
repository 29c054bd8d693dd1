"""What the service answers, as plain values."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        return cls(
            timings.total_ms,
            timings.queue_ms,
            timings.tokenize_ms,
            timings.inference_ms,
            timings.cache_ms,
            timings.embed_ms,
            timings.search_ms,
            timings.merge_ms,
            timings.rank_ms,
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of a recommendation did; `skipped` says why it did not run, "" where it did."""

    name: str
    took_ms: float
    candidates: int
    skipped: str


class Hit:
    """One found document; a larger score is always better.

    `attributes` maps names to values, `text` is None where the document has none or none was asked for,
    `vector` is float32 [dim] where asked for, `features` is what the ranker saw (recommendations only). It
    reads the answer's message when it is asked. Hits are equal where all but their vectors are.
    """

    __slots__ = ("_attributes", "_message")

    def __init__(self, message: pb.Hit) -> None:
        self._message = message
        self._attributes: Mapping[str, AttributeValue] | None = None

    @property
    def id(self) -> str:
        """The document's id."""
        return self._message.id

    @property
    def score(self) -> float:
        """How good it is, by the collection's metric or the ranker."""
        return self._message.score

    @property
    def attributes(self) -> Mapping[str, AttributeValue]:
        """The document's attributes, where asked for."""
        if self._attributes is None:
            self._attributes = wire.from_values(self._message.attributes)
        return self._attributes

    @property
    def text(self) -> str | None:
        """The document's text."""
        return self._message.text if self._message.HasField("text") else None

    @property
    def vector(self) -> Vector | None:
        """The document's vector; a read-only view of the answer."""
        return wire.from_matrix(self._message.vector)[0] if self._message.HasField("vector") else None

    @property
    def version(self) -> Version | None:
        """The version that was scored."""
        if not self._message.HasField("version"):
            return None
        return Version(self._message.version.term, self._message.version.seq)

    @property
    def features(self) -> Mapping[str, float]:
        """What the ranker saw, by feature."""
        return dict(self._message.features)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hit) and self._told() == other._told()

    __hash__ = None  # type: ignore[assignment]  # attributes are no key

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self._told().items())
        return f"Hit({told})"

    def _told(self) -> dict[str, object]:
        names = ("id", "score", "attributes", "text", "version", "features")
        return {name: getattr(self, name) for name in names}


class Provenance:
    """Where an answer comes from."""

    __slots__ = ("_answer",)
    _answer: SearchAnswer | pb.BatchSearchResponse

    @property
    def coverage(self) -> Coverage:
        """How many of the shards it speaks for."""
        told = self._answer.coverage
        return Coverage(told.shards_asked, told.shards_answered)

    @property
    def generation(self) -> int:
        """The collection's generation that was searched."""
        return self._answer.generation

    @property
    def space(self) -> str:
        """The embedding space that was searched."""
        return self._answer.space

    @property
    def variant(self) -> str:
        """How query texts were embedded."""
        return self._answer.variant

    @property
    def epoch(self) -> int:
        """The number of the shard map."""
        return self._answer.epoch

    @property
    def served_from(self) -> str:
        """INDEX, L1 or REDIS."""
        return pb.ServedFrom.Name(self._answer.served_from)

    @property
    def timings(self) -> Timings:
        """What the service spent its time on."""
        return Timings.of(self._answer.timings)


class SearchResult(Provenance, Sequence[Hit]):
    """The hits, best first, as a sequence, and where they come from.

    `stages` and `ranker` are those of a recommendation. The answer is read when it is asked.
    """

    __slots__ = ("_hits",)
    _answer: SearchAnswer

    def __init__(self, answer: SearchAnswer) -> None:
        self._answer = answer
        self._hits: tuple[Hit, ...] | None = None

    @property
    def hits(self) -> tuple[Hit, ...]:
        """The documents found, best first."""
        if self._hits is None:
            self._hits = tuple(map(Hit, self._answer.hits))
        return self._hits

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What each stage of a recommendation did."""
        if not isinstance(self._answer, pb.RecommendResponse):
            return ()
        return tuple(Stage(s.name, s.took_ms, s.candidates, s.skipped) for s in self._answer.stages)

    @property
    def ranker(self) -> str:
        """Who ranked a recommendation."""
        return self._answer.ranker if isinstance(self._answer, pb.RecommendResponse) else ""

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self._answer.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __repr__(self) -> str:
        return (
            f"SearchResult(hits={self.hits!r}, served_from={self.served_from!r}, coverage={self.coverage!r})"
        )


class BatchSearchResult(Provenance):
    """The answers to many queries, and where they come from. The answer is read when it is asked."""

    __slots__ = ("_ids",)
    _answer: pb.BatchSearchResponse

    def __init__(self, answer: pb.BatchSearchResponse) -> None:
        self._answer = answer
        self._ids: tuple[tuple[str, ...], ...] | None = None

    @property
    def ids(self) -> tuple[tuple[str, ...], ...]:
        """The hits of each query, best first."""
        if self._ids is None:
            k, flat = self._answer.scores.dim, tuple(self._answer.ids)
            self._ids = tuple(flat[i * k : i * k + count] for i, count in enumerate(self._answer.counts))
        return self._ids

    @property
    def scores(self) -> Vector:
        """float32 [queries, k], -inf beyond a query's last hit; a read-only view of the answer."""
        return wire.from_matrix(self._answer.scores)

    @property
    def row_served_from(self) -> tuple[str, ...]:
        """Where each query's answer came from: INDEX, L1 or REDIS."""
        return tuple(pb.ServedFrom.Name(served) for served in self._answer.row_served_from)

    def __len__(self) -> int:
        return len(self._answer.counts)

    def __repr__(self) -> str:
        return f"BatchSearchResult(ids={self.ids!r}, scores={self.scores!r})"


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
    #: Where its documents lie.
    databases: tuple[str, ...] = ("home",)

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
            databases=tuple(answer.databases) or ("home",),
        )


def documents_in_order(ids: Sequence[str], answer: pb.GetResponse) -> list[Document | None]:
    """The documents found, each in the place of its id; None where there is none."""
    found = {message.id: wire.from_document(message) for message in answer.documents}
    return [found.get(id) for id in ids]
