"""Makes the vectors of a generation that is not the live one: of all there is, and then of what is written.

Writes never wait for it. It goes through every log in order, and what it has put is what the generation's
copies may read; so however far it has come, they hold exactly that.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext

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

#: Documents of one transaction, and pages that are made at once: the embedder has work while one is put.
PAGE_ROWS, PAGES = 512, 2
#: While somebody searches, one small batch is embedded at a time, so that a core stays free for them; and for
#: so long afterwards.
GENTLE_ROWS, GENTLE_S = 16, 1.0
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
        #: Held by whoever embeds while somebody searches.
        self._one_by_one = asyncio.Lock()
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
                await self._fill(database)
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

    async def _fill(self, database: str) -> None:
        """Put pages until there are no more, and return when there may be."""
        made, live = self.served.collection, self._live()
        live.moved.clear()
        copies = live.collection.space == made.space
        making: deque[tuple[Unembedded, asyncio.Task[np.ndarray]]] = deque()
        after = 0
        try:
            while True:
                page = await self._generations.unembedded(
                    made, live.collection, database, PAGE_ROWS, with_vectors=copies, after=after
                )
                self._ends[database], after = page.end, page.upto
                if page.upto > page.after:
                    making.append((page, asyncio.create_task(self._vectors(page, live))))
                ended = page.upto == page.end
                while len(making) >= PAGES or (ended and making):
                    first, vectors = making.popleft()
                    await self._generations.put(made, database, first, await vectors)
                    self._documents += len(first.ids)
                    self._reached(database, first.upto)
                    self.served.look()
                self._live()
                if ended:
                    break
        finally:
            await tasks.end(*(vectors for _, vectors in making))
        self._reached(database, page.upto)
        await self._more(live, database, page.end)

    def _live(self) -> Served:
        """The live generation; NotFound where there is none, or it is this one."""
        uid = self.served.collection.uid
        live = self._catalog.of(uid)
        if live is None or live is self.served:
            raise NotFound("generation beside the live one of", self.served.collection.name)
        return live

    def _reached(self, database: str, position: int) -> None:
        self._upto[database] = position
        self.served.heard({self.served.logs[database].log_id: position})
        self._moved.set()

    async def _vectors(self, page: Unembedded, live: Served) -> np.ndarray:
        """float32 [n, dim]; PreconditionFailed for a document without a text."""
        made = self.served.collection
        if page.vectors is not None:
            return page.vectors
        for id, text in zip(page.ids, page.texts, strict=True):
            if not text:
                raise PreconditionFailed(f"document {id!r} has no text to make a vector of")
        parts = [np.zeros((0, made.dim), np.float32)]
        start = 0
        while start < len(page.texts):
            gentle = time.monotonic() - live.searched_s < GENTLE_S
            texts = page.texts[start : start + GENTLE_ROWS] if gentle else page.texts[start:]
            async with self._one_by_one if gentle else nullcontext():
                embedded = await self._models.embed_for(
                    made, texts, InputType.DOCUMENT, Deadline.after(PAGE_S), use_cache=False
                )
            parts.append(embedded.vectors)
            start += len(texts)
        return np.concatenate(parts)

    async def _more(self, live: Served, database: str, position: int) -> None:
        """Return when the log may have gone on from there."""
        while live.logs[database].position <= position and self._catalog.of(live.collection.uid) is live:
            try:
                async with asyncio.timeout(LOOK_S):
                    await live.moved.wait()
                live.moved.clear()
            except TimeoutError:
                pass
