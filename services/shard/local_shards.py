"""The replicas of this process: their directories, and how they are opened."""

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from services.shard.replica import Replica
from shard_router.errors import UnknownLog
from shard_router.model import Collection, LogDelta

log = logging.getLogger(__name__)

#: Reads a collection's log after a position, page by page; made anew for every reader.
Follow = Callable[[Collection], Callable[[int], Awaitable[LogDelta]]]


def slice_of(delta: LogDelta, mine: np.ndarray) -> LogDelta:
    """The part of a delta whose slots are marked in `mine` (bool [slots]); its positions stay."""
    keep = np.fromiter((mine[row.slot] for row in delta.rows), bool, len(delta.rows))
    if keep.all():
        return delta
    rows = [row for row, kept in zip(delta.rows, keep, strict=True) if kept]
    return replace(delta, rows=rows, vectors=delta.vectors[keep])


class LocalShards:
    """Opens replicas on one directory, with one set of search threads."""

    def __init__(
        self,
        directory: Path,
        follow: Follow,
        *,
        search_threads: ThreadPoolExecutor,
        memtable_rows: int,
        graph_rows: int,
        poll_ms: int,
        device: str,
    ) -> None:
        self._directory = directory
        self._follow = follow
        self._search_threads = search_threads
        self._memtable_rows = memtable_rows
        self._graph_rows = graph_rows
        self._poll_ms = poll_ms
        self._device = device

    async def open(self, collection: Collection, shard: int, slots: np.ndarray, log_id: str) -> Replica:
        """A replica of its files, or of nothing but the log where those cannot follow it any more.

        slots: bool [slots], those of the shard. Returns when it can answer.
        """
        directory = self._folder(collection) / f"shard-{shard}"

        async def opened() -> Replica:
            follow = self._follow(collection)

            async def tail(after: int) -> LogDelta:
                return slice_of(await follow(after), slots)

            return await Replica.open(
                collection,
                directory=directory,
                log_id=log_id,
                tail=tail,
                search_threads=self._search_threads,
                memtable_rows=self._memtable_rows,
                graph_rows=self._graph_rows,
                poll_ms=self._poll_ms,
                device=self._device,
            )

        try:
            return await opened()
        except UnknownLog as unknown:
            log.warning("%s cannot follow its log and is built anew: %s", directory, unknown)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            return await opened()

    async def forget(self, collection: Collection) -> None:
        """Remove what lies here of a collection that is gone; its replicas are closed."""
        await asyncio.to_thread(shutil.rmtree, self._folder(collection), ignore_errors=True)

    async def keep_only(self, collections: Iterable[tuple[int, int]]) -> None:
        """Remove what lies here of any collection but those of these (uid, generation)."""
        known = {_name(*each) for each in collections}
        if self._directory.is_dir():
            for leftover in self._directory.iterdir():
                if leftover.name not in known:
                    log.info("removing segments of a collection that is gone: %s", leftover.name)
                    await asyncio.to_thread(shutil.rmtree, leftover, ignore_errors=True)

    def _folder(self, collection: Collection) -> Path:
        return self._directory / _name(collection.uid, collection.generation)


def _name(uid: int, generation: int) -> str:
    return f"{uid}-{generation}"
