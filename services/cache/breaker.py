"""Whether Redis may be asked now: a circuit breaker that a background probe closes again.

Up: operations run, and failures spend a budget that successes give back, so that a server which fails now
and then is put up with and one that fails every few times is not. Down: none run; a probe is due at
`retry_at_s`. Trial: a probe came through and operations run again; the first of them decides. Callers never
pay for a probe, and the pause between probes doubles until an operation succeeds, so that a server which
answers probes but not work is left alone ever longer (Nygard, "Release It!", with the probe taken out of the
callers' path).
"""

import random
from dataclasses import dataclass

#: Of a failure, by each success.
GIVEN_BACK = 0.1


@dataclass(frozen=True, slots=True)
class Up:
    """Operations run; so much of the budget of failures is spent."""

    spent: float = 0.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A probe came through; the next operation decides."""


@dataclass(frozen=True, slots=True)
class Down:
    """Nothing runs; the next probe is due at `retry_at_s` on the caller's clock."""

    retry_at_s: float


class Breaker:
    """Opens when `budget` failures are spent, pauses `backoff_ms` doubling to `max_backoff_ms`.

    A success gives GIVEN_BACK of a failure back: so many failures in a row open it, and so does a share of
    failures that stays above a tenth.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        budget: int = 5,
        backoff_ms: int = 100,
        max_backoff_ms: int = 5_000,
    ) -> None:
        self.state: Up | Trial | Down = Up()
        self._rng = rng
        self._budget = budget
        self._backoff_ms = backoff_ms
        self._max_backoff_ms = max_backoff_ms
        #: Pause after the next opening.
        self._pause_ms: float = backoff_ms

    @property
    def allows(self) -> bool:
        """Whether an operation may run."""
        return not isinstance(self.state, Down)

    def succeeded(self) -> None:
        """An operation came back. One begun before the breaker opened says nothing about now."""
        match self.state:
            case Up(0.0) | Down():
                return
            case Up(spent):
                self.state = Up(max(0.0, spent - GIVEN_BACK))
            case Trial():
                self._pause_ms = self._backoff_ms
                self.state = Up()

    def failed(self, now_s: float) -> bool:
        """An operation failed or took too long; True where this opened the breaker."""
        match self.state:
            case Down():
                return False
            case Up(spent) if spent + 1 < self._budget:
                self.state = Up(spent + 1)
                return False
        self._pause(now_s)
        return True

    def probed(self, came_through: bool, now_s: float) -> None:
        """A probe of a Down server ended."""
        if came_through:
            self.state = Trial()
        else:
            self._pause(now_s)

    def _pause(self, now_s: float) -> None:
        """Down for the current pause, spread by a fifth so that gateways do not come back in step."""
        self.state = Down(now_s + self._pause_ms * self._rng.uniform(0.8, 1.2) / 1000)
        self._pause_ms = min(self._pause_ms * 2, self._max_backoff_ms)
