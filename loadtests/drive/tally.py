"""What became of calls, kept as HDR histograms, so that the parts of several processes add up.

Latencies run from the intended start: a call that had to wait for the driver or its own predecessors waited
for the service (Tene, "How NOT to measure latency", 2015). `service` runs from when it was sent.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hdrh.histogram import HdrHistogram

LEAST_US, MOST_US, DIGITS = 1, 600_000_000, 3
SERIES_DIGITS = 2
QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
OK = "OK"
NOT_SENT, UNANSWERED = "NOT_SENT", "UNANSWERED"


class Latencies:
    """Latencies, told in milliseconds, exact to `digits` digits."""

    def __init__(self, digits: int = DIGITS, histogram: HdrHistogram | None = None) -> None:
        self._histogram = histogram or HdrHistogram(LEAST_US, MOST_US, digits)

    def add(self, seconds: float) -> None:
        """One more; beyond ten minutes it counts as ten minutes."""
        self._histogram.record_value(min(max(round(seconds * 1e6), LEAST_US), MOST_US))

    def merge(self, other: "Latencies") -> None:
        """Another's, too."""
        self._histogram.add(other._histogram)

    @property
    def count(self) -> int:
        """How many."""
        return int(self._histogram.get_total_count())

    def quantile_ms(self, percent: float) -> float:
        """What this share of them kept within; 0 where there are none."""
        return float(self._histogram.get_value_at_percentile(percent)) / 1e3 if self.count else 0.0

    def told(self) -> dict[str, float]:
        """The usual quantiles, in milliseconds."""
        return {name: self.quantile_ms(percent) for name, percent in QUANTILES.items()}

    def encoded(self) -> str:
        """All of it as text, in HdrHistogram's own compressed form (V2, base64)."""
        return bytes(self._histogram.encode()).decode()

    @classmethod
    def decoded(cls, text: str) -> "Latencies":
        """What `encoded` told."""
        return cls(histogram=HdrHistogram.decode(text))


class Tally:
    """Calls of one operation, or of all."""

    def __init__(self) -> None:
        self.latency, self.service = Latencies(), Latencies()
        #: By gRPC code, and NOT_SENT, UNANSWERED.
        self.codes: Counter[str] = Counter()

    def answered(self, code: str, latency_s: float, service_s: float) -> None:
        """A call that ended; its time counts whatever its code."""
        self.codes[code] += 1
        self.latency.add(latency_s)
        self.service.add(service_s)

    def merge(self, other: "Tally") -> None:
        """Another's, too."""
        self.latency.merge(other.latency)
        self.service.merge(other.service)
        self.codes.update(other.codes)

    @property
    def calls(self) -> int:
        """All that were due."""
        return self.codes.total()

    @property
    def failed_share(self) -> float:
        """Of those that were due, the share without a good answer."""
        return 1 - self.codes[OK] / self.calls if self.calls else 0.0

    def encoded(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "codes": dict(self.codes),
            "latency": self.latency.encoded(),
            "service": self.service.encoded(),
        }

    @classmethod
    def decoded(cls, told: Mapping[str, Any]) -> "Tally":
        """What `encoded` told."""
        tally = cls()
        tally.codes.update(told["codes"])
        tally.latency = Latencies.decoded(told["latency"])
        tally.service = Latencies.decoded(told["service"])
        return tally


class Second:
    """The calls that were due in one second of the run."""

    def __init__(self) -> None:
        self.latency = Latencies(SERIES_DIGITS)
        self.failed = 0

    def encoded(self) -> list[Any]:
        """As JSON values."""
        return [self.failed, self.latency.encoded()]


class Tallies:
    """One run's calls: by operation, and by second of the time they were due at."""

    def __init__(self) -> None:
        self.operations: dict[str, Tally] = {}
        self.seconds: dict[int, Second] = {}
        #: How late the driver itself was to send; more than a millisecond or two and it is the bottleneck.
        self.lateness = Latencies()

    def of(self, operation: str) -> Tally:
        """Where an operation's calls are counted."""
        return self.operations.setdefault(operation, Tally())

    def second(self, at_s: float) -> Second:
        """Where the calls due then are counted."""
        return self.seconds.setdefault(int(at_s), Second())

    def all(self) -> Tally:
        """Every operation's together."""
        total = Tally()
        for tally in self.operations.values():
            total.merge(tally)
        return total

    def encoded(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "operations": {name: tally.encoded() for name, tally in self.operations.items()},
            "seconds": {str(number): second.encoded() for number, second in sorted(self.seconds.items())},
            "lateness": self.lateness.encoded(),
        }

    def merge_encoded(self, told: Mapping[str, Any]) -> None:
        """Another process's, too."""
        for name, operation in told["operations"].items():
            self.of(name).merge(Tally.decoded(operation))
        for number, (failed, latency) in told["seconds"].items():
            second = self.second(int(number))
            second.failed += failed
            second.latency.merge(Latencies.decoded(latency))
        self.lateness.merge(Latencies.decoded(told["lateness"]))
