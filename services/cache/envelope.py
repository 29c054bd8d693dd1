"""What an entry says, and whether an answer may be served from one.

Entries are MessagePack arrays that begin with their format version. Fields may be added at the end,
with a default: an old reader passes over them, a new reader of old bytes takes the default. Any other
change takes a new version, which readers of the old one take for a miss.
"""

import math
from collections.abc import Mapping

import msgspec
import numpy as np

ANSWER_VERSION = 1
EMBEDDING_VERSION = 1


class AnswerEntry(msgspec.Struct, frozen=True, array_like=True, tag=ANSWER_VERSION):
    """A whole answer and what it was computed from: [version, positions, body, stored_at_ms, cost_ms].

    `positions`: log_id -> a position that the answer certainly includes, read *before* the search.
    `body`: the serialized protobuf answer. `stored_at_ms`: wall clock when the positions were read.
    `cost_ms`: how long it took to compute.
    """

    positions: dict[str, int]
    body: bytes
    stored_at_ms: int
    cost_ms: int = 0

    def reaches(self, positions: Mapping[str, int]) -> bool:
        """Whether the answer includes the logs up to these positions."""
        return reaches(self.positions, positions)

    def encode(self) -> bytes:
        """The entry as bytes."""
        return _encoder.encode(self)

    @staticmethod
    def decode(data: bytes) -> "AnswerEntry | None":
        """The entry in these bytes; None where they are damaged or of another version."""
        try:
            return _answer_decoder.decode(data)
        except msgspec.DecodeError:
            return None


class EmbeddingEntry(msgspec.Struct, frozen=True, array_like=True, tag=EMBEDDING_VERSION):
    """One text's embedding: [version, vector, tokens, truncated].

    `vector`: little-endian float32; its space is that of the variant in the key.
    """

    vector: bytes
    tokens: int
    truncated: bool

    @classmethod
    def of(cls, vector: np.ndarray, tokens: int, truncated: bool) -> "EmbeddingEntry":
        """The entry of a float32 vector [dim]."""
        return cls(vector.astype("<f4", copy=False).tobytes(), int(tokens), bool(truncated))

    def array(self) -> np.ndarray:
        """The vector, float32 [dim]: a read-only view of the entry's bytes."""
        return np.frombuffer(self.vector, dtype="<f4")

    def encode(self) -> bytes:
        """The entry as bytes."""
        return _encoder.encode(self)

    @staticmethod
    def decode(data: bytes) -> "EmbeddingEntry | None":
        """The entry in these bytes; None where they are damaged or of another version."""
        try:
            entry = _embedding_decoder.decode(data)
        except msgspec.DecodeError:
            return None
        return entry if entry.vector and len(entry.vector) % 4 == 0 else None


_encoder = msgspec.msgpack.Encoder()
_answer_decoder = msgspec.msgpack.Decoder(AnswerEntry)
_embedding_decoder = msgspec.msgpack.Decoder(EmbeddingEntry)


#: A refresh begins so much before an answer may be served no more, where computing it takes less.
LEAST_LEAD = 1 / 20


def reaches(had: Mapping[str, int], wanted: Mapping[str, int]) -> bool:
    """Whether what is had of each log goes up to what is wanted of it."""
    return all(had.get(log_id, -1) >= position for log_id, position in wanted.items())


def includes(entry: AnswerEntry, known: Mapping[str, int]) -> bool:
    """Whether the answer includes all that is known, and of no other logs than those."""
    return entry.positions.keys() == known.keys() and reaches(entry.positions, known)


def due(entry: AnswerEntry, now_ms: int, max_staleness_ms: int, chance: float) -> bool:
    """Whether a superseded answer, still served, should be computed anew before it may be served no more.

    The nearer that moment and the longer computing takes, the likelier, so that of many readers one begins
    early enough for the others not to wait (Vattani, Chierichetti, Lowenstein: "Optimal probabilistic cache
    stampede prevention", VLDB 2015, with beta 1). `chance`: uniform in [0, 1).
    """
    lead_ms = max(entry.cost_ms, max_staleness_ms * LEAST_LEAD)
    return now_ms - entry.stored_at_ms - lead_ms * math.log(1.0 - chance) >= max_staleness_ms


def fresh(
    entry: AnswerEntry,
    known: Mapping[str, int] | None,
    now_ms: int,
    max_staleness_ms: int,
    *,
    superseded_at_ms: int | None = None,
) -> bool:
    """Whether the answer may be served: it includes all that is known, or is `max_staleness_ms` old at most.

    `known`: log_id -> latest position the caller knows of, for each log of the collection. An entry of
    other logs than these is never served, however young. None where the caller cannot say what is known:
    then the age alone decides. The age counts from `superseded_at_ms`, the
    moment the first position beyond the entry's became known, or from when the entry was made, which
    is earlier. An entry that claims to be from the future has no age to trust.
    """
    if known is not None:
        if entry.positions.keys() != known.keys():
            return False
        if includes(entry, known):
            return True
    since_ms = entry.stored_at_ms if superseded_at_ms is None else superseded_at_ms
    return 0 <= now_ms - since_ms <= max_staleness_ms and max_staleness_ms > 0
