"""What an upsert of any length does next: pure, so that both clients run the same one.

Batches go out on one stream, at most WINDOW of them unacknowledged. A stream lives for half its deadline
and is then replaced, so that every batch has at least the other half to be acknowledged in. One that
breaks because the service is away is opened anew and takes up at the first unacknowledged batch: an
upsert replaces whole documents, so one that arrives twice leaves what it would have left once.
"""

from collections import deque
from dataclasses import dataclass

import grpc

from protos.ringfort import v1 as pb
from ringfort.errors import ResourceExhausted, RingfortError, Unavailable, code_of_number
from ringfort.results import WriteResult

#: Batches on their way at once.
WINDOW = 4
#: How long the service may be away before the upsert fails.
PATIENCE_S = 30.0

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Open:
    """Open a stream."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Take the next batch from the source; tell `filled`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Write this request to the stream."""

    request: pb.UpsertRequest


@dataclass(frozen=True, slots=True)
class Receive:
    """Read one answer; tell `answered`, which gives the batch's result."""


@dataclass(frozen=True, slots=True)
class Close:
    """End the stream; nothing is on its way."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Done:
    """Everything is acknowledged."""


Step = Open | Fill | Send | Receive | Close | Pause | Done


class Upload:
    """The state of one upsert. Ask `next`, do as it says, tell how it went (`broke` after an error).

    `lifetime_s` is the deadline each stream is opened with; times are seconds of any monotonic clock.
    """

    def __init__(self, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        #: Batches without an acknowledgement, oldest first.
        self._pending: deque[pb.UpsertRequest] = deque()
        #: How many of them, from the oldest, went out on the open stream.
        self._sent = 0
        self._exhausted = False
        self._opened_at_s: float | None = None
        #: When the service was first found away, since the last acknowledgement.
        self._away_since_s: float | None = None
        self._breaks = 0
        self._pause_s = 0.0

    def next(self, now_s: float) -> Step:
        """What to do now."""
        if self._pause_s:
            pause, self._pause_s = Pause(self._pause_s), 0.0
            return pause
        if self._opened_at_s is not None:
            age_s = now_s - self._opened_at_s
            if age_s >= self._lifetime_s and self._sent and not self._conditional():
                # The source took so long that the deadline passed meanwhile: nobody's failure.
                return self._close()
            if age_s >= self._lifetime_s / 2:
                return Receive() if self._sent else self._close()
        # After a break one batch goes ahead, and the others follow once it is acknowledged.
        if self._sent < min(len(self._pending), 1 if self._breaks else WINDOW):
            if self._opened_at_s is None:
                self._opened_at_s = now_s
                return Open()
            self._sent += 1
            return Send(self._pending[self._sent - 1])
        if len(self._pending) < WINDOW and not self._exhausted and not self._breaks:
            return Fill()
        if self._pending:
            return Receive()
        return Done() if self._opened_at_s is None else self._close()

    def filled(self, request: pb.UpsertRequest | None) -> None:
        """The source gave this batch; None: it has no more."""
        if request is None:
            self._exhausted = True
        else:
            self._pending.append(request)

    def answered(self, answer: pb.UpsertResponse) -> WriteResult:
        """The oldest batch was answered: its result.

        Raises Unavailable or ResourceExhausted where the answer says that the service could not take some
        of it just now; handed to `broke`, that sends the batch again.
        """
        for status in answer.statuses:
            match code_of_number(status.code):
                case grpc.StatusCode.UNAVAILABLE:
                    raise Unavailable(status.message, field=status.field)
                case grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise ResourceExhausted(status.message, field=status.field, retry_after_ms=0)
        self._pending.popleft()
        self._sent -= 1
        self._away_since_s, self._breaks = None, 0
        return WriteResult.of(answer)

    def broke(self, error: RingfortError, now_s: float) -> None:
        """The stream failed: what is unacknowledged goes out again after a pause, or the error is raised.

        It is raised when the service is not just away, has been away for PATIENCE_S, or may have
        done a conditional write (`if_version`) of which nobody knows.
        """
        # Without a word on when to come back, RESOURCE_EXHAUSTED is a limit that no waiting lifts.
        passing = isinstance(error, Unavailable) or (
            isinstance(error, ResourceExhausted) and error.retry_after_ms is not None
        )
        if not passing or self._conditional():
            raise error
        if self._away_since_s is None:
            self._away_since_s = now_s
        pause_s = min(_FIRST_PAUSE_S * 2**self._breaks, _LONGEST_PAUSE_S)
        if error.retry_after_ms is not None:
            pause_s = max(pause_s, error.retry_after_ms / 1000)
        if now_s + pause_s - self._away_since_s > PATIENCE_S:
            raise error
        self._breaks += 1
        self._pause_s = pause_s
        self._close()

    def _close(self) -> Close:
        self._opened_at_s, self._sent = None, 0
        return Close()

    def _conditional(self) -> bool:
        """Whether a batch on its way holds a write that must not be done twice."""
        return any(
            document.HasField("if_version")
            for request in list(self._pending)[: self._sent]
            for document in request.documents
        )
