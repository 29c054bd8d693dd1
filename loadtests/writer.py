"""One who writes ready vectors while others search.

In a process of its own: in the searching client's it would hold up the searches that are measured.
"""

import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np

from loadtests.corpus import Package
from ringfort import Client

_READY = "ready"


class Writer:
    """Writes the packages again and again, under other ids than theirs, between `start` and `stop`.

    A context manager. The collection does not grow for ever, nor become large enough for a graph.
    """

    def __init__(
        self, server: str, collection: str, packages: Sequence[Package], vectors: np.ndarray, *, batch: int
    ) -> None:
        """vectors: float32 [packages, dim]."""
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, server, collection, list(packages), vectors, batch), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ours.recv()  # it is there; EOFError where it could not begin

    def start(self, most_per_s: float) -> None:
        """Begin to write, no more than so many documents a second."""
        self._ours.send(most_per_s)

    def stop(self) -> float:
        """End it, and wait until all is visible; the documents a second that were."""
        self._ours.send(None)
        return float(self._ours.recv())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        self._process.join()
        self._process.close()


def _serve(
    told: Connection,
    server: str,
    collection: str,
    packages: Sequence[Package],
    vectors: np.ndarray,
    batch: int,
) -> None:
    """The process: for each pace it is told, write until the next word, and tell how fast that was."""
    numbers = itertools.count()

    def documents(most_per_s: float) -> Iterator[dict[str, object]]:
        began_s = time.monotonic()
        for written in itertools.count():
            if written % batch == 0 and told.poll(
                max(0.0, began_s + written / most_per_s - time.monotonic())
            ):
                return
            at = next(numbers) % len(packages)
            yield packages[at].document(vectors[at]) | {"id": f"more-{at}"}

    with Client(server, timeout_s=120) as client:
        told.send(_READY)
        try:
            while (most_per_s := told.recv()) is not None:
                began_s = time.monotonic()
                result = client.upsert(collection, documents(most_per_s), wait="VISIBLE", batch=batch)
                told.recv()
                told.send(result.written / (time.monotonic() - began_s))
        except EOFError:
            return
