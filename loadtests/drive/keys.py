"""Which of n keys a call is about: all alike, by Zipf's law, or mostly a hot set, which may move."""

import random
from collections.abc import Callable
from typing import Annotated

import msgspec
import numpy as np

#: A second of the run -> a key, 0 to n - 1.
Choose = Callable[[float], int]


class Uniform(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="uniform"):
    """Every key alike."""


class Zipf(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="zipf"):
    """The r-th most popular key has a share in proportion to r ** -exponent."""

    exponent: Annotated[float, msgspec.Meta(gt=0, le=5)] = 1.0


class Hot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="hot"):
    """A share of the calls goes to a share of the keys; `move_every_s` > 0 takes the next keys as often."""

    calls: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.9
    keys: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    move_every_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0

    def size(self, population: int) -> int:
        """Keys that are hot at a time."""
        return max(1, round(self.keys * population))

    def first(self, at_s: float, population: int) -> int:
        """Where the hot keys begin at that second; they wrap around."""
        moves = int(at_s / self.move_every_s) if self.move_every_s else 0
        return moves * self.size(population) % population


Keys = Uniform | Zipf | Hot


def chooser(keys: Keys, population: int, rng: random.Random) -> Choose:
    """Draws keys of a population of at least one."""
    match keys:
        case Uniform():
            return lambda _: rng.randrange(population)
        case Zipf(exponent):
            weights = np.cumsum(np.arange(1, population + 1, dtype=np.float64) ** -exponent)
            weights /= weights[-1]
            return lambda _: min(int(weights.searchsorted(rng.random(), "right")), population - 1)
        case Hot():
            hot = keys.size(population)
            cold = population - hot

            def choose(at_s: float) -> int:
                if not cold or rng.random() < keys.calls:
                    place = rng.randrange(hot)
                else:
                    place = hot + rng.randrange(cold)
                return (keys.first(at_s, population) + place) % population

            return choose
