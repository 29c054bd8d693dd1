"""Which segments to write anew, so that there are few and they hold little that is dead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Segments of like size that are merged at once: each document is rewritten about log8(n) times.
FACTOR = 8
#: A segment with a smaller share of live rows is rewritten.
LIVE_SHARE = 0.5
#: No merge makes a segment of more rows: beyond this a scan gains nothing, and the merge needs memory.
MAX_ROWS = 262_144


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """What the choice is made by."""

    number: int
    rows: int
    live: int


def choose(segments: Sequence[SegmentFacts]) -> tuple[int, ...]:
    """The numbers of the segments to rewrite as one, oldest first; empty where all is well.

    First one that is mostly dead (the smallest live part first, for it frees the most); then, of the
    smallest tier with FACTOR segments whose sizes lie within one FACTOR, the oldest FACTOR of them.
    """
    decayed = [segment for segment in segments if segment.live < segment.rows * LIVE_SHARE]
    if decayed:
        return (min(decayed, key=lambda segment: segment.live / segment.rows).number,)
    tiers: dict[int, list[SegmentFacts]] = {}
    for segment in segments:
        tiers.setdefault(int(math.log(segment.live, FACTOR)), []).append(segment)
    for _, tier in sorted(tiers.items()):
        chosen = tier[:FACTOR]
        if len(chosen) == FACTOR and sum(segment.live for segment in chosen) <= MAX_ROWS:
            return tuple(segment.number for segment in chosen)
    return ()


def debt(segments: Sequence[SegmentFacts]) -> int:
    """How many rows `choose` will have rewritten before it finds nothing more to do."""
    left, rows = list(segments), 0
    while numbers := choose(left):
        live = sum(segment.live for segment in left if segment.number in numbers)
        first = next(place for place, segment in enumerate(left) if segment.number in numbers)
        kept = [segment for segment in left if segment.number not in numbers]
        if live:
            kept.insert(first, SegmentFacts(numbers[0], live, live))
        left, rows = kept, rows + max(live, 1)
    return rows
