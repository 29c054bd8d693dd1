"""Which keys are asked for most: two rotating windows in each gateway, added up over all gateways."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from services.cache.frequent_items import FrequentItems

#: What was asked for in the last one to two windows counts.
WINDOW_S = 30.0
#: Keys counted in a window, and told to the other gateways.
COUNTED, TOLD = 1_024, 64
#: A key is hot that is so much of all reads, was seen so often, and is among the first so many.
HOT_SHARE, HOT_COUNT, HOT_KEYS = 0.001, 32, 64
#: Keys are noted as they come and counted in batches, which costs a tenth.
_BATCH = 1_024

REPORT_VERSION = 1


class Report(msgspec.Struct, frozen=True, array_like=True, tag=REPORT_VERSION):
    """What one gateway tells the others: [version, beat, total, [[key, count] ...]].

    `beat` changes with every report, so that a gateway which stopped telling can be told from one that goes
    on; `total` are all its reads of both windows.
    """

    beat: int
    total: int
    keys: list[tuple[bytes, int]]

    def encode(self) -> bytes:
        """The report as MessagePack."""
        return _encoder.encode(self)

    @staticmethod
    def decode(data: bytes) -> "Report | None":
        """The report in these bytes; None where they are damaged or of another version."""
        try:
            return _decoder.decode(data)
        except msgspec.DecodeError:
            return None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Report)


@dataclass(frozen=True, slots=True)
class HotKey:
    """A key, how often it was asked for at least, and which part that is of all reads."""

    key: bytes
    count: int
    share: float


class HotWindows:
    """What this gateway was asked for lately."""

    def __init__(self, now_s: float) -> None:
        self._current, self._previous = FrequentItems(COUNTED), FrequentItems(COUNTED)
        self._began_s = now_s
        #: Not counted yet; fewer than _BATCH once a call is over.
        self._noted: list[bytes] = []
        self._beat = 0

    def saw(self, key: bytes) -> None:
        """The key was asked for."""
        self._noted.append(key)
        if len(self._noted) >= _BATCH:
            self._count()

    def saw_all(self, keys: Sequence[bytes]) -> None:
        """The keys were asked for."""
        self._noted += keys
        if len(self._noted) >= _BATCH:
            self._count()

    def report(self, now_s: float, keys: int = TOLD) -> Report:
        """What to tell the others, of so many keys at most; windows are rotated when it is time."""
        self._count()
        if now_s - self._began_s >= WINDOW_S:
            idle = now_s - self._began_s >= 2 * WINDOW_S
            self._previous = FrequentItems(COUNTED) if idle else self._current
            self._current, self._began_s = FrequentItems(COUNTED), now_s
        both = FrequentItems(2 * COUNTED)
        for window in (self._previous, self._current):
            both.merge(dict(window.top(COUNTED)), window.total, window.error)
        self._beat += 1
        return Report(self._beat, both.total, both.top(keys))

    def _count(self) -> None:
        self._current.update(self._noted, len(self._noted))
        self._noted.clear()


def most_asked(reports: Iterable[Report], count: int) -> list[HotKey]:
    """The keys that the gateways were asked for most, all together, most asked first."""
    every = list(reports)
    total = sum(report.total for report in every)
    sums = FrequentItems(COUNTED)
    for report in every:
        sums.merge(dict(report.keys), report.total)
    return [HotKey(key, seen, min(1.0, seen / max(1, total))) for key, seen in sums.top(count)]


def hot(asked: Sequence[HotKey]) -> frozenset[bytes]:
    """Those of the most asked keys that deserve to be treated as hot."""
    return frozenset(
        each.key for each in asked[:HOT_KEYS] if each.share >= HOT_SHARE and each.count >= HOT_COUNT
    )


class Gateways:
    """Which other gateways there are, by whether their reports go on changing."""

    #: A gateway unheard of for so many rounds is not there; after so many more its report goes.
    GONE_AFTER, FORGOTTEN_AFTER = 3, 30

    def __init__(self) -> None:
        #: By gateway: its last beat, and the round in which it came.
        self._heard: dict[bytes, tuple[int, int]] = {}
        self._round = 0

    def hear(self, reports: Mapping[bytes, Report]) -> dict[bytes, Report]:
        """A round's reports of the others; those of gateways that are there.

        One heard of for the first time is taken to be there.
        """
        self._round += 1
        for gateway, report in reports.items():
            known = self._heard.get(gateway)
            if known is None or known[0] != report.beat:
                self._heard[gateway] = (report.beat, self._round)
        self._heard = {gateway: heard for gateway, heard in self._heard.items() if gateway in reports}
        return {g: report for g, report in reports.items() if self._silent(g) < self.GONE_AFTER}

    def forgotten(self) -> list[bytes]:
        """Those whose reports should go."""
        return [gateway for gateway in self._heard if self._silent(gateway) >= self.FORGOTTEN_AFTER]

    def _silent(self, gateway: bytes) -> int:
        return self._round - self._heard[gateway][1]
