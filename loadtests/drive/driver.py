"""Runs a scenario: prepares the collection, starts the processes, lets faults happen, adds the parts up."""

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadtests import corpus
from loadtests.drive.operations import COLLECTION
from loadtests.drive.result import Measured
from loadtests.drive.saturation import Step, next_rate, saturation
from loadtests.drive.scenario import Fault, Scenario
from loadtests.drive.tally import OK, Tallies
from loadtests.drive.worker import Plan
from ringfort import Client
from ringfort.errors import NotFound
from ringfort.scrape import Between, fetch
from ringfort.top import told

_ROOT = Path(__file__).parents[2]
#: Until all processes have read their corpus and connected.
_HEAD_START_S = 2.0
#: Beyond the run's own time, until a process is killed.
_GRACE_S = 30.0
_BATCH = 512
#: A process's last line holds all its histograms.
_LINE_BYTES = 256 * 1024 * 1024

#: Seconds into the run and the calls so far, by code.
Progress = Callable[[float, Mapping[str, int]], None]


class DriverFailed(RuntimeError):
    """A process of the load ended badly; its last words."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A service with the documents that a scenario's calls are about."""

    server: str
    corpus: Path
    #: A .npy file of their vectors.
    vectors: Path
    #: What the service says of itself.
    service: Mapping[str, object]
    #: HOST:PORT of its metrics, where that is known.
    http: str = ""


def prepare(
    server: str,
    scenario: Scenario,
    *,
    corpus_file: Path,
    documents: int,
    directory: Path,
    http: str = "",
) -> Stage:
    """A collection with these documents, made where there is none, and their vectors in a file.

    The documents that calls are about, the first `population`, are embedded by the service itself.
    """
    packages = corpus.read(corpus_file, max(documents, scenario.population))
    with Client(server, timeout_s=120) as client:
        try:
            made = client.collection(COLLECTION)
        except NotFound:
            made = client.create_collection(COLLECTION, attributes=corpus.ATTRIBUTES)
        if client.count(COLLECTION) < documents:
            written = client.upsert(
                COLLECTION, (package.document() for package in packages[:documents]), batch=_BATCH
            )
            if written.failures:
                raise DriverFailed(f"{len(written.failures)} documents were refused: {written.failures[0]}")
        texts = [package.summary for package in packages[: scenario.population]]
        vectors = np.concatenate(
            [
                client.embed(texts[start : start + _BATCH], input_type="DOCUMENT")
                for start in range(0, len(texts), _BATCH)
            ]
        )
        described = client.cluster()
    path = directory / f"{COLLECTION}.npy"
    np.save(path, vectors.astype(np.float32))
    service = {
        "version": described.version,
        "composition": described.composition,
        "documents": documents,
        "space": made.space,
    }
    return Stage(server, corpus_file, path, service, http)


async def run(
    stage: Stage,
    scenario: Scenario,
    *,
    label: str = "run",
    fault: Callable[[Fault], Awaitable[None]] | None = None,
    progress: Progress = lambda at_s, codes: None,
    stop: asyncio.Event | None = None,
) -> Measured:
    """One run of a scenario; what there is of it where `stop` is set. DriverFailed.

    `fault` lets a fault happen, and returns when it is over.
    """
    before = await asyncio.to_thread(fetch, stage.http) if stage.http else None
    begin_s = time.monotonic() + _HEAD_START_S
    counted_s = begin_s + scenario.warm_up_s
    processes = [
        await _Process.start(
            Plan(scenario, stage.server, number, begin_s, str(stage.corpus), str(stage.vectors))
        )
        for number in range(scenario.processes)
    ]
    faults: list[dict[str, Any]] = []
    happening = [
        asyncio.create_task(_happen(each, counted_s, fault, faults))
        for each in scenario.faults
        if fault is not None
    ]

    def tell(_: object) -> None:
        codes: Counter[str] = Counter()
        for process in processes:
            codes.update(process.codes)
        progress(time.monotonic() - counted_s, codes)

    listening = [asyncio.create_task(process.listen(tell)) for process in processes]
    stopping = asyncio.create_task(_stop(stop, processes))
    limit_s = _HEAD_START_S + scenario.warm_up_s + scenario.seconds + scenario.timeout_s + _GRACE_S
    try:
        async with asyncio.timeout(limit_s):
            parts = await asyncio.gather(*listening)
    except TimeoutError:
        raise DriverFailed(f"a process of the load is still running after {limit_s:g} s") from None
    finally:
        for task in (*happening, *listening, stopping):
            task.cancel()
        await asyncio.gather(*happening, *listening, stopping, return_exceptions=True)
        for process in processes:
            await process.end()
    tallies = Tallies()
    for part in parts:
        tallies.merge_encoded(part)
    for task in happening:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise DriverFailed(f"a fault could not be made: {error}") from error
    seconds = scenario.seconds
    if stop is not None and stop.is_set():
        seconds = min(seconds, max(0.0, time.monotonic() - counted_s))
    stages: Mapping[str, Mapping[str, float]] = {}
    if before is not None:
        stages = _stages(Between(before, await asyncio.to_thread(fetch, stage.http)))
    return Measured(label, scenario, tallies, seconds, faults, stages)


