"""One process of a load: `python -m loadtests.drive.worker`, told what to do by one JSON line on stdin.

It says every second how many calls it has tallied, and at the end everything it has. It ends when the run
does, when its stdin closes, or at SIGTERM; it tells what it has got in any case.
"""

import asyncio
import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import uvloop

from loadtests import corpus
from loadtests.drive import arrivals
from loadtests.drive.open_loop import OpenLoop
from loadtests.drive.operations import Operations, code_of
from loadtests.drive.scenario import Scenario
from loadtests.drive.tally import Tallies
from ringfort import AsyncClient


class Plan(msgspec.Struct, frozen=True):
    """What one of several processes does."""

    scenario: Scenario
    server: str
    #: Which of the scenario's processes this is.
    process: int
    #: On the monotonic clock, which all processes of a machine share.
    begin_s: float
    corpus: str
    #: A .npy file, float32 [population, dim].
    vectors: str


def main() -> int:
    """Run the plan on stdin; 0."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    tallies = Tallies()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(plan, tallies))
    _say({"done": tallies.encoded()})
    return 0


async def _run(plan: Plan, tallies: Tallies) -> None:
    scenario = plan.scenario
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(sys.stdin.fileno(), stop.set)  # the parent has gone, or wants an end
    rng = random.Random(scenario.seed * 1_000 + plan.process)
    packages = corpus.read(Path(plan.corpus), scenario.population)
    vectors = np.load(plan.vectors)
    async with AsyncClient(plan.server, timeout_s=scenario.timeout_s) as client:
        open_loop = OpenLoop(
            Operations(scenario, client, packages, vectors, rng).due,
            tallies,
            began_s=plan.begin_s,
            clock=time.monotonic,
            code_of=code_of,
            max_in_flight=scenario.max_in_flight,
            max_waiting=scenario.max_waiting,
            counted_from_s=scenario.warm_up_s,
        )
        shares = scenario.processes
        units = (
            arrivals.poisson(rng, shares)
            if scenario.arrival == "poisson"
            else arrivals.constant(plan.process, shares)
        )
        pacer = _Pacer(loop, arrivals.schedule(units, scenario.rates), plan.begin_s, open_loop)
        pacer.start()
        ended = asyncio.create_task(pacer.ended.wait())
        stopped = asyncio.create_task(stop.wait())
        telling = asyncio.create_task(_tell(tallies))
        try:
            await asyncio.wait([ended, stopped], return_when=asyncio.FIRST_COMPLETED)
            pacer.stop()
            await open_loop.drain(0.0 if stop.is_set() else scenario.timeout_s + 1.0)
        finally:
            for task in (ended, stopped, telling):
                task.cancel()
            await asyncio.gather(ended, stopped, telling, return_exceptions=True)
            loop.remove_reader(sys.stdin.fileno())


class _Pacer:
    """A thread that hands every call over when it is due; an event loop's timers are a millisecond off."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        schedule: Iterable[float],
        begin_s: float,
        open_loop: OpenLoop,
    ) -> None:
        self._loop, self._schedule, self._begin_s, self._open_loop = loop, schedule, begin_s, open_loop
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._pace, name="pacer", daemon=True)
        self.ended = asyncio.Event()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Launch nothing more; what has been handed over is launched."""
        self._stopping.set()
        self._thread.join()

    def _pace(self) -> None:
        for at_s in self._schedule:
            left_s = self._begin_s + at_s - time.monotonic()
            if (left_s > 0 and self._stopping.wait(left_s)) or self._stopping.is_set():
                break
            self._loop.call_soon_threadsafe(self._open_loop.launch, at_s)
        self._loop.call_soon_threadsafe(self.ended.set)


async def _tell(tallies: Tallies) -> None:
    while True:
        await asyncio.sleep(1.0)
        told = {name: dict(tally.codes) for name, tally in tallies.operations.items()}
        _say({"codes": told})


def _say(told: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
