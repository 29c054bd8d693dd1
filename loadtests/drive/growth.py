"""Whether a figure that was sampled over a run grew beyond noise. Pure.

The trend is Theil and Sen's: the median slope over all pairs of samples, which steps and spikes hardly move
(Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: The beginning of a run, in which caches fill and code paths are walked for the first time.
WARM_UP_SHARE = 1 / 3
#: Samples the trend is taken over; more are thinned out.
_SAMPLES_MOST = 800


@dataclass(frozen=True, slots=True)
class Bound:
    """How much a figure may grow over a run: so much, or that share of its middle, whichever is more."""

    absolute: float
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Growth:
    """A figure's trend over the run's last two thirds."""

    name: str
    middle: float
    #: By the trend, over the time that it was taken over.
    grew: float
    #: Of the samples around the trend: the median distance, scaled to a standard deviation.
    noise: float
    allowed: float

    @property
    def beyond_noise(self) -> bool:
        """Whether it grew by more than is allowed, and by more than its own noise could feign."""
        return self.grew > self.allowed + 2 * self.noise

    def __str__(self) -> str:
        about = f"±{self.noise:,.1f}, {self.allowed:,.1f} allowed"
        return f"{self.name}: {self.middle:,.0f}, {self.grew:+,.1f} ({about})"


def growth(name: str, at_s: Sequence[float], values: Sequence[float], bound: Bound) -> Growth:
    """The trend of samples, at least six of them, taken at these seconds, rising."""
    times, figures = np.asarray(at_s, np.float64), np.asarray(values, np.float64)
    if len(times) < 6:
        raise ValueError(f"{name}: {len(times)} samples are too few for a trend")
    kept = times >= times[0] + WARM_UP_SHARE * (times[-1] - times[0])
    times, figures = times[kept], figures[kept]
    step = -(-len(times) // _SAMPLES_MOST)
    times, figures = times[::step], figures[::step]
    first, second = np.triu_indices(len(times), 1)
    slope = float(np.median((figures[second] - figures[first]) / (times[second] - times[first])))
    middle = float(np.median(figures))
    rest = figures - slope * times
    noise = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    allowed = max(bound.absolute, bound.share * middle)
    return Growth(name, middle, slope * float(times[-1] - times[0]), noise, allowed)
