"""Everything a caller can be told, as errors that carry facts.

An error's class says what kind of thing happened, its attributes say which; the message is built from
both. `services/status.py` maps each class to a canonical gRPC code, and a test walks the subclasses
against that table.
"""


def reason_of(error: "type[RingfortError]") -> str:
    """An error class in the wire's spelling: DimensionMismatch -> DIMENSION_MISMATCH."""
    name = error.__name__
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()


class RingfortError(Exception):
    """The service could not do what was asked."""

    #: ErrorInfo.reason on the wire.
    @property
    def reason(self) -> str:
        """The error class in the wire's spelling."""
        return reason_of(type(self))

    #: The request's field at fault, where one is; "" for the whole of what was given.
    field: str = ""
    #: When to try again, where that helps.
    retry_after_ms: int | None = None

    def within(self, parent: str) -> "RingfortError":
        """This error, about a part of the request: `id` within `documents[3]` is `documents[3].id`."""
        self.field = f"{parent}.{self.field}" if self.field else parent
        return self

    def again(self) -> "RingfortError":
        """An error that says the same, to be told of another part of the request."""
        other = type(self).__new__(type(self), *self.args)
        vars(other).update(vars(self))
        return other


class InvalidField(RingfortError):
    """A field of the request cannot be accepted."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem

    def within(self, parent: str) -> RingfortError:
        """As of every error; the message says it, too."""
        super().within(parent)
        self.args = (f"{self.field}: {self.problem}",)
        return self


class InvalidFilter(InvalidField):
    """A filter does not parse, or does not fit the collection's attributes."""


class DimensionMismatch(InvalidField):
    """A vector has another dimension than its collection."""

    def __init__(self, field: str, got: int, want: int) -> None:
        super().__init__(field, f"the vector has dimension {got}, the collection {want}")
        self.got, self.want = got, want


class TooLarge(InvalidField):
    """A request is larger than this service reads."""

    def __init__(self, field: str, limit_bytes: int) -> None:
        super().__init__(field, f"is over the limit of {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class PreconditionFailed(RingfortError):
    """The request is well-formed, but the state of things does not allow it."""


class SpaceMismatch(PreconditionFailed):
    """Vectors of two embedding spaces may never be compared."""

    def __init__(self, got: str, want: str) -> None:
        super().__init__(f"vectors of space {got} cannot be compared with vectors of space {want}")
        self.got, self.want = got, want


class UnknownLog(PreconditionFailed):
    """A write token names a log, or a position of it, that this service never had."""

    field = "read_after"

    def __init__(self, log_id: str, position: int, counter: int | None = None) -> None:
        known = "is unknown here" if counter is None else f"ends at {counter}"
        super().__init__(f"read_after: position {position} of log {log_id}, which {known}")
        self.log_id, self.position, self.counter = log_id, position, counter


class LogPurged(UnknownLog):
    """The log no longer knows what was deleted since a position: its reader has to begin with nothing."""

    def __init__(self, log_id: str, position: int, floor: int) -> None:
        super().__init__(log_id, position)
        self.args = (
            f"log {log_id} has forgotten deletes up to {floor}, and the reader stands at {position}",
        )
        self.floor = floor


class NotFound(RingfortError):
    """There is no such thing."""

    def __init__(self, kind: str, name: str, field: str = "") -> None:
        super().__init__(f"no {kind} named {name!r}")
        self.kind, self.name, self.field = kind, name, field or kind


class AlreadyExists(RingfortError):
    """The name is taken."""

    def __init__(self, kind: str, name: str, field: str = "name") -> None:
        super().__init__(f"{kind} {name!r} already exists")
        self.kind, self.name, self.field = kind, name, field


class VersionConflict(RingfortError):
    """The stored document is at another version than `if_version` asked for."""

    field = "if_version"

    def __init__(self, id: str, wanted: object, current: object) -> None:
        super().__init__(f"document {id!r} is at version {current}, not at {wanted}")
        self.id, self.wanted, self.current = id, wanted, current


class StaleEpoch(RingfortError):
    """The request was planned with another shard map than the replica holds."""

    def __init__(self, seen: int, current: int) -> None:
        super().__init__(f"planned at epoch {seen}, the replica is at {current}")
        self.seen, self.current = seen, current


class Overloaded(RingfortError):
    """A queue or the in-flight limit is full; try again a little later."""

    def __init__(self, what: str, limit: int, retry_after_ms: int = 100) -> None:
        super().__init__(f"{what} is full ({limit})")
        self.what, self.limit, self.retry_after_ms = what, limit, retry_after_ms


class QuotaExceeded(RingfortError):
    """The caller's rate is used up."""

    def __init__(self, what: str, limit: float, retry_after_ms: int) -> None:
        super().__init__(f"{what} is limited to {limit:g} a second")
        self.what, self.limit, self.retry_after_ms = what, limit, retry_after_ms


class Unavailable(RingfortError):
    """A part that the answer needs is away; it may be back in a moment."""

    retry_after_ms = 500


class ShardUnavailable(Unavailable):
    """Fewer shards answered than the request insists on."""

    def __init__(self, answered: int, asked: int, min_coverage: float = 0.0) -> None:
        super().__init__(f"{answered} of {asked} shards answered, min_coverage is {min_coverage:g}")
        self.answered, self.asked, self.min_coverage = answered, asked, min_coverage


class EmbedderUnavailable(Unavailable):
    """No embedder of the model can answer."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"no embedder of {model} can answer: {why}")
        self.model, self.why = model, why


class StorageUnavailable(Unavailable):
    """The database cannot be reached or did not confirm the commit; by name where it is not the only one."""

    def __init__(self, why: str, database: str = "") -> None:
        super().__init__(
            f"the database {database!r} is away: {why}" if database else f"the database is away: {why}"
        )
        self.why, self.database = why, database


class GenerationChanged(Unavailable):
    """Another generation of the collection has become the live one, or is about to."""

    retry_after_ms = 100

    def __init__(self, collection: str, generation: int) -> None:
        super().__init__(f"generation {generation} of collection {collection!r} is not the live one any more")
        self.collection, self.generation = collection, generation


class DeadlineExceeded(RingfortError):
    """The caller's time ran out."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the deadline passed in {stage}")
        self.stage = stage


class SegmentCorrupt(RingfortError):
    """A segment's bytes are not those that were written."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


class NotImplementedHere(RingfortError):
    """Part of the contract that this release does not answer yet."""

    def __init__(self, what: str, field: str = "") -> None:
        super().__init__(f"{what} is not implemented in this release")
        self.what, self.field = what, field


class PermissionDenied(RingfortError):
    """The API key does not allow this."""


class Unauthenticated(RingfortError):
    """An API key is needed, and none that is known was given."""
