"""What a load is made of, read from YAML; a key that is unknown or out of range is refused by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from loadtests.drive.arrivals import Piece, pieces
from loadtests.drive.keys import Keys, Uniform

#: The scenarios that come with the driver, by name.
SHIPPED = Path(__file__).parent / "scenarios"

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Second = Annotated[float, msgspec.Meta(ge=0)]
Kind = Literal["embed", "search_text", "search_vector", "search_filtered", "recommend", "upsert"]


class ScenarioRefused(ValueError):
    """A scenario cannot be read; one sentence."""


class Operation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of call and its share of them."""

    kind: Kind
    weight: Positive = 1.0
    k: Count = 10
    #: Whether the service may answer from its caches.
    cache: bool = True
    #: Documents of an upsert, texts of an embed.
    rows: Annotated[int, msgspec.Meta(ge=1, le=2048)] = 1
    #: Share of the documents that a filtered search's filter passes.
    passing: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    #: Of an upsert: DURABLE or VISIBLE.
    wait: Literal["DURABLE", "VISIBLE"] = "DURABLE"

    @property
    def name(self) -> str:
        """What its figures are called."""
        return self.kind if self.cache else f"{self.kind}_uncached"


class Spike(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Some seconds at a multiple of the rate."""

    at_s: Second
    for_s: Positive
    factor: Positive = 10.0


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that goes wrong: a process killed, or stopped for a while, or a network that delays."""

    kind: Literal["kill", "pause", "delay"]
    target: Literal["service", "postgres", "redis"]
    at_s: Second
    #: Of a pause and a delay.
    for_s: Positive = 1.0
    #: Of a delay: added to each way's every piece.
    delay_ms: Positive = 200.0

    def __post_init__(self) -> None:
        if self.target == "service" and self.kind != "pause":
            raise ValueError(f"the service cannot be {self.kind}ed here, only paused")


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A load of so many calls a second, over all processes."""

    name: str
    operations: Annotated[list[Operation], msgspec.Meta(min_length=1)]
    about: str = ""
    seconds: Annotated[float, msgspec.Meta(gt=0, le=24 * 3600)] = 30.0
    #: Before that, calls that are made and not counted.
    warm_up_s: Second = 2.0
    arrival: Literal["constant", "poisson"] = "poisson"
    rate: Annotated[float, msgspec.Meta(gt=0, le=1_000_000)] = 100.0
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    keys: Keys = msgspec.field(default_factory=Uniform)
    #: How many documents and queries calls are about.
    population: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 2_000
    timeout_s: Positive = 10.0
    #: Calls of a process under way at once, and those that may wait for that in the driver; the rest is
    #: not sent, and counted as that.
    max_in_flight: Count = 512
    max_waiting: Count = 100_000
    spikes: list[Spike] = []
    faults: list[Fault] = []
    seed: int = 1

    def __post_init__(self) -> None:
        names = [operation.name for operation in self.operations]
        if len(set(names)) < len(names):
            raise ValueError("the same kind of operation twice")

    @property
    def rates(self) -> Sequence[Piece]:
        """The rate over the whole run, warm-up first; times of spikes and faults count from its end."""
        told = [(spike.at_s, spike.for_s, spike.factor) for spike in self.spikes]
        warm_up = [Piece(self.warm_up_s, self.rate)] if self.warm_up_s else []
        return [*warm_up, *pieces(self.seconds, self.rate, told)]


def read(source: str) -> Scenario:
    """A shipped scenario by its name, or a file by its path; ScenarioRefused."""
    path = SHIPPED / f"{source}.yaml"
    if "/" in source or not path.is_file():
        path = Path(source)
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        raise ScenarioRefused(f"{source} is neither a file nor one of {names}")
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Scenario)
    except msgspec.ValidationError as error:
        raise ScenarioRefused(f"{path}: {error}") from None
    except msgspec.DecodeError as error:
        raise ScenarioRefused(f"{path} is not YAML: {' '.join(str(error).split())}") from None
