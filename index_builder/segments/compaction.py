"""Which segments to write anew, and as what, so that they are few, quick, and hold little that is dead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from index_builder.segments.index_spec import GRAPH_ROWS, IndexKind, kind_for

#: Segments of like size that are merged at once: each document is rewritten about log8(n) times.
FACTOR = 8
#: A segment with a smaller share of live rows is rewritten.
LIVE_SHARE = 0.5
#: Flat rows beside a graph that come to such a part of its live rows are linked into it: comparing 8,192
#: codes takes half as long as walking a graph of any size.
BESIDE_SHARE = 1 / 4
#: No merge makes a segment of more rows, or of more codes of one byte a dimension: those are in memory
#: while a graph of them is built.
MOST_ROWS, MOST_CODE_BYTES = 1 << 20, 256 << 20


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """What the choice is made by."""

    number: int
    rows: int
    live: int
    #: What it was written to be; it may have come out flat where nothing else would find enough.
    kind: IndexKind = IndexKind.FLAT


@dataclass(frozen=True, slots=True)
class Policy:
    """What a collection's segments are to become."""

    #: A collection's `auto`, `flat`, `hnsw` or `ivf`.
    wanted: str
    dim: int
    #: `cpu` or `cuda:N`.
    device: str = "cpu"
    graph_rows: int = GRAPH_ROWS

    @property
    def most_rows(self) -> int:
        """Rows of the largest segment."""
        return min(MOST_ROWS, max(self.graph_rows, MOST_CODE_BYTES // self.dim))

    def kind(self, rows: int, calm: bool) -> IndexKind:
        """What so many rows are written as; graphs are for calm times."""
        return kind_for(self.wanted, rows, self.device, self.graph_rows) if calm else IndexKind.FLAT


class Choice(NamedTuple):
    """Segments to rewrite as one of this kind, oldest first."""

    numbers: tuple[int, ...]
    kind: IndexKind


def choose(segments: Sequence[SegmentFacts], policy: Policy, *, calm: bool) -> Choice | None:
    """The next rewrite; None where all is well. Segments come oldest first.

    First all that are mostly dead, as one: while documents are written again and again there are always
    some, and each by itself would be made anew at every halving, to the last row. Then, while it is
    calm, all the flat ones that fit together, if they are enough for a graph, or with the smallest graph if
    they are much beside it. Then, of the smallest tier with FACTOR segments whose sizes lie within one
    FACTOR, the oldest FACTOR of them. Graphs are made, and made anew, only while it is calm: they cost a
    hundred times what writing costs, and the next minute of a bulk load would make them anew.
    """
    movable = [segment for segment in segments if calm or segment.kind is IndexKind.FLAT or not segment.live]
    decayed = [segment for segment in movable if segment.live < segment.rows * LIVE_SHARE]
    if decayed:
        chosen = _fitting(decayed, policy.most_rows) or decayed[:1]
        return _rewrite(chosen, policy.kind(sum(segment.live for segment in chosen), calm))
    flat = _fitting([segment for segment in movable if segment.kind is IndexKind.FLAT], policy.most_rows)
    kind = policy.kind(sum(segment.live for segment in flat), calm)
    if kind is not IndexKind.FLAT:
        return _rewrite(flat, kind)
    if calm and (joined := _with_a_graph(flat, movable, policy.most_rows)):
        return _rewrite(joined, policy.kind(sum(segment.live for segment in joined), calm))
    tiers: dict[tuple[int, bool], list[SegmentFacts]] = {}
    for segment in movable:
        tier = int(math.log(segment.live, FACTOR)), segment.kind is not IndexKind.FLAT
        tiers.setdefault(tier, []).append(segment)
    for _, tier_segments in sorted(tiers.items()):
        chosen = tier_segments[:FACTOR]
        rows = sum(segment.live for segment in chosen)
        if len(chosen) == FACTOR and rows <= policy.most_rows:
            return _rewrite(chosen, policy.kind(rows, calm))
    return None


def debt(segments: Sequence[SegmentFacts], policy: Policy) -> int:
    """How many rows `choose` will have rewritten, given calm, before it finds nothing more to do."""
    left, rows = list(segments), 0
    while choice := choose(left, policy, calm=True):
        live = sum(segment.live for segment in left if segment.number in choice.numbers)
        first = next(place for place, segment in enumerate(left) if segment.number in choice.numbers)
        left = [segment for segment in left if segment.number not in choice.numbers]
        if live:
            left.insert(first, SegmentFacts(choice.numbers[0], live, live, choice.kind))
        rows += max(live, 1)
    return rows


def _fitting(segments: Sequence[SegmentFacts], most_rows: int) -> list[SegmentFacts]:
    """The oldest of them that together have no more rows than that."""
    chosen: list[SegmentFacts] = []
    for segment in segments:
        if segment.live <= most_rows:
            chosen.append(segment)
            most_rows -= segment.live
    return chosen


def _with_a_graph(
    flat: Sequence[SegmentFacts], segments: Sequence[SegmentFacts], most_rows: int
) -> list[SegmentFacts]:
    """The flat ones and the smallest graph, in order; none where they are few beside it, or too many."""
    graphs = [segment for segment in segments if segment.kind is not IndexKind.FLAT]
    if not graphs:
        return []
    graph = min(graphs, key=lambda segment: segment.live)
    beside = sum(segment.live for segment in flat)
    if beside < graph.live * BESIDE_SHARE or beside + graph.live > most_rows:
        return []
    return [segment for segment in segments if segment in flat or segment is graph]


def _rewrite(segments: Sequence[SegmentFacts], kind: IndexKind) -> Choice:
    return Choice(tuple(segment.number for segment in segments), kind)
