"""A writer that keeps account of what was acknowledged, and compares the service with it."""

import threading
import time
from collections.abc import Callable
from random import Random

import numpy as np

from ringfort import Client
from ringfort.documents import WriteToken
from ringfort.errors import DeadlineExceeded, Unavailable

COLLECTION = "ledger"
DIM = 8
#: So few that one search can answer with all of them.
IDS = [f"document-{n}" for n in range(900)]
#: A write that nobody acknowledges for so long is lost.
ACKNOWLEDGED_WITHIN_S = 60.0


class Ledger(threading.Thread):
    """Upserts and deletes without end, each repeated until it is acknowledged.

    So whenever no write is under way the collection has to be exactly what is written here: neither an
    acknowledged document lost, nor an old version or a deleted document come back.
    """

    def __init__(self, client: Client, rng: Random) -> None:
        super().__init__(name="ledger", daemon=True)
        self._client, self._rng = client, rng
        #: Held while a write is under way.
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._token = WriteToken()
        #: Every document that there is, and the number it was last written with.
        self.documents: dict[str, int] = {}
        self.writes = 0
        self.failure: BaseException | None = None
        client.create_collection(COLLECTION, dim=DIM, attributes={"number": "int"})

    def run(self) -> None:
        """Writes until `close`, or until a write fails in a way that it should not."""
        try:
            while not self._over.is_set():
                with self._writing:
                    self._delete() if self._rng.random() < 0.3 else self._upsert()
                    self.writes += 1
        except BaseException as error:
            self.failure = error
            raise

    def close(self) -> None:
        """Ends the writing after the write under way."""
        self._over.set()
        self.join(2 * ACKNOWLEDGED_WITHIN_S)

    def compare(self) -> None:
        """Between two writes: the service has exactly what is written here, by every way of asking."""
        with self._writing:
            assert self.failure is None
            stored = {
                document.id: document.attributes["number"]
                for document in self._client.scan(COLLECTION, include=["attributes"])
            }
            assert stored == self.documents
            assert self._client.count(COLLECTION) == len(self.documents)
            hits = self._client.search(
                COLLECTION, vector=np.ones(DIM, np.float32), k=1_000, exact=True, read_after=self._token
            )
            assert {hit.id: hit.attributes["number"] for hit in hits} == self.documents

    def _upsert(self) -> None:
        ids = self._rng.sample(IDS, self._rng.randrange(1, 60))
        vectors = np.random.default_rng(self._rng.getrandbits(32)).normal(size=(len(ids), DIM))
        numbers = {id: self.writes * len(IDS) + n for n, id in enumerate(ids)}
        documents = [
            {"id": id, "vector": vector.astype(np.float32), "attributes": {"number": numbers[id]}}
            for id, vector in zip(ids, vectors, strict=True)
        ]

        def write() -> None:
            result = self._client.upsert(COLLECTION, documents)
            assert result.failures == ()
            self._token |= result.token

        _until_acknowledged(write)
        self.documents |= numbers

    def _delete(self) -> None:
        ids = self._rng.sample(IDS, self._rng.randrange(1, 30))

        def write() -> None:
            self._token |= self._client.delete(COLLECTION, ids=ids).token

        _until_acknowledged(write)
        for id in ids:
            self.documents.pop(id, None)


def _until_acknowledged(write: Callable[[], None]) -> None:
    until_s = time.monotonic() + ACKNOWLEDGED_WITHIN_S
    while True:
        try:
            return write()
        except (Unavailable, DeadlineExceeded):
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
