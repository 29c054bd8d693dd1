"""One load: rows to documents to acknowledged batches."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ringfort.client import Client
from ringfort.documents import Document
from ringfort.errors import InvalidArgument
from ringfort.load.checkpoint import Checkpoint, Position
from ringfort.load.columns import Columns
from ringfort.load.sources import Source
from ringfort.results import WriteResult

#: Failures that are kept to be told; the others are counted.
MAX_TOLD = 10
_WRITE_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is: rows acknowledged as written and rows refused, earlier runs included.

    `rate` is rows a second of this run; `total` is None where the file does not tell.
    """

    acknowledged: int
    failed: int
    rate: float
    total: int | None


class Load:
    """Writes the rows of a source to a collection, from the checkpoint's position on.

    `run` may be called once. `progress` may be read from any thread. `problems` tells the first
    MAX_TOLD failures in words.
    """

    def __init__(
        self,
        client: Client,
        collection: str,
        source: Source,
        columns: Columns,
        *,
        checkpoint: Checkpoint | None = None,
        batch: int = 256,
        wait: str = "DURABLE",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        missing = [name for name in columns.names() if source.columns and name not in source.columns]
        if missing:
            raise InvalidArgument(
                f"{source.path} has no column {missing[0]!r}; it has {', '.join(source.columns)}"
            )
        self._client, self._collection, self._source, self._columns = client, collection, source, columns
        self._checkpoint, self._batch, self._wait, self._clock = checkpoint, batch, wait, clock
        #: Where this run started.
        self.start = checkpoint.read() if checkpoint else Position()
        self.problems: list[str] = []
        self._position = self.start
        self._total = source.count()
        self._started_at_s: float | None = None
        self._written_at_s = 0.0
        #: Numbers of the rows on their way, and of those that made no document, in order.
        self._on_their_way: deque[int] = deque()
        self._unreadable: deque[int] = deque()
        self._last_row = self.start.rows

    @property
    def progress(self) -> Progress:
        """How far it is now."""
        position = self._position
        elapsed_s = 0.0 if self._started_at_s is None else self._clock() - self._started_at_s
        rate = (position.rows - self.start.rows) / elapsed_s if elapsed_s > 0 else 0.0
        return Progress(position.rows - position.failed, position.failed, round(rate, 1), self._total)

    def run(self) -> Iterator[Progress]:
        """Loads everything, giving the progress after each acknowledged batch.

        Whatever ends it, the position reached is recorded; at the end of the file it is forgotten.
        Raises RingfortError (Unavailable when the service has been away for 30 s).
        """
        self._started_at_s = self._clock()
        results = self._client.upsert_stream(
            self._collection, self._documents(), wait=self._wait, batch=self._batch
        )
        try:
            for result in results:
                self._acknowledge(result)
                yield self.progress
            self._advance(self._last_row, refused=0)
        except BaseException:
            self._record(at_once=True)
            raise
        if self._checkpoint:
            self._checkpoint.remove()
        yield self.progress

    def _documents(self) -> Iterator[Document]:
        for row in self._source.rows():
            if row.number <= self.start.rows:
                continue
            self._last_row = row.number
            problem = row.problem
            if not problem:
                try:
                    document = self._columns.document(row.cells)
                except ValueError as error:
                    problem = str(error)
                else:
                    self._on_their_way.append(row.number)
                    yield document
                    continue
            self._tell(f"row {row.number}: {problem}")
            self._unreadable.append(row.number)

    def _acknowledge(self, result: WriteResult) -> None:
        for failure in result.failures:
            self._tell(f"document {failure.id!r}: {failure.message}")
        row = self._position.rows
        for _ in range(result.written + len(result.failures)):
            row = self._on_their_way.popleft()
        self._advance(row, refused=len(result.failures))
        self._record()

    def _advance(self, row: int, refused: int) -> None:
        """Everything up to this row is done with, `refused` more of it without success."""
        while self._unreadable and self._unreadable[0] <= row:
            self._unreadable.popleft()
            refused += 1
        self._position = Position(row, self._position.failed + refused)

    def _record(self, *, at_once: bool = False) -> None:
        now_s = self._clock()
        if self._checkpoint and (at_once or now_s - self._written_at_s >= _WRITE_EVERY_S):
            self._checkpoint.write(self._position)
            self._written_at_s = now_s

    def _tell(self, problem: str) -> None:
        if len(self.problems) < MAX_TOLD:
            self.problems.append(problem)
