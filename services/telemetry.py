"""What the service tells of itself: Prometheus metrics and one structured log line per event.

Parts count for themselves (`stats()`); a collector reads them when somebody asks, so counting costs the
hot path an integer addition. Labels are bounded: method, code, part, stage, rank, and of models and
collections the first so many. Stages are the process's, as a process runs one service: a part names the one
it is and tells it how long it took.
"""

import json
import logging
import logging.handlers
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from services.trace import CURRENT, current_id

LATENCY_BUCKETS_S = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
    5, 10, 30,
)  # fmt: skip


#: What a call goes through, and the part where that happens.
STAGES = {
    "queue": "embedder", "tokenize": "embedder", "inference": "embedder",
    "l1": "cache", "redis": "cache",
    "fanout": "gateway", "search": "shard", "faiss": "shard", "merge": "gateway", "rank": "ranker",
    "commit": "gateway", "visible": "gateway", "pool": "metadata", "postgres": "metadata",
}  # fmt: skip
#: Models and collections with figures of their own; beyond that nothing is told of one.
LABELS_MOST = 64

Figures = Mapping[str, float]


class Seconds:
    """A histogram of times: integers that are added to, and told when somebody asks."""

    __slots__ = ("_buckets", "_sum_s")

    def __init__(self) -> None:
        self._buckets = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._buckets[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        self._sum_s += seconds

    def add_to(self, label: str, family: HistogramMetricFamily) -> None:
        """Add what was counted to the metrics of all labels."""
        bounds = (*map(str, LATENCY_BUCKETS_S), "+Inf")
        family.add_metric([label], list(zip(bounds, accumulate(self._buckets), strict=True)), self._sum_s)


class Stage:
    """One stage of calls. Belongs to the event loop's thread."""

    #: Off: nothing is counted anywhere in the process.
    on = True

    __slots__ = ("_span", "seconds")

    def __init__(self, name: str) -> None:
        self.seconds = Seconds()
        self._span = f"{STAGES[name]}.{name}"

    def took(self, seconds: float, ago_s: float = 0.0) -> None:
        """A call was in this stage for so long, until `ago_s` ago; its trace hears of it too."""
        if Stage.on:
            self.seconds.add(seconds)
        if (trace := CURRENT.get()) is not None:
            trace.took(self._span, seconds, ago_s)


_STAGES = {name: Stage(name) for name in STAGES}


def stage(name: str) -> Stage:
    """The process's stage of that name."""
    return _STAGES[name]


class StagesCollector:
    """Every stage as `ringfort_stage_seconds`."""

    def collect(self) -> Iterable[Metric]:
        """The metric family of this moment."""
        family = HistogramMetricFamily("ringfort_stage_seconds", "Time in a stage.", labels=["stage"])
        for name, each in _STAGES.items():
            each.seconds.add_to(name, family)
        return (family,)


class PartsCollector:
    """Every part's `stats()` as metrics: a name ending in `_total` is a counter, any other a gauge."""

    def __init__(self) -> None:
        self._parts: dict[str, Callable[[], Figures]] = {}
        self._labelled: dict[str, tuple[str, Callable[[], Mapping[str, Figures]]]] = {}

    def add(self, part: str, stats: Callable[[], Figures]) -> None:
        """Export `ringfort_<part>_<name>` for every name that `stats` gives."""
        self._parts[part] = stats

    def add_each(
        self, kind: str, stats: Callable[[], Mapping[str, Figures]], *, label: str | None = None
    ) -> None:
        """Export `ringfort_<kind>_<name>{<label>="…"}` for the first `LABELS_MOST` that `stats` gives.

        The label is the kind unless told otherwise.
        """
        self._labelled[kind] = (label or kind, stats)

    def collect(self) -> Iterable[Metric]:
        """The metric families of this moment."""
        for part, stats in self._parts.items():
            for name, value in stats().items():
                family = _family(part, name)
                family.add_metric([], value)
                yield family
        for kind, (label, stats_of_each) in self._labelled.items():
            families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
            for each, figures in list(stats_of_each().items())[:LABELS_MOST]:
                for name, value in figures.items():
                    if name not in families:
                        families[name] = _family(kind, name, [label])
                    families[name].add_metric([each], value)
            yield from families.values()


def _family(part: str, name: str, labels: Sequence[str] = ()) -> CounterMetricFamily | GaugeMetricFamily:
    full, what = f"ringfort_{part}_{name}", f"{part}: {name}"
    if name.endswith("_total"):
        return CounterMetricFamily(full.removesuffix("_total"), what, labels=labels)
    return GaugeMetricFamily(full, what, labels=labels)


class Method:
    """The calls of one method: how many ended with which code, and how long they took."""

    __slots__ = ("_codes", "_seconds")

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}
        self._seconds = Seconds()

    def ended(self, code: str, seconds: float) -> None:
        """Count a call."""
        if Stage.on:
            self._codes[code] = self._codes.get(code, 0) + 1
            self._seconds.add(seconds)

    def add_to(self, name: str, calls: CounterMetricFamily, seconds: HistogramMetricFamily) -> None:
        """Add what was counted to the metrics of all methods."""
        for code, count in self._codes.items():
            calls.add_metric([name, code], count)
        self._seconds.add_to(name, seconds)


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

    def __init__(self, *, counting: bool = True) -> None:
        """Without `counting` neither calls nor stages are counted, in all of the process."""
        Stage.on = counting
        self.registry = CollectorRegistry()
        self.parts = PartsCollector()
        self.registry.register(self.parts)
        self.methods = MethodsCollector()
        self.registry.register(self.methods)
        self.registry.register(StagesCollector())
        ProcessCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class JsonLines(logging.Formatter):
    """One event a line: time, level, logger, message, trace-id, and the error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        event = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace_id := current_id():
            event["trace_id"] = trace_id
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
