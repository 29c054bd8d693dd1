"""The service level objectives, once: the rules and the dashboard are made from them."""

from dataclasses import dataclass

#: Codes that are the service's fault; the others are the caller's, or an answer like any other.
FAULTS = "INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|DATA_LOSS|UNKNOWN|RESOURCE_EXHAUSTED"


@dataclass(frozen=True, slots=True)
class Objective:
    """A share of the calls that has to be good, over 30 days. `bad(window)` is the share that is not."""

    name: str
    #: What alerts and panels say of it.
    what: str
    good: float
    #: PromQL with the placeholder WINDOW.
    bad: str


def _late(method: str, limit: str) -> str:
    inside = f'sum(rate(ringfort_rpc_seconds_bucket{{method="{method}",le="{limit}"}}[WINDOW]))'
    return f'1 - {inside} / sum(rate(ringfort_rpc_seconds_count{{method="{method}"}}[WINDOW]))'


OBJECTIVES = (
    Objective(
        "availability",
        "calls that end without a fault of the service",
        0.999,
        f'sum(rate(ringfort_rpc_total{{code=~"{FAULTS}"}}[WINDOW])) / sum(rate(ringfort_rpc_total[WINDOW]))',
    ),
    Objective("search_latency", "searches answered within 100 ms", 0.99, _late("Search", "0.1")),
    Objective("embed_latency", "embeddings answered within 250 ms", 0.99, _late("Embed", "0.25")),
    Objective(
        "recommend_latency", "recommendations answered within 250 ms", 0.99, _late("Recommend", "0.25")
    ),
)


@dataclass(frozen=True, slots=True)
class Burn:
    """An alert where the error budget burns this many times too fast, over a long and a short window.

    Source: https://sre.google/workbook/alerting-on-slos/, table 5-8.
    """

    factor: float
    long: str
    short: str
    severity: str


BURNS = (
    Burn(14.4, "1h", "5m", "page"),
    Burn(6, "6h", "30m", "page"),
    Burn(3, "1d", "2h", "ticket"),
    Burn(1, "3d", "6h", "ticket"),
)
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
