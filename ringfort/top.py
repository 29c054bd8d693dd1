"""What `ringfort top` shows of the time between two scrapes: calls, stages, how full everything is. Pure."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ringfort.scrape import Between

#: Gauges in the order they are shown: what they are called, the metric, and its limit's.
GAUGES = (
    ("calls under way", "ringfort_gateway_in_flight", "ringfort_gateway_in_flight_limit"),
    ("texts waiting", "ringfort_embedder_queue_texts", ""),
    ("queries waiting", "ringfort_shard_waiting_queries", ""),
    ("write batches waiting", "ringfort_metadata_waiting_batches", ""),
    ("connections waited for", "ringfort_metadata_pool_waiting", ""),
    ("documents", "ringfort_shard_documents", ""),
    ("segments", "ringfort_shard_segments", ""),
    ("positions behind", "ringfort_shard_lag_positions", ""),
)


def told(between: Between) -> dict[str, Any]:
    """All of it as JSON values: rates a second, times in milliseconds."""
    after = between.after
    hits, misses = (between.increase(f"ringfort_cache_l1_{what}_total") for what in ("hits", "misses"))
    return {
        "seconds": between.seconds,
        "methods": [
            {
                "method": method,
                "per_s": between.rate("ringfort_rpc_seconds_count", method=method),
                "failed_per_s": _failed(between, method),
                **_quantiles_ms(between, "ringfort_rpc_seconds", method=method),
            }
            for method in sorted(after.values("ringfort_rpc_seconds_count", "method"))
            if between.increase("ringfort_rpc_seconds_count", method=method)
        ],
        "stages": [
            {
                "stage": stage,
                "per_s": between.rate("ringfort_stage_seconds_count", stage=stage),
                "busy": between.rate("ringfort_stage_seconds_sum", stage=stage),
                **_quantiles_ms(between, "ringfort_stage_seconds", stage=stage),
            }
            for stage in after.values("ringfort_stage_seconds_count", "stage")
            if between.increase("ringfort_stage_seconds_count", stage=stage)
        ],
        "gauges": {name: after.value(metric) for name, metric, _ in GAUGES},
        "l1_hit_ratio": hits / (hits + misses) if hits + misses else None,
        "cores": between.rate("process_cpu_seconds_total"),
        "resident_bytes": after.value("process_resident_memory_bytes"),
    }


def shown(between: Between) -> RenderableType:
    """The same for people."""
    figures = told(between)
    calls = _table("method", "calls/s", "failed/s", "p50 ms", "p99 ms")
    for each in figures["methods"]:
        calls.add_row(
            each["method"], f"{each['per_s']:,.1f}", _alarming(each["failed_per_s"]),
            f"{each['p50_ms']:,.2f}", f"{each['p99_ms']:,.2f}",
        )  # fmt: skip
    stages = _table("stage", "calls/s", "busy", "p50 ms", "p99 ms")
    for each in figures["stages"]:
        stages.add_row(
            each["stage"], f"{each['per_s']:,.1f}", f"{each['busy']:.2f}",
            f"{each['p50_ms']:,.2f}", f"{each['p99_ms']:,.2f}",
        )  # fmt: skip
    gauges = [f"{value:,.0f} {name}" for name, value in figures["gauges"].items()]
    ratio = figures["l1_hit_ratio"]
    machine = [
        f"{figures['cores']:.2f} cores",
        f"{figures['resident_bytes'] / 2**20:,.0f} MiB",
        f"L1 {ratio:.0%}" if ratio is not None else "L1 unused",
    ]
    if not figures["methods"]:
        calls.add_row("no calls", "", "", "", "")
    return Group(
        calls, Text(), stages, Text(), Text(" · ".join(machine)), Text(" · ".join(gauges), style="dim")
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", min_width=10)
    return table


def _alarming(rate: float) -> Text:
    return Text(f"{rate:,.1f}", style="red" if rate else "dim")


def _failed(between: Between, method: str) -> float:
    codes: Sequence[str] = list(between.after.values("ringfort_rpc_total", "code"))
    return sum(between.rate("ringfort_rpc_total", method=method, code=code) for code in codes if code != "OK")


def _quantiles_ms(between: Between, metric: str, **labels: str) -> dict[str, float]:
    return {
        f"p{round(100 * quantile)}_ms": 1e3 * between.quantile_s(quantile, metric, **labels)
        for quantile in (0.5, 0.99)
    }
