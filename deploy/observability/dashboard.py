"""The Grafana dashboard: `python -m deploy.observability.dashboard` writes dashboard.json beside it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deploy.observability.objectives import FAULTS, OBJECTIVES
from deploy.observability.rules import recorded_name

FILE = Path(__file__).with_name("dashboard.json")
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


class Panel(NamedTuple):
    """A graph: its title, its unit in Grafana's words, and its lines as (expression, legend)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def _quantile(quantile: float, metric: str, by: str) -> str:
    return f"histogram_quantile({quantile}, sum by ({by}, le) (rate({metric}_bucket[$__rate_interval])))"


def _hits(tier: str) -> str:
    hits, misses = (
        f"rate(ringfort_cache_{tier}_{what}_total[$__rate_interval])" for what in ("hits", "misses")
    )
    return f"sum({hits}) / (sum({hits}) + sum({misses}))"


def _rate(metric: str, by: str = "") -> str:
    summed = f"sum by ({by})" if by else "sum"
    return f"{summed} (rate({metric}[$__rate_interval]))"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Objectives", (
        Panel("Bad share, 1 h", "percentunit",
              tuple((recorded_name(objective, "1h"), objective.name) for objective in OBJECTIVES)),
        Panel("Budget burnt over 3 d, times too fast", "none",
              tuple((f"{recorded_name(objective, '3d')} / {1 - objective.good:.6g}", objective.name)
                    for objective in OBJECTIVES)),
        Panel("Faults", "reqps", ((_rate(f'ringfort_rpc_total{{code=~"{FAULTS}"}}', "method, code"),
                                   "{{method}} {{code}}"),)),
    )),
    ("Calls", (
        Panel("Rate", "reqps", ((_rate("ringfort_rpc_total", "method"), "{{method}}"),)),
        Panel("p50", "s", ((_quantile(0.5, "ringfort_rpc_seconds", "method"), "{{method}}"),)),
        Panel("p99", "s", ((_quantile(0.99, "ringfort_rpc_seconds", "method"), "{{method}}"),)),
    )),
    ("Stages", (
        Panel("p50", "s", ((_quantile(0.5, "ringfort_stage_seconds", "stage"), "{{stage}}"),)),
        Panel("p99", "s", ((_quantile(0.99, "ringfort_stage_seconds", "stage"), "{{stage}}"),)),
        Panel("Seconds spent a second", "none",
              ((_rate("ringfort_stage_seconds_sum", "stage"), "{{stage}}"),)),
    )),
    ("Saturation", (
        Panel("Calls under way", "none", (("ringfort_gateway_in_flight", "in flight"),
                                          ("ringfort_gateway_in_flight_limit", "limit"))),
        Panel("Queues", "none", (("ringfort_embedder_queue_texts", "texts"),
                                 ("ringfort_shard_waiting_queries", "queries"),
                                 ("ringfort_metadata_waiting_batches", "write batches"),
                                 ("ringfort_metadata_pool_waiting", "waiting for a connection"))),
        Panel("Processor and memory", "none", (("rate(process_cpu_seconds_total[$__rate_interval])", "cores"),
                                               ("process_resident_memory_bytes / 2 ^ 30", "GiB"))),
    )),
    ("Cache", (
        Panel("Hit ratio", "percentunit", ((_hits("l1"), "L1"), (_hits("redis"), "Redis"))),
        Panel("Superseded and avoided", "ops", (
            (_rate("ringfort_answers_superseded_total"), "superseded"),
            (_rate("ringfort_answers_recomputes_avoided_total"), "avoided"))),
        Panel("Redis errors", "ops", ((_rate("ringfort_cache_redis_errors_total"), "errors"),
                                      (_rate("ringfort_cache_redis_timeouts_total"), "timeouts"))),
    )),
    ("Hot keys", (
        # Every gateway tells them of all gateways.
        Panel("Share of all reads, by rank", "percentunit", (
            ("max by (rank) (ringfort_hot_key_share)", "{{rank}}"),
            ("sum(max by (rank) (ringfort_hot_key_share))", "the ten together"))),
        Panel("Reads in the last 30 to 60 s, by rank", "none",
              (("max by (rank) (ringfort_hot_key_reads)", "{{rank}}"),)),
        Panel("Kept in process as hot", "none", (("max(ringfort_cache_hot_keys)", "keys"),)),
    )),
    ("Documents", (
        Panel("Documents", "none", (("ringfort_collection_documents", "{{collection}}"),)),
        Panel("Replication", "none", (("ringfort_collection_lag_positions", "{{collection}} behind"),
                                      ("ringfort_shard_tail_age_s", "log read s ago"))),
        Panel("Segments", "none", (("ringfort_shard_segments", "segments"),
                                   ("ringfort_shard_frozen_memtables", "memtables to be sealed"),
                                   ("ringfort_shard_merging", "merging"))),
    )),
    ("Models and recall", (
        Panel("Texts embedded", "ops", ((_rate("ringfort_model_texts_total", "model"), "{{model}}"),)),
        Panel("Inference, ms a text", "ms", (
            ("sum by (model) (rate(ringfort_model_inference_ms_total[$__rate_interval])) / "
             "sum by (model) (rate(ringfort_model_texts_total[$__rate_interval]))", "{{model}}"),)),
        Panel("Audited recall", "percentunit", (
            ("increase(ringfort_recall_documents_found_total[1h]) / "
             "increase(ringfort_recall_documents_wanted_total[1h])", "recall"),)),
    )),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; the data source is asked for there."""
    panels: list[dict[str, Any]] = []
    for row, (title, graphs) in enumerate(ROWS):
        top = row * (_HEIGHT + 1)
        at = {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": at, "panels": []})
        for column, graph in enumerate(graphs):
            at = {"x": column * _WIDTH, "y": top + 1, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_graph(len(panels) + 1, graph, at))
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "title": "Ringfort",
        "uid": "ringfort",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _graph(number: int, graph: Panel, at: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": graph.title,
        "gridPos": at,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {"defaults": {"unit": graph.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(graph.lines)
        ],
    }


def written() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(written())
