"""How things are timed: sides that take turns, closed loops of callers, and processor time."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import faiss
import numpy as np

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")


@dataclass(frozen=True, slots=True)
class Load:
    """What a closed loop of callers came to: how long all of it took, and each call."""

    seconds: float
    latencies_ms: Sequence[float]

    @property
    def calls(self) -> int:
        """How many calls were answered."""
        return len(self.latencies_ms)

    @property
    def per_s(self) -> float:
        """Calls a second, of all callers together."""
        return self.calls / self.seconds

    def quantile_ms(self, share: float) -> float:
        """The latency that this share of the calls kept within."""
        return float(np.quantile(self.latencies_ms, share))


def take_turns(
    rounds: int, ours: Callable[[], Ours], theirs: Callable[[], Theirs], *, warm_up: bool = True
) -> tuple[list[Ours], list[Theirs]]:
    """What each side gave in each round; who goes first changes every round, after a first try of each."""
    if warm_up:
        ours(), theirs()
    our_results: list[Ours] = []
    their_results: list[Theirs] = []
    for number in range(rounds):
        if number % 2 == 0:
            our_results.append(ours())
        their_results.append(theirs())
        if number % 2:
            our_results.append(ours())
    return our_results, their_results


def repeat(rounds: int, side: Callable[[], Ours]) -> list[Ours]:
    """What one side, which has no other, gave in each round after a first try."""
    side()
    return [side() for _ in range(rounds)]


def median(values: Iterable[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The middle of the rounds' ratios."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def excess(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The middle of the rounds' differences."""
    return median(a - b for a, b in zip(ours, theirs, strict=True))


def alone(seconds: float, call: Callable[[int], object], *, pause_s: float = 0.0) -> Load:
    """One caller that calls again once answered, or so long after; the argument numbers the calls."""
    latencies_ms: list[float] = []
    first = now = time.perf_counter()
    while now < first + seconds:
        if pause_s:
            time.sleep(pause_s)
            now = time.perf_counter()
        call(len(latencies_ms))
        began, now = now, time.perf_counter()
        latencies_ms.append((now - began) * 1e3)
    return Load(now - first, latencies_ms)


def in_threads(threads: int, seconds: float, call: Callable[[int], object]) -> Load:
    """The same from threads of this process, each with FAISS and BLAS on its own core only.

    A failed call fails the load.
    """
    numbers = itertools.count()
    parts: list[Load] = []
    failures: list[BaseException] = []

    def work() -> None:
        # The setting is per thread; OpenMP's own threads would only get into each other's way.
        faiss.omp_set_num_threads(1)
        try:
            parts.append(alone(seconds, lambda _: call(next(numbers))))
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return Load(time.perf_counter() - began, [ms for part in parts for ms in part.latencies_ms])


@dataclass(frozen=True, slots=True)
class Spent:
    """A load in this process, and its processor time a call, in microseconds."""

    load: Load
    call_us: float


def spent(work: Callable[[], Load]) -> Spent:
    """A load in this process and what it cost."""
    loads: list[Load] = []
    seconds = processor_s(lambda: loads.append(work()))
    [load] = loads
    return Spent(load, 1e6 * seconds / load.calls)


def processor_s(work: Callable[[], object]) -> float:
    """Processor seconds of this process, all threads, while it does something."""
    began = time.process_time()
    work()
    return time.process_time() - began


def wall_s(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
