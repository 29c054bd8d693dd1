"""Shard replicas in this process, each with a directory of its own."""

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.shard.file_work import CHILD_ROWS
from services.shard.replica import Replica, Tail
from shard_router.errors import UnknownLog
from shard_router.model import HOME, Collection

log = logging.getLogger(__name__)

#: Reads a collection's log in a database for one reader.
Follow = Callable[[Collection, str], Tail]


class LocalShards:
    """Opens replicas, and removes what they leave behind."""

    def __init__(
        self,
        directory: Path,
        follow: Follow,
        *,
        search_threads: ThreadPoolExecutor,
        memtable_rows: int,
        graph_rows: int,
        child_rows: int = CHILD_ROWS,
        poll_ms: int,
        device: str,
    ) -> None:
        self._directory = directory
        self._follow = follow
        self._search_threads = search_threads
        self._memtable_rows = memtable_rows
        self._graph_rows = graph_rows
        self._child_rows = child_rows
        self._poll_ms = poll_ms
        self._device = device

    async def open(
        self,
        collection: Collection,
        shard: int,
        replica: int,
        *,
        database: str = HOME,
        slots: Sequence[int],
        epoch: int,
        log_id: str,
    ) -> Replica:
        """A replica that has these slots of the log and answers for them at `epoch`.

        Made of its files, or of nothing but the log where those cannot follow it any more.
        """
        directory = self._folder(collection) / folder_of(shard, replica, database)

        async def opened() -> Replica:
            return await Replica.open(
                collection,
                directory=directory,
                log_id=log_id,
                tail=self._follow(collection, database),
                slots=slots,
                epoch=epoch,
                search_threads=self._search_threads,
                memtable_rows=self._memtable_rows,
                graph_rows=self._graph_rows,
                child_rows=self._child_rows,
                poll_ms=self._poll_ms,
                device=self._device,
            )

        try:
            return await opened()
        except UnknownLog as unknown:
            log.warning("%s cannot follow its log and is built anew: %s", directory, unknown)
            await _remove(directory)
            return await opened()

    async def forget(self, collection: Collection, shard: int, replica: int, *, database: str = HOME) -> None:
        """Remove the files of a closed replica that will not be opened again."""
        await _remove(self._folder(collection) / folder_of(shard, replica, database))

    async def forget_all(self, collection: Collection) -> None:
        """Remove every file of a collection that is gone."""
        await _remove(self._folder(collection))

    async def keep_only(self, collections: Iterable[tuple[int, int]]) -> None:
        """Remove the files of every collection but those of these (uid, generation)."""
        known = {_name(*each) for each in collections}
        if not self._directory.is_dir():
            return
        for leftover in list(self._directory.iterdir()):
            if leftover.name not in known:
                log.info("removing segments of a collection that is gone: %s", leftover.name)
                await _remove(leftover)

    def _folder(self, collection: Collection) -> Path:
        return self._directory / _name(collection.uid, collection.generation)


def _name(uid: int, generation: int) -> str:
    return f"{uid}-{generation}"


def folder_of(shard: int, replica: int, database: str = HOME) -> str:
    """The directory of one copy of a shard, as far as it follows one database, within its collection's."""
    copy = f"shard-{shard}" if replica == 0 else f"shard-{shard}-{replica}"
    return copy if database == HOME else f"{copy}.{database}"


async def _remove(path: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
