"""When calls come: constant or Poisson arrivals at a rate that may change, as points in time.

An arrival process of rate r(t) is one of rate 1 seen through the inverse of R(t), the integral of r; so a
schedule is made of unit arrivals and a piecewise constant rate (Lewis and Shedler, "Simulation of
nonhomogeneous Poisson processes by thinning", 1979, section 1).
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """A rate, in calls a second, for some seconds."""

    seconds: float
    rate: float


def pieces(seconds: float, rate: float, spikes: Sequence[tuple[float, float, float]] = ()) -> list[Piece]:
    """A steady rate with spikes (at_s, for_s, factor) in it; where two overlap the larger factor holds."""
    edges = {0.0, seconds}
    for at_s, for_s, _ in spikes:
        edges |= {min(max(edge, 0.0), seconds) for edge in (at_s, at_s + for_s)}
    found: list[Piece] = []
    for start, end in itertools.pairwise(sorted(edges)):
        factors = [factor for at_s, for_s, factor in spikes if at_s <= start < at_s + for_s]
        found.append(Piece(end - start, rate * max(factors, default=1.0)))
    return found


def constant(share: int = 0, shares: int = 1) -> Iterator[float]:
    """Unit arrivals one apart, from one half on; of several sharers each takes every so-manieth."""
    return (number + 0.5 for number in itertools.count(share, shares))


def poisson(rng: random.Random, shares: int = 1) -> Iterator[float]:
    """Unit arrivals of a Poisson process; several sharers together make one of rate 1 again."""
    return itertools.accumulate(rng.expovariate(1 / shares) for _ in itertools.count())


def schedule(units: Iterator[float], rates: Sequence[Piece]) -> Iterator[float]:
    """The unit arrivals as seconds from the start, rising, until the pieces end."""
    began_s = passed = 0.0
    unit = next(units)
    for piece in rates:
        calls = piece.seconds * piece.rate
        while unit < passed + calls:
            yield began_s + (unit - passed) / piece.rate
            unit = next(units)
        began_s += piece.seconds
        passed += calls
