"""One deadline, handed down: every stage takes what is left of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from shard_router.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on the monotonic clock, in seconds."""

    at_s: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> "Deadline":
        """The deadline `seconds` from now."""
        return cls(clock() + seconds, clock)

    def left_s(self) -> float:
        """Seconds left; negative once it has passed."""
        return self.at_s - self.clock()

    def require(self, stage: str) -> float:
        """Seconds left, or DeadlineExceeded naming the stage that found none."""
        left = self.left_s()
        if left <= 0:
            raise DeadlineExceeded(stage)
        return left
