"""How many processes a model should have, by the texts that wait in them (pure)."""

import math
from collections.abc import Mapping
from typing import Any

#: Texts waiting in one process that a further one is worth starting for: some hundred milliseconds of work.
TARGET_TEXTS = 64.0
#: Fewer than this share of the target in what would be left, and one is given up.
_IDLE_SHARE = 0.25


def wanted(queued_texts: float, running: int, target_texts: float = TARGET_TEXTS) -> int:
    """Processes for so many waiting texts in all, given those that run; at least one."""
    if running <= 0:
        return 1
    if queued_texts > running * target_texts:
        return math.ceil(queued_texts / target_texts)
    if running > 1 and queued_texts < (running - 1) * target_texts * _IDLE_SHARE:
        return running - 1
    return running


def policy(context: Any) -> tuple[int, dict[str, Any]]:
    """The decision as Ray Serve asks for it, on what replicas record; bounds and delays are Serve's."""
    queues: Mapping[Any, float] = (context.aggregated_metrics or {}).get("queue_texts", {})
    return wanted(sum(queues.values()), context.current_num_replicas), {}
