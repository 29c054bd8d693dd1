"""Where a model's time goes, by operator, read off ONNX Runtime's trace."""

import gzip
import json
from collections import defaultdict
from typing import NamedTuple


class Operator(NamedTuple):
    """All nodes of one kind: how often they ran, and for how long altogether."""

    name: str
    calls: int
    total_ms: float
    #: Of all operators' time, 0 to 1.
    share: float


def costliest(trace: bytes, count: int) -> list[Operator]:
    """The operators that took the longest; `trace` is the runtime's JSON, compressed by gzip."""
    calls: dict[str, int] = defaultdict(int)
    took_us: dict[str, int] = defaultdict(int)
    for event in json.loads(gzip.decompress(trace)):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["args"]["op_name"]
            calls[name] += 1
            took_us[name] += event["dur"]
    total_us = sum(took_us.values()) or 1
    told = [Operator(name, calls[name], us / 1e3, us / total_us) for name, us in took_us.items()]
    return sorted(told, key=lambda each: (-each.total_ms, each.name))[:count]
