"""Metrics of a service at two moments, and what happened between: rates, quantiles, gauges."""

import bisect
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from ringfort.errors import Unavailable

DEFAULT_HTTP = "127.0.0.1:7780"
_TIMEOUT_S = 5.0

#: A sample's name and labels.
Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples of one moment, on the monotonic clock."""

    at_s: float
    samples: Mapping[Key, float]

    @classmethod
    def read(cls, text: str, at_s: float) -> "Scrape":
        """Prometheus's text format."""
        return cls(
            at_s,
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            },
        )

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 where it is not exported."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def values(self, name: str, label: str) -> dict[str, float]:
        """A metric's samples, added up by one label's values."""
        found: dict[str, float] = {}
        for (sample, labels), value in self.samples.items():
            if sample == name:
                of = dict(labels).get(label, "")
                found[of] = found.get(of, 0.0) + value
        return found


@dataclass(frozen=True, slots=True)
class Between:
    """What happened between two scrapes of one service."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """How long that was."""
        return max(self.after.at_s - self.before.at_s, 1e-9)

    def increase(self, name: str, **labels: str) -> float:
        """How much a counter grew; one that began anew counts from nothing."""
        before, after = self.before.value(name, **labels), self.after.value(name, **labels)
        return after - before if after >= before else after

    def rate(self, name: str, **labels: str) -> float:
        """The same, a second."""
        return self.increase(name, **labels) / self.seconds

    def quantile_s(self, quantile: float, name: str, **labels: str) -> float:
        """A histogram's quantile, between the bounds of its bucket in proportion; its last bound at most."""
        buckets: list[tuple[float, float]] = []
        for sample, told in self.after.samples:
            named = dict(told)
            bound = named.pop("le", None)
            if sample == f"{name}_bucket" and bound is not None and named == labels:
                buckets.append((float(bound), self.increase(sample, **labels, le=bound)))
        buckets.sort()
        if not buckets or not buckets[-1][1]:
            return 0.0
        wanted = quantile * buckets[-1][1]
        at = bisect.bisect_left([count for _, count in buckets], wanted)
        upper, count = buckets[at]
        lower, below = buckets[at - 1] if at else (0.0, 0.0)
        if upper == float("inf"):
            return lower
        return lower + (upper - lower) * (wanted - below) / (count - below)


def fetch(http: str) -> Scrape:
    """The metrics of the service whose HTTP face is at HOST:PORT; Unavailable where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=_TIMEOUT_S) as answer:
            return Scrape.read(answer.read().decode(), time.monotonic())
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"no metrics at http://{http}/metrics: {reason}") from None
