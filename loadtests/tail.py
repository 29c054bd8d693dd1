"""The tail under an open loop: mixed load at shares of the rate at which the service saturates."""

import asyncio
from collections.abc import Iterator

import msgspec

from loadtests.drive import driver
from loadtests.drive.result import Measured as RunMeasured
from loadtests.drive.saturation import Step, saturation
from loadtests.drive.scenario import read
from loadtests.run import Run
from loadtests.scoreboard import Measured

_P99_LIMIT_MS = 500.0


def measure(run: Run) -> Iterator[Measured]:
    """The row of this family."""
    scenario = msgspec.structs.replace(
        read("mixed"), seconds=run.sized(15, 2), warm_up_s=1.0, population=run.sized(2_000, 100)
    )
    stage = driver.prepare(
        run.service.grpc, scenario, corpus_file=run.corpus_file, documents=run.sized(5_000, 100),
        directory=run.scratch,
    )  # fmt: skip

    async def ramp() -> tuple[list[Step], list[RunMeasured]]:
        return await driver.ramp(
            stage, scenario, step_s=run.sized(5, 1), p99_limit_ms=_P99_LIMIT_MS, stop=asyncio.Event(),
            progress=lambda label: lambda at_s, codes: None,
        )  # fmt: skip

    steps, runs = asyncio.run(ramp())
    by_share = {each.label: each.tallies.all().latency.told() for each in runs}
    detail = {
        "unit": "p99 over p50, from the intended start, at 70% of saturation",
        "saturation_per_s": saturation(steps, _P99_LIMIT_MS),
        "p99_limit_ms": _P99_LIMIT_MS,
        "latency_ms": by_share,
        **stage.service,
    }
    at = by_share.get("70%")
    if at is None:
        yield Measured("tail.p99_over_p50.70", None, detail, "no rate tried was sustained")
    else:
        yield Measured("tail.p99_over_p50.70", at["p99"] / at["p50"], detail)
