"""Recall as it is: now and then an answered vector query is repeated exactly, and what it missed is counted.

One at a time and at most every so often, so it costs what one exact search costs as often. A document counts
as found where it is as good as the k-th best, so ties do not matter.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import numpy as np

from index_builder.segments.index_spec import DEFAULT_EFFORT
from services import tasks
from services.deadline import Deadline
from services.gateway.fanout import FanOut, Found
from services.gateway.served import Served
from services.shard.rendering import RenderedHits
from shard_router.errors import RingfortError
from shard_router.filters import Filter
from shard_router.model import Include

log = logging.getLogger(__name__)

IDS_ONLY = Include(attributes=False, text=False)
#: An exact search that takes longer is given up.
TIMEOUT_S = 5.0
#: Scores are float32 and summed in different orders.
TIE = 1e-5


class RecallAudit:
    """Repeats an answer out of many; `every_s` 0 repeats none."""

    def __init__(
        self, fanout: FanOut, *, every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fanout, self._every_s, self._clock = fanout, every_s, clock
        self._due_s = clock()
        self._task: asyncio.Task[None] | None = None
        self._audits = self._wanted = self._found = self._failed = 0

    def offer(
        self,
        served: Served,
        query: np.ndarray,
        k: int,
        filter: Filter | None,
        found: Found[RenderedHits],
    ) -> None:
        """An answered query, float32 [1, dim], that may be repeated; never waits."""
        if not self._every_s or self._clock() < self._due_s or (self._task and not self._task.done()):
            return
        if not found.complete:
            return
        self._due_s = self._clock() + self._every_s
        self._task = asyncio.create_task(self._repeat(served, query, k, filter, found.hits[0]))

    async def close(self) -> None:
        """Give up what is under way."""
        await tasks.end(self._task)

    def stats(self) -> dict[str, float]:
        """Queries repeated, the documents they should have found and those they had found."""
        return {
            "audits_total": self._audits,
            "failed_total": self._failed,
            "documents_wanted_total": self._wanted,
            "documents_found_total": self._found,
        }

    async def _repeat(
        self, served: Served, query: np.ndarray, k: int, filter: Filter | None, answered: RenderedHits
    ) -> None:
        before = served.positions
        try:
            exact = await self._fanout.search_rendered(
                served, query, k, filter=filter, exact=True, effort=DEFAULT_EFFORT, include=IDS_ONLY,
                min_coverage=1.0, deadline=Deadline.after(TIMEOUT_S),
            )  # fmt: skip
        except RingfortError as error:
            self._failed += 1
            log.info("a recall audit was given up: %s", error)
            return
        if served.positions != before:
            return  # what was written meanwhile would look like a miss
        best = np.frombuffer(exact.hits[0].scores, np.float32)
        given = np.frombuffer(answered.scores, np.float32)
        self._audits += 1
        self._wanted += len(best)
        if len(best):
            self._found += min(len(best), int((given >= best[-1] - TIE).sum()))
