"""What the service tells of itself: Prometheus metrics and one structured log line per event.

Parts count for themselves (`stats()`); a collector reads them when somebody asks, so counting costs the
hot path an integer addition. Labels are bounded: method, code, part.
"""

import json
import logging
import logging.handlers
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
    5, 10, 30,
)  # fmt: skip


class PartsCollector:
    """Every part's `stats()` as metrics: a name ending in `_total` is a counter, any other a gauge."""

    def __init__(self) -> None:
        self._parts: dict[str, Callable[[], Mapping[str, float]]] = {}

    def add(self, part: str, stats: Callable[[], Mapping[str, float]]) -> None:
        """Export `ringfort_<part>_<name>` for every name that `stats` gives."""
        self._parts[part] = stats

    def collect(self) -> Iterable[Metric]:
        """The metric families of this moment."""
        for part, stats in self._parts.items():
            for name, value in stats().items():
                full = f"ringfort_{part}_{name}"
                if name.endswith("_total"):
                    yield CounterMetricFamily(full.removesuffix("_total"), f"{part}: {name}", value=value)
                else:
                    yield GaugeMetricFamily(full, f"{part}: {name}", value=value)


class Method:
    """The calls of one method: how many ended with which code, and how long they took."""

    __slots__ = ("_buckets", "_codes", "_seconds")

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._seconds = 0.0

    def ended(self, code: str, seconds: float) -> None:
        """Count a call."""
        self._codes[code] = self._codes.get(code, 0) + 1
        self._buckets[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        self._seconds += seconds

    def add_to(self, name: str, calls: CounterMetricFamily, seconds: HistogramMetricFamily) -> None:
        """Add what was counted to the metrics of all methods."""
        for code, count in self._codes.items():
            calls.add_metric([name, code], count)
        totals = accumulate(self._buckets)
        bounds = (*map(str, LATENCY_BUCKETS_S), "+Inf")
        seconds.add_metric([name], list(zip(bounds, totals, strict=True)), self._seconds)


class MethodsCollector:
    """Every method's counts as `ringfort_rpc_total` and `ringfort_rpc_seconds`."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def method(self, name: str) -> Method:
        """Where the calls of a method are counted."""
        return self._methods.setdefault(name, Method())

    def collect(self) -> Iterable[Metric]:
        """The metric families of this moment."""
        calls = CounterMetricFamily(
            "ringfort_rpc", "Calls ended, by method and code.", labels=["method", "code"]
        )
        seconds = HistogramMetricFamily(
            "ringfort_rpc_seconds", "Time in the server, by method.", labels=["method"]
        )
        for name, method in self._methods.items():
            method.add_to(name, calls, seconds)
        return calls, seconds


class Telemetry:
    """The metrics of one running service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.parts = PartsCollector()
        self.registry.register(self.parts)
        self.methods = MethodsCollector()
        self.registry.register(self.methods)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """One event a line: time, level, logger, message, and the error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        event = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["error"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)


def _is_news(record: logging.LogRecord) -> bool:
    """All but gRPC's complaint that it could not send to a caller who has gone."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


def log_to(directory: Path, *, max_bytes: int = 10 * 1024 * 1024, files: int = 5) -> None:
    """Log to `directory/ringfort.log`, rotated by size; warnings also go to stderr."""
    file = logging.handlers.RotatingFileHandler(
        directory / "ringfort.log", maxBytes=max_bytes, backupCount=files, encoding="utf-8"
    )
    file.setFormatter(JsonLines())
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.ERROR)
    console.setFormatter(logging.Formatter("ringfort: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, console], force=True)
    # The driver says every reconnect attempt; the store's own words are enough.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
