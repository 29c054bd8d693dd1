"""Prometheus rules: `python -m deploy.observability.rules` writes rules.yml beside this file."""

from pathlib import Path
from typing import Any

import yaml

from deploy.observability.objectives import BURNS, OBJECTIVES, WINDOWS, Burn, Objective

FILE = Path(__file__).with_name("rules.yml")

#: Alert, expression, how long, severity, what is told.
CAUSES = (
    ("RingfortReplicaDown", "ringfort_shard_down > 0", "1m", "page",
     "{{ $value }} replicas do not answer"),
    ("RingfortClaimLost", "ringfort_metadata_claim_held == 0", "1m", "page",
     "the database is claimed by another service, or away"),
    ("RingfortDiskFull", "ringfort_shard_disk_full > 0", "1m", "page",
     "segments cannot be written"),
    ("RingfortReplicationLate", "ringfort_shard_tail_age_s > 30", "1m", "page",
     "the log was last read {{ $value | humanizeDuration }} ago"),
    ("RingfortCacheAway", "ringfort_cache_redis_up == 0", "5m", "ticket",
     "the Redis tier is away; searches are slower"),
    ("RingfortDependencySlow",
     'histogram_quantile(0.9, sum by (instance, stage, le) '
     '(rate(ringfort_stage_seconds_bucket{stage=~"postgres|redis|pool"}[5m]))) > 0.1',
     "2m", "ticket", "{{ $labels.stage }}: one in ten waits longer than {{ $value | humanizeDuration }}"),
    ("RingfortSaturated",
     "ringfort_gateway_in_flight > 0.8 * ringfort_gateway_in_flight_limit", "2m", "ticket",
     "{{ $value }} calls are under way"),
    ("RingfortWritesWait", "ringfort_metadata_waiting_batches > 64", "2m", "ticket",
     "{{ $value }} batches of writes wait for the database"),
    ("RingfortRecallLow",
     "increase(ringfort_recall_documents_found_total[1h]) "
     "/ increase(ringfort_recall_documents_wanted_total[1h]) < 0.9",
     "10m", "ticket", "audited recall is {{ $value | humanizePercentage }}"),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The rule file: shares by window, burn-rate alerts over them, and alerts on causes."""
    recorded = [
        {"record": recorded_name(objective, window), "expr": objective.bad.replace("WINDOW", window)}
        for objective in OBJECTIVES
        for window in WINDOWS
    ]
    burning = [_burning(objective, burn) for objective in OBJECTIVES for burn in BURNS]
    causes = [
        {
            "alert": alert,
            "expr": expression,
            "for": lasting,
            "labels": {"severity": severity},
            "annotations": {"summary": told},
        }
        for alert, expression, lasting, severity, told in CAUSES
    ]
    return {
        "groups": [
            {"name": "ringfort-objectives", "interval": "30s", "rules": recorded},
            {"name": "ringfort-burn", "rules": burning},
            {"name": "ringfort-causes", "rules": causes},
        ]
    }


def recorded_name(objective: Objective, window: str) -> str:
    """What the share of bad calls over a window is recorded as."""
    return f"ringfort:{objective.name}:bad_share_{window}"


def _burning(objective: Objective, burn: Burn) -> dict[str, Any]:
    limit = f"{burn.factor * (1 - objective.good):.6g}"
    shares = (f"{recorded_name(objective, window)} > {limit}" for window in (burn.long, burn.short))
    words = "".join(part.capitalize() for part in objective.name.split("_"))
    return {
        "alert": f"Ringfort{words}Burn",
        "expr": " and ".join(shares),
        "labels": {"severity": burn.severity, "window": burn.long},
        "annotations": {
            "summary": f"{objective.good:.1%} of {objective.what}: the budget burns {burn.factor:g} times "
            f"too fast ({{{{ $value | humanizePercentage }}}} over {burn.long})"
        },
    }


def written() -> str:
    """The file's text."""
    head = "# Made by `python -m deploy.observability.rules`; change that.\n"
    told: str = yaml.safe_dump(rules(), sort_keys=False, width=110, allow_unicode=True)
    return head + told


if __name__ == "__main__":
    FILE.write_text(written())
