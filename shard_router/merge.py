"""The merge of shard answers into one ranking."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol, TypeVar

from shard_router.model import Version


class Ranked(Protocol):
    """What the merge looks at of a hit."""

    @property
    def id(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def version(self) -> Version: ...


R = TypeVar("R", bound=Ranked)

_score = attrgetter("score")


def merge(answers: Sequence[Sequence[R]], k: int) -> list[R]:
    """Best k documents over all answers; a document seen twice counts once, at its newest version.

    Scores descend, equal scores are in ascending order of id, and the result does not depend on how
    the hits were spread over the answers. Of two hits of one version the better score stays.
    """
    newest: dict[str, R] = {}
    for answer in answers:
        for hit in answer:
            seen = newest.setdefault(hit.id, hit)
            if seen is not hit and (seen.version, seen.score) < (hit.version, hit.score):
                newest[hit.id] = hit
    # Answers are descending runs, which this sort only has to interleave; ids matter near the cut alone.
    ranked = sorted(newest.values(), key=_score, reverse=True)
    end = k
    while 0 < end < len(ranked) and ranked[end].score == ranked[k - 1].score:
        end += 1
    return sorted(ranked[:end], key=lambda hit: (-hit.score, hit.id))[:k]