async def ramp(
    stage: Stage,
    scenario: Scenario,
    *,
    step_s: float,
    p99_limit_ms: float,
    progress: Callable[[str], Progress],
    stop: asyncio.Event,
) -> tuple[list[Step], list[Measured]]:
    """Rates until saturation, for `step_s` each, then the scenario at 50, 70 and 90% of that.

    Spikes and faults are left out. Nothing beyond the steps where no rate was sustained or `stop` is set.
    """
    plain = msgspec.structs.replace(scenario, spikes=[], faults=[])
    steps: list[Step] = []
    while not stop.is_set() and (rate := next_rate(steps, scenario.rate, p99_limit_ms)) is not None:
        trial = msgspec.structs.replace(plain, rate=rate, seconds=step_s)
        measured = await run(stage, trial, progress=progress(f"{rate:,.0f}/s"), stop=stop)
        total = measured.tallies.all()
        if not stop.is_set():
            steps.append(Step(rate, 1 - total.failed_share, total.latency.quantile_ms(99)))
    found = saturation(steps, p99_limit_ms)
    runs: list[Measured] = []
    for share in (0.5, 0.7, 0.9):
        if found and not stop.is_set():
            label = f"{share:.0%}"
            at = msgspec.structs.replace(plain, rate=found * share)
            runs.append(await run(stage, at, label=label, progress=progress(label), stop=stop))
    return steps, runs


def _stages(between: Between) -> dict[str, dict[str, float]]:
    """What the service says of its stages meanwhile, warm-up included."""
    return {
        each["stage"]: {
            "count": each["per_s"] * between.seconds,
            "p50_ms": each["p50_ms"],
            "p99_ms": each["p99_ms"],
        }
        for each in told(between)["stages"]
    }


class _Process:
    """One worker of the load, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.codes: Counter[str] = Counter()

    @classmethod
    async def start(cls, plan: Plan) -> "_Process":
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loadtests.drive.worker",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=_ROOT, limit=_LINE_BYTES,
            start_new_session=True,  # Ctrl-C is ours; we stop it
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(plan) + b"\n")
        await process.stdin.drain()
        return cls(process)

    async def listen(self, tell: Callable[[object], None]) -> Mapping[str, Any]:
        """Its tallies, once it has ended."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "done" in said:
                done: Mapping[str, Any] = said["done"]
                return done
            self.codes = Counter()
            for codes in said["codes"].values():
                self.codes.update(codes)
            tell(None)
        raise DriverFailed(f"a process of the load ended with {await self._process.wait()}")

    def stop(self) -> None:
        """Ask it to end, and to tell what it has."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def end(self) -> None:
        """See that it has ended."""
        try:
            async with asyncio.timeout(5):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


async def _stop(stop: asyncio.Event | None, processes: list[_Process]) -> None:
    if stop is not None:
        await stop.wait()
        for process in processes:
            process.stop()


async def _happen(
    fault: Fault,
    counted_s: float,
    make: Callable[[Fault], Awaitable[None]],
    happened: list[dict[str, Any]],
) -> None:
    await asyncio.sleep(max(0.0, counted_s + fault.at_s - time.monotonic()))
    began_s = time.monotonic() - counted_s
    await make(fault)
    happened.append(
        msgspec.to_builtins(fault) | {"began_s": began_s, "ended_s": time.monotonic() - counted_s}
    )


def answered(codes: Mapping[str, int]) -> tuple[int, int]:
    """Good answers, and the rest."""
    good = codes.get(OK, 0)
    return good, sum(codes.values()) - good
