"""Makes the vectors of a generation that is not the live one: of all there is, and then of what is written.

Writes never wait for it. It goes through every log in order, and what it has put is what the generation's
copies may read; so however far it has come, they hold exactly that.
"""

import asyncio
import logging
from collections.abc import Mapping

import numpy as np

from services import tasks
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.gateway.directory import Directory
from services.gateway.models import Models
from services.gateway.served import Served
from services.metadata.generations import Unembedded
from shard_router.errors import NotFound, PreconditionFailed, RingfortError

log = logging.getLogger(__name__)

#: Documents of one transaction.
PAGE_ROWS = 512
#: Embedding a page may take so long, as behind everybody else's.
PAGE_S = 120.0
#: How often it is looked for what other gateways have written, and pauses after failures.
LOOK_S, FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 0.1, 5.0


class Backfill:
    """One generation's vectors, in all of its databases. `start` once; `close` ends it."""

    def __init__(self, catalog: Directory, models: Models, served: Served) -> None:
        self._catalog, self._models = catalog, models
        self._generations = catalog.store.generations
        #: The generation.
        self.served = served
        #: By database, up to where its vectors are complete, and where its log stands; as of the last page.
        self._upto: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        #: Why it cannot go on, once that is so.
        self.failed: str | None = None
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._documents = 0

    def start(self) -> None:
        """Begin where it ended."""
        self._tasks = [
            asyncio.create_task(
                self._follow(database), name=f"backfill {self.served.collection.name} {database}"
            )
            for database in self.served.logs
        ]

    async def close(self) -> None:
        """End; what was put stays."""
        await tasks.end(*self._tasks)

    @property
    def documents(self) -> int:
        """How many documents it has made vectors of since the start."""
        return self._documents

    @property
    def progress(self) -> tuple[int, int]:
        """Up to which positions its vectors are complete, and where the logs stand, added up."""
        return sum(self._upto.values()), sum(self._ends.values())

    async def reach(self, positions: Mapping[str, int], deadline: Deadline) -> bool:
        """Whether it has come to these positions, by database, before the deadline.

        PreconditionFailed where it cannot go on.
        """
        while not all(self._upto.get(database, -1) >= at for database, at in positions.items()):
            self._moved.clear()
            if self.failed is not None:
                raise PreconditionFailed(self.failed)
            try:
                async with asyncio.timeout(deadline.left_s()):
                    await self._moved.wait()
            except TimeoutError:
                return False
        return True

    async def _follow(self, database: str) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await self._page(database)
                pause_s = FIRST_PAUSE_S
                continue
            except NotFound as gone:
                log.info("no more vectors of %s: %s", self.served.collection.name, gone)
                return
            except PreconditionFailed as error:
                self.failed = str(error)
                self._moved.set()
                log.error("vectors of %s cannot be made: %s", self.served.collection.name, error)
                return
            except (RingfortError, OSError) as error:
                log.warning("vectors of %s cannot be made now: %s", self.served.collection.name, error)
            except Exception:
                log.exception("vectors of %s cannot be made now", self.served.collection.name)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _page(self, database: str) -> None:
        """Put the next page, or wait until there is one."""
        made = self.served.collection
        live = self._catalog.of(made.uid)
        if live is None:
            raise NotFound("collection", made.name)
        if live is self.served:
            raise NotFound("generation beside the live one", made.name)
        live.moved.clear()
        copies = live.collection.space == made.space
        page = await self._generations.unembedded(
            made, live.collection, database, PAGE_ROWS, with_vectors=copies
        )
        self._ends[database] = page.end
        if page.upto > page.after:
            vectors = page.vectors if page.vectors is not None else await self._embedded(page)
            await self._generations.put(made, database, page, vectors)
            self._documents += len(page.ids)
        self._upto[database] = page.upto
        self.served.heard({self.served.logs[database].log_id: page.upto})
        self._moved.set()
        if page.upto > page.after:
            self.served.look()
        if page.upto == page.end:
            await self._more(live, database, page.end)

    async def _embedded(self, page: Unembedded) -> np.ndarray:
        """float32 [n, dim]; PreconditionFailed for a document without a text."""
        made = self.served.collection
        for id, text in zip(page.ids, page.texts, strict=True):
            if not text:
                raise PreconditionFailed(f"document {id!r} has no text to make a vector of")
        if not page.texts:
            return np.zeros((0, made.dim), np.float32)
        embedded = await self._models.embed_for(
            made, page.texts, InputType.DOCUMENT, Deadline.after(PAGE_S), use_cache=False
        )
        return embedded.vectors

    async def _more(self, live: Served, database: str, position: int) -> None:
        """Return when the log may have gone on from there."""
        while live.logs[database].position <= position and self._catalog.of(live.collection.uid) is live:
            try:
                async with asyncio.timeout(LOOK_S):
                    await live.moved.wait()
                live.moved.clear()
            except TimeoutError:
                pass
