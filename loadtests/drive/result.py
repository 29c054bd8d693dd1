"""Result files: JSON with the figures, and with the machine, versions and settings they were taken with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from loadtests.drive.scenario import Scenario
from loadtests.drive.tally import OK, SERIES_DIGITS, Latencies, Tallies, Tally

#: Of the file; a reader refuses another.
FORMAT = 2
#: A driver that sends later than this (p99) measures the machine it shares, or itself.
LATE_MS = 5.0
#: What is due so long after a fault still has to do with it: a killed server has to come back.
AFTERMATH_S = 3.0


class ResultRefused(ValueError):
    """A file is not a result; one sentence."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run at one rate."""

    label: str
    scenario: Scenario
    tallies: Tallies
    #: Seconds that were counted; fewer than planned where it was interrupted.
    seconds: float
    #: Faults, with the second at which each really began.
    faults: Sequence[Mapping[str, Any]] = field(default_factory=list)
    #: Quantiles of the service's stages over the run, by stage, in milliseconds.
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        operations = {name: self._operation(tally) for name, tally in self.tallies.operations.items()}
        return {
            "label": self.label,
            "rate": self.scenario.rate,
            "seconds": self.seconds,
            "all": self._operation(self.tallies.all()),
            "operations": operations,
            "lateness_ms": self.tallies.lateness.told(),
            "series": [
                {
                    "second": number,
                    "answered": second.latency.count,
                    "failed": second.failed,
                    "p50_ms": second.latency.quantile_ms(50),
                    "p99_ms": second.latency.quantile_ms(99),
                }
                for number, second in sorted(self.tallies.seconds.items())
            ],
            "faults": [{**fault, "calls": self._due_during(fault)} for fault in self.faults],
            "stages": dict(self.stages),
        }

    def _due_during(self, fault: Mapping[str, Any]) -> dict[str, float]:
        """What became of the calls that were due while a fault lasted, and right after it."""
        due, failed = Latencies(SERIES_DIGITS), 0
        for number, second in self.tallies.seconds.items():
            if int(fault["began_s"]) <= number < fault["ended_s"] + AFTERMATH_S:
                due.merge(second.latency)
                failed += second.failed
        return {"due": due.count, "failed": failed, **due.told()}

    def _operation(self, tally: Tally) -> dict[str, Any]:
        return {
            "due": tally.calls,
            "answered_per_s": tally.codes[OK] / self.seconds if self.seconds else 0.0,
            "failed_share": tally.failed_share,
            "codes": dict(tally.codes),
            "latency_ms": tally.latency.told(),
            "service_ms": tally.service.told(),
            "histogram": tally.latency.encoded(),
        }


def result(
    kind: str,
    scenario: Scenario,
    runs: Sequence[Measured],
    *,
    machine: Mapping[str, object],
    made_at: str,
    service: Mapping[str, object],
    saturation: Mapping[str, object] | None = None,
    interrupted: bool = False,
) -> dict[str, Any]:
    """A result as it goes into its file."""
    told: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "made_at": made_at,
        "interrupted": interrupted,
        "machine": dict(machine),
        "service": dict(service),
        "scenario": msgspec.to_builtins(scenario),
        "runs": [run.told() for run in runs],
    }
    if saturation is not None:
        told["saturation"] = dict(saturation)
    return told


def doubt(run: Mapping[str, Any]) -> str:
    """Why a run's figures say little of the service; empty where there is no reason."""
    late_ms = run["lateness_ms"]["p99"]
    if late_ms <= LATE_MS:
        return ""
    return f"the driver itself sent {late_ms:,.1f} ms late (p99): it, or the machine, was too busy"


def read(path: Path) -> dict[str, Any]:
    """A result file; ResultRefused where it is none, or of another format."""
    try:
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultRefused(f"{path}: {str(error.strerror).lower()}") from None
    except ValueError:
        raise ResultRefused(f"{path} is not JSON") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ResultRefused(f"{path} is not a result of format {FORMAT}")
    return told


def write(path: Path, told: Mapping[str, Any]) -> None:
    """Put it there, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(told, indent=1) + "\n")
    part.replace(path)
