"""The second stage of a recommendation: candidates in, the answer's order out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.ranker.features import SIMILARITY, blend, fault_of
from services.ranker.scoring import group, mmr
from shard_router.errors import InvalidField
from shard_router.model import AttributeType, Hit, Schema

#: Attributes that have an order to take percentiles of.
_ORDERED = {AttributeType.INT, AttributeType.FLOAT, AttributeType.BOOL, AttributeType.TIMESTAMP}


@dataclass(frozen=True, slots=True)
class Ranked:
    """The chosen candidates: `order[i]` is an index into the candidates, the rest belongs to it.

    `scores`: the blended score, float32 [len(order)]; it falls along the order unless MMR spread it.
    `features`: what the ranker saw of each, by feature. `score_ms`, `diversify_ms`: where the time went.
    """

    order: list[int]
    scores: np.ndarray
    features: list[dict[str, float]]
    score_ms: float
    diversify_ms: float


class Ranker:
    """Orders candidates by a weighted sum of percentile features, then limits groups, then spreads by MMR."""

    name = "blend"
    #: Changes whenever the same candidates could come out in another order; part of an answer's cache key.
    version = "blend@1"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._rankings = 0
        self._candidates = 0
        self._took_ms = 0.0

    def check(
        self,
        schema: Schema,
        weights: Mapping[str, float],
        *,
        mmr_lambda: float | None = None,
        group_by: str | None = None,
        per_group: int = 1,
    ) -> None:
        """Refuses what `rank` cannot do, before any retrieval: InvalidField naming the request's field."""
        for name, weight in weights.items():
            field = f"rank.features.{name}"
            if (fault := fault_of(weight)) is not None:
                raise InvalidField(field, fault)
            if name == SIMILARITY:
                continue
            if name not in schema:
                raise InvalidField(field, "the collection has no such attribute")
            if schema[name] not in _ORDERED:
                raise InvalidField(field, f"a {schema[name]} attribute cannot be a feature")
        if mmr_lambda is not None and not 0 <= mmr_lambda <= 1:
            raise InvalidField("diversity.mmr_lambda", "must be between 0 and 1")
        if group_by is not None:
            if group_by not in schema:
                raise InvalidField("diversity.group_by", f"the collection has no attribute {group_by!r}")
            if per_group < 1:
                raise InvalidField("diversity.per_group", "must be at least 1")

    def rank(
        self,
        candidates: Sequence[Hit],
        weights: Mapping[str, float],
        *,
        mmr_lambda: float | None,
        group_by: str | None,
        per_group: int,
        k: int,
    ) -> Ranked:
        """The k best candidates after all constraints, fewer only where the groups leave fewer.

        A candidate's `score` is its similarity. Of each group the best by score stay; MMR (which needs
        the candidates' vectors) then chooses among those. Ties keep the candidates' order. InvalidField
        for a feature that is no number. Takes milliseconds of CPU for a thousand candidates.
        """
        started_s = self._clock()
        scores, features = blend(
            np.array([hit.score for hit in candidates], dtype=np.float32),
            {name: _numbers(candidates, name) for name in weights if name != SIMILARITY},
            weights,
        )
        order = np.argsort(-scores, kind="stable").tolist()
        scored_s = self._clock()
        if group_by is not None:
            values = [hit.attributes.get(group_by) for hit in candidates]
            order = group(values, order, per_group, len(order) if mmr_lambda is not None else k)
        if mmr_lambda is not None and order:
            chosen = mmr(_vectors(candidates, order), scores[order], k, mmr_lambda)
            order = [order[i] for i in chosen.tolist()]
        order = order[:k]
        diversified_s = self._clock()
        columns = {name: column[order].tolist() for name, column in features.items()}
        ranked = Ranked(
            order,
            scores[order],
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            (scored_s - started_s) * 1000,
            (diversified_s - scored_s) * 1000,
        )
        self._rankings += 1
        self._candidates += len(candidates)
        self._took_ms += (self._clock() - started_s) * 1000
        return ranked

    def stats(self) -> dict[str, float]:
        """How many rankings, of how many candidates, in how much time."""
        return {
            "rankings_total": self._rankings,
            "candidates_total": self._candidates,
            "rank_took_total_ms": self._took_ms,
        }


def _numbers(candidates: Sequence[Hit], name: str) -> np.ndarray:
    """One attribute of every candidate, float64 [n], NaN where null."""
    values = [hit.attributes.get(name) for hit in candidates]
    first = next((value for value in values if value is not None), None)
    if isinstance(first, (str, tuple)):  # numpy would read numbers out of strings
        raise InvalidField(f"rank.features.{name}", "the attribute is not a number")
    return np.array(values, dtype=np.float64)


def _vectors(candidates: Sequence[Hit], order: Sequence[int]) -> np.ndarray:
    """Vectors of the candidates in this order, float32 [n, d]."""
    vectors = [vector for i in order if (vector := candidates[i].vector) is not None]
    if len(vectors) < len(order):
        raise ValueError("MMR needs every candidate's vector: retrieve with Include(vector=True)")
    return np.stack(vectors)
