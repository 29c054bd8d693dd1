"""Where a service saturates: rates are doubled until one is not sustained, then the gap is halved. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: A rate is sustained if nearly all that was due was answered well and the tail stayed within bounds.
LEAST_ANSWERED = 0.99
#: Where to stop: the gap between sustained and not, as a share; and rates tried at most.
CLOSE_ENOUGH, STEPS_MOST = 0.10, 16
GROWTH = 2.0


@dataclass(frozen=True, slots=True)
class Step:
    """One rate that was tried, in calls a second, and what came of it."""

    rate: float
    answered_share: float
    p99_ms: float

    def sustained(self, p99_limit_ms: float) -> bool:
        """Whether the service kept up with it."""
        return self.answered_share >= LEAST_ANSWERED and self.p99_ms <= p99_limit_ms


def saturation(steps: Sequence[Step], p99_limit_ms: float) -> float:
    """The highest rate sustained below the lowest that was not; 0 where none was."""
    broken = min((step.rate for step in steps if not step.sustained(p99_limit_ms)), default=math.inf)
    return max(
        (step.rate for step in steps if step.sustained(p99_limit_ms) and step.rate < broken), default=0.0
    )


def next_rate(steps: Sequence[Step], first: float, p99_limit_ms: float) -> float | None:
    """The rate to try next; None where saturation is known closely enough, or enough was tried."""
    if not steps:
        return first
    if len(steps) >= STEPS_MOST:
        return None
    held = saturation(steps, p99_limit_ms)
    broken = min((step.rate for step in steps if not step.sustained(p99_limit_ms)), default=math.inf)
    if math.isinf(broken):
        return held * GROWTH
    if not held:
        return broken / GROWTH
    return None if broken <= held * (1 + CLOSE_ENOUGH) else math.sqrt(held * broken)
