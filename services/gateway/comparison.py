"""What changes with another generation: the same questions asked of both, for whoever decides about it."""

import time
from collections.abc import Mapping

import numpy as np

from index_builder.segments.index_spec import DEFAULT_EFFORT
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.gateway.fanout import FanOut
from services.gateway.models import Models
from services.gateway.served import Served
from services.metadata.store import Store
from shard_router.model import Include

#: Questions that are asked, and how many documents of each answer are compared.
QUESTIONS, K = 64, 10
#: How long all of it may take.
COMPARE_S = 60.0
_IDS_ONLY = Include(attributes=False, text=False)


class Comparison:
    """Compares two generations of a collection by their answers."""

    def __init__(self, store: Store, models: Models, fanout: FanOut) -> None:
        self._store, self._models, self._fanout = store, models, fanout

    async def of(self, live: Served, other: Served) -> Mapping[str, float]:
        """Figures by name; those that need documents are left out where there are none.

        overlap_at_10: of the ten nearest documents to a stored text (or vector), the share that both find, in
        the mean over `questions` of them. search_ms and live_search_ms: the median time of such a search.
        bytes and live_bytes: of segment files.
        """
        figures = {"bytes": _bytes(other), "live_bytes": _bytes(live)}
        comparable = live.collection.space == other.collection.space
        # In order of the ids' hashes, so the first ones are any.
        rows, stored = await self._store.scan(live.collection, None, QUESTIONS, with_vectors=comparable)
        if not rows:
            return figures
        deadline = Deadline.after(COMPARE_S)
        if stored is not None:
            vectors = others = stored
        else:
            texts = [row.text or "" for row in rows]
            vectors, others = [
                (await self._models.embed_for(each.collection, texts, InputType.QUERY, deadline)).vectors
                for each in (live, other)
            ]
        searched_s = live.searched_s
        overlaps, took_ms, live_took_ms = [], [], []
        for of_live, of_other in zip(vectors, others, strict=True):
            found, its_ms = await self._found(live, of_live, deadline)
            among, other_ms = await self._found(other, of_other, deadline)
            overlaps.append(len(found & among) / max(1, len(found)))
            live_took_ms.append(its_ms)
            took_ms.append(other_ms)
        live.searched_s = searched_s  # nobody whom room has to be left for
        return figures | {
            "questions": float(len(overlaps)),
            f"overlap_at_{K}": float(np.mean(overlaps)),
            "search_ms": float(np.median(took_ms)),
            "live_search_ms": float(np.median(live_took_ms)),
        }

    async def _found(self, served: Served, vector: np.ndarray, deadline: Deadline) -> tuple[set[str], float]:
        began_s = time.perf_counter()
        found = await self._fanout.search(
            served, vector[np.newaxis], K, filter=None, exact=False, effort=DEFAULT_EFFORT,
            include=_IDS_ONLY, min_coverage=0.0, deadline=deadline,
        )  # fmt: skip
        return {hit.id for hit in found.hits[0]}, (time.perf_counter() - began_s) * 1e3


def _bytes(served: Served) -> float:
    """Of the segment files of one copy of each shard of each log."""
    first = {(copy.database, copy.shard): replica for copy, replica in reversed(list(served.copies()))}
    return float(sum(segment.size_bytes for replica in first.values() for segment in replica.segments()))
