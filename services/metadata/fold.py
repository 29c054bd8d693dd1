"""What a batch of writes comes to (pure): decided here, done by log.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from services.metadata.codec import STORED, attributes_to_json
from shard_router.errors import DimensionMismatch, InvalidField, NotFound, RingfortError, VersionConflict
from shard_router.model import (
    ABSENT,
    Attributes,
    LogRow,
    Patch,
    Remove,
    Upsert,
    Version,
    Write,
    WriteOutcome,
)


class Draft(msgspec.Struct, frozen=True, gc=False):
    """A document as a batch leaves it.

    `ordinal` counts from 1 within the batch: its position is the counter before the batch plus that.
    """

    id: str
    slot: int
    ordinal: int
    deleted: bool
    text: str | None
    attributes: Attributes
    attributes_json: str
    #: float32 [dim]; None for a tombstone, and where the stored vector stays.
    vector: np.ndarray | None

    @property
    def moves(self) -> bool:
        """Whether the stored vector stays and follows the document to its new position."""
        return self.vector is None and not self.deleted


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows to write, in order of position and each id once, and what to tell each writer."""

    #: Of every version that the batch makes.
    term: int
    #: Positions the batch takes; a document written twice leaves one of them without a row.
    positions: int
    drafts: Sequence[Draft]
    #: Per write: its ordinal, None where nothing changed, or the error that refused it.
    results: Sequence[int | RingfortError | None]
    #: The counter that conditions were checked against; None where there were none.
    checked_at: int | None

    def outcomes(self, after: int) -> list[WriteOutcome]:
        """Outcomes in the order of the writes, for a batch that started at position `after`."""
        return [
            WriteOutcome(version=Version(self.term, after + result))
            if isinstance(result, int)
            else WriteOutcome(error=result)
            for result in self.results
        ]

    def rows(self, after: int) -> list[LogRow]:
        """The rows as the log holds them, for a batch that started at position `after`."""
        return [
            LogRow(
                draft.id,
                draft.slot,
                Version(self.term, after + draft.ordinal),
                draft.deleted,
                draft.text,
                draft.attributes,
            )
            for draft in self.drafts
        ]

    def matrix(self, dim: int) -> np.ndarray:
        """Vectors of the drafts, float32 [drafts, dim]; zeros where a draft has none."""
        vectors = [draft.vector for draft in self.drafts if draft.vector is not None]
        if len(vectors) == len(self.drafts) > 0:
            return np.concatenate(vectors, dtype=STORED).reshape(len(vectors), dim)
        matrix = np.zeros((len(self.drafts), dim), dtype=STORED)
        for row, draft in enumerate(self.drafts):
            if draft.vector is not None:
                matrix[row] = draft.vector
        return matrix


def conditional(writes: Sequence[Write]) -> dict[str, bool]:
    """Ids whose stored state decides the batch, and whether their text and attributes are needed too."""
    needed: dict[str, bool] = {}
    for write in writes:
        if isinstance(write, Patch):
            needed[write.id] = True
        elif isinstance(write, Remove) or write.if_version is not None:
            needed.setdefault(write.id, False)
    return needed


def fold(
    writes: Sequence[Write],
    slots: Sequence[int],
    current: Mapping[str, LogRow],
    after: int | None,
    *,
    term: int,
    dim: int,
) -> Plan:
    """Apply writes one after the other to what is stored; a later write of an id sees the earlier one.

    `slots[i]` is the slot of `writes[i]`, `current` holds the stored rows of `conditional(writes)`, `after`
    is the log's counter (None where `conditional` is empty), `term` its term. A write that cannot be applied
    changes nothing and carries its own error: VersionConflict, NotFound, DimensionMismatch or InvalidField.
    """
    batch = _Batch(current, after or 0, term, dim)
    results: list[int | RingfortError | None] = []
    for write, slot in zip(writes, slots, strict=True):
        try:
            results.append(batch.apply(write, slot))
        except RingfortError as refused:
            results.append(refused)
    return Plan(term, batch.positions, list(batch.drafts.values()), results, after)


class _Batch:
    """The state a batch has reached."""

    def __init__(self, current: Mapping[str, LogRow], after: int, term: int, dim: int) -> None:
        self.positions = 0
        #: In order of ordinal: a document written again moves to the end.
        self.drafts: dict[str, Draft] = {}
        self._current = current
        self._after = after
        self._term = term
        self._dim = dim

    def apply(self, write: Write, slot: int) -> int | None:
        """The ordinal that the write takes, None where it changes nothing; raises what refuses it."""
        if write.if_version is not None or not isinstance(write, Upsert):
            version = self._version(write.id)
            if isinstance(write, Patch) and version == ABSENT:
                raise NotFound("document", write.id, "id")
            if write.if_version is not None and write.if_version != version:
                raise VersionConflict(write.id, write.if_version, version)
            if isinstance(write, Remove) and version == ABSENT:
                return None
        draft = self._draft(write, slot, self.positions + 1)
        self.positions = draft.ordinal
        self.drafts.pop(write.id, None)
        self.drafts[write.id] = draft
        return draft.ordinal

    def _version(self, id: str) -> Version:
        draft = self.drafts.get(id)
        if draft is not None:
            return ABSENT if draft.deleted else Version(self._term, self._after + draft.ordinal)
        stored = self._current.get(id)
        return ABSENT if stored is None or stored.deleted else stored.version

    def _draft(self, write: Write, slot: int, ordinal: int) -> Draft:
        text: str | None = None
        attributes: Attributes = {}
        vector: np.ndarray | None = None
        match write:
            case Upsert():
                if write.vector.shape != (self._dim,):
                    raise DimensionMismatch("vector", write.vector.size, self._dim)
                text, attributes, vector = write.text, write.attributes, write.vector
            case Patch():
                before = self.drafts.get(write.id) or self._current[write.id]
                kept = {name: value for name, value in before.attributes.items() if name not in write.clear}
                text, attributes = before.text, {**kept, **write.attributes}
                vector = before.vector if isinstance(before, Draft) else None
        deleted = isinstance(write, Remove)
        return Draft(write.id, slot, ordinal, deleted, text, attributes, _encoded(attributes), vector)


def _encoded(attributes: Attributes) -> str:
    try:
        return attributes_to_json(attributes)
    except (TypeError, ValueError) as error:
        raise InvalidField("attributes", str(error)) from error
