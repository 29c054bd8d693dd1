"""Two results side by side: what B is to A, by run and operation. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What is compared; where less is better, a ratio above one is worse.
FIGURES = ("answered_per_s", "p50", "p99", "p99.9", "failed_share")


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of one operation in both; `ratio` is B over A, None where A is nothing."""

    run: str
    operation: str
    figure: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a else None


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Compared]:
    """What both have in common, in A's order."""
    found: list[Compared] = []
    others = {run["label"]: run for run in b["runs"]}
    for run in a["runs"]:
        other = others.get(run["label"])
        if other is None:
            continue
        for name, operation in {"all": run["all"], **run["operations"]}.items():
            theirs = other["all"] if name == "all" else other["operations"].get(name)
            if theirs is not None:
                found += [
                    Compared(run["label"], name, figure, _figure(operation, figure), _figure(theirs, figure))
                    for figure in FIGURES
                ]
    if "saturation" in a and "saturation" in b:
        rates = a["saturation"]["rate"], b["saturation"]["rate"]
        found.append(Compared("saturation", "all", "rate", *rates))
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why the two may not be comparable: settings and machines that differ, in words."""
    told = []
    for part in ("machine", "service", "scenario"):
        for name in sorted({*a[part], *b[part]} - {"load_before"}):
            left, right = a[part].get(name), b[part].get(name)
            if left != right:
                told.append(f"{part}.{name}: {left} against {right}")
    return told


def _figure(operation: Mapping[str, Any], figure: str) -> float:
    return float(operation[figure] if figure in operation else operation["latency_ms"][figure])
