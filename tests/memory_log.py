"""A log in memory, for the tests of what follows one."""

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np

from shard_router.hashing import slot_of
from shard_router.model import Attributes, Collection, LogDelta, LogRow, Metric, Schema, Version


def collection(*, dim: int = 3, metric: Metric = Metric.COSINE, schema: Schema | None = None) -> Collection:
    """A collection as the metadata store would describe it."""
    return Collection(
        uid=1, tenant="default", name="things", dim=dim, metric=metric, schema=schema or {}, schema_version=1,
        model=None, slots=16, shards=1, replicas=1, index="auto", max_staleness_ms=0, generation=1,
        space=f"vectors:{dim}", created_at_us=0,
    )  # fmt: skip


class MemoryLog:
    """What Postgres is to a shard: each document at its latest position, tombstones included."""

    def __init__(self, dim: int, log_id: str = "log-1", page_rows: int = 4096) -> None:
        self.dim, self.log_id, self.page_rows = dim, log_id, page_rows
        self.counter = 0
        #: id -> row and vector, live and dead.
        self.rows: dict[str, tuple[LogRow, np.ndarray]] = {}
        self.reads: list[int] = []
        #: What the next reads raise instead of answering.
        self.failures: list[Exception] = []
        #: Reads wait while this is clear.
        self.open = asyncio.Event()
        self.open.set()

    def write(
        self,
        upserts: Mapping[str, np.ndarray] | None = None,
        deletes: tuple[str, ...] = (),
        attributes: Mapping[str, Attributes] | None = None,
    ) -> LogDelta:
        """Commit a batch; returns the delta that a gateway would push."""
        after, rows, vectors = self.counter, [], []
        for id, vector in [*(upserts or {}).items(), *((id, None) for id in deletes)]:
            if vector is None and (id not in self.rows or self.rows[id][0].deleted):
                continue
            self.counter += 1
            row = LogRow(
                id=id,
                slot=slot_of(id, 16),
                version=Version(1, self.counter),
                deleted=vector is None,
                text=None if vector is None else f"text of {id} at {self.counter}",
                attributes={} if vector is None else (attributes or {}).get(id, {}),
            )
            raw = np.zeros(self.dim, np.float32) if vector is None else np.asarray(vector, np.float32)
            self.rows[id] = row, raw
            rows.append(row)
            vectors.append(raw)
        stacked = np.stack(vectors) if vectors else np.zeros((0, self.dim), np.float32)
        return LogDelta(self.log_id, after, self.counter, rows, stacked)

    async def tail(self, after: int, slots: Sequence[int] | None = None, rows: int | None = None) -> LogDelta:
        """The log after a position, at most a page of it; of these slots only, and so many rows."""
        self.reads.append(after)
        await self.open.wait()
        if self.failures:
            raise self.failures.pop(0)
        found = sorted(
            (
                pair
                for pair in self.rows.values()
                if pair[0].version.seq > after and (slots is None or pair[0].slot in slots)
            ),
            key=lambda p: p[0].version.seq,
        )
        page = found[: min(rows or self.page_rows, self.page_rows)]
        upto = self.counter if len(page) == len(found) else page[-1][0].version.seq
        vectors = np.stack([v for _, v in page]) if page else np.zeros((0, self.dim), np.float32)
        return LogDelta(self.log_id, after, upto, [row for row, _ in page], vectors)

    @property
    def live(self) -> dict[str, tuple[LogRow, np.ndarray]]:
        """The documents there are."""
        return {id: pair for id, pair in self.rows.items() if not pair[0].deleted}
