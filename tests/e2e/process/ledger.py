"""A writer that keeps account of what was acknowledged, and compares the service with it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

import brute_force
import grpc
import numpy as np

from ringfort import Client
from ringfort.documents import Patch, WriteToken
from ringfort.errors import DeadlineExceeded, Unavailable
from ringfort.results import WriteResult
from shard_router.model import AttributeType

COLLECTION = "ledger"
DIM = 8
SCHEMA = {"number": AttributeType.INT}
#: So few that one search can answer with all of them.
IDS = [f"document-{n}" for n in range(900)]
#: A write that nobody acknowledges for so long is lost.
ACKNOWLEDGED_WITHIN_S = 60.0
#: What a search that is not exact has to find, of all that it was asked for in one comparison.
LEAST_RECALL = 0.95


@dataclass(frozen=True)
class Entry:
    """A document as it was last acknowledged."""

    number: int
    vector: np.ndarray


class Ledger(threading.Thread):
    """Upserts, patches and deletes without end, each repeated until it is acknowledged.

    So whenever no write is under way the collection has to be exactly what is written here: neither an
    acknowledged document lost, nor an old version or a deleted document come back.
    """

    def __init__(self, client: Client, rng: Random) -> None:
        super().__init__(name="ledger", daemon=True)
        self._client, self._rng = client, rng
        self._vectors = np.random.default_rng(rng.getrandbits(32))
        #: Held while a write is under way.
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._token = WriteToken()
        #: Every document that there is.
        self.documents: dict[str, Entry] = {}
        self.writes = 0
        self.failure: BaseException | None = None
        client.create_collection(COLLECTION, dim=DIM, attributes={"number": "int"}, shards=2)

    def run(self) -> None:
        """Writes until `close`, or until a write fails in a way that it should not."""
        kinds = {self._upsert: 6, self._delete: 2, self._patch: 2, self._delete_matching: 1}
        try:
            while not self._over.is_set():
                with self._writing:
                    [write] = self._rng.choices(list(kinds), list(kinds.values()))
                    write()
                    self.writes += 1
        except BaseException as error:
            self.failure = error
            raise

    def close(self) -> None:
        """Ends the writing after the write under way."""
        self._over.set()
        self.join(2 * ACKNOWLEDGED_WITHIN_S)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Nothing is written meanwhile."""
        with self._writing:
            yield

    def compare(self) -> None:
        """Between two writes: the service has exactly what is written here, by every way of asking."""
        with self._writing:
            assert self.failure is None
            documents = self.documents
            stored = list(self._client.scan(COLLECTION, include=["attributes", "vector"]))
            assert {document.id for document in stored} == documents.keys()
            for document in stored:
                entry = documents[document.id]
                assert document.attributes["number"] == entry.number, document.id
                np.testing.assert_array_equal(document.vector, entry.vector)
            assert self._client.count(COLLECTION) == len(documents)
            large = sum(entry.number > 1_000 for entry in documents.values())
            assert self._client.count(COLLECTION, filter="number > 1000") == large
            self._compare_searches()

    def _compare_searches(self) -> None:
        ids, numbers = list(self.documents), {id: entry.number for id, entry in self.documents.items()}
        if not ids:
            return
        vectors = np.stack([entry.vector for entry in self.documents.values()])
        wanted = found = 0
        for query in self._vectors.normal(size=(3, DIM)).astype(np.float32):
            scores = brute_force.scores("cosine", query, vectors)
            for k in (10, 1_000):
                best = set(brute_force.best(scores, ids, k))
                for exact in (True, False):
                    hits = self._client.search(
                        COLLECTION, vector=query, k=k, exact=exact, read_after=self._token, cache=False
                    )
                    told = {hit.id: hit.attributes["number"] for hit in hits}
                    assert told.items() <= numbers.items()
                    assert len(told) == len(best)
                    assert not exact or told.keys() == best
                    wanted, found = wanted + len(best), found + len(best & told.keys())
        assert found >= LEAST_RECALL * wanted, (found, wanted)

    def _upsert(self) -> None:
        ids = self._rng.sample(IDS, self._rng.randrange(1, 60))
        vectors = self._vectors.normal(size=(len(ids), DIM)).astype(np.float32)
        entries = {
            id: Entry(self.writes * len(IDS) + n, vector)
            for n, (id, vector) in enumerate(zip(ids, vectors, strict=True))
        }
        documents = [
            {"id": id, "vector": entry.vector, "attributes": {"number": entry.number}}
            for id, entry in entries.items()
        ]

        def write() -> None:
            self._token |= _whole(self._client.upsert(COLLECTION, documents)).token

        _until_acknowledged(write)
        self.documents |= entries

    def _patch(self) -> None:
        ids = [id for id in self._rng.sample(IDS, 20) if id in self.documents]
        if not ids:
            return
        patches = [Patch(id, {"number": -self.writes}) for id in ids]

        def write() -> None:
            self._token |= _whole(self._client.patch(COLLECTION, patches)).token

        _until_acknowledged(write)
        for id in ids:
            self.documents[id] = replace(self.documents[id], number=-self.writes)

    def _delete(self) -> None:
        ids = self._rng.sample(IDS, self._rng.randrange(1, 30))

        def write() -> None:
            self._token |= self._client.delete(COLLECTION, ids=ids).token

        _until_acknowledged(write)
        for id in ids:
            self.documents.pop(id, None)

    def _delete_matching(self) -> None:
        low = self._rng.randrange(max(1, self.writes)) * len(IDS)

        def write() -> None:
            filter = f"number >= {low} and number < {low + 15}"
            self._token |= self._client.delete(COLLECTION, filter=filter).token

        _until_acknowledged(write)
        self.documents = {
            id: entry for id, entry in self.documents.items() if not low <= entry.number < low + 15
        }


def _whole(result: WriteResult) -> WriteResult:
    """The result; Unavailable where one of several databases did not take its part."""
    for failure in result.failures:
        assert failure.code is grpc.StatusCode.UNAVAILABLE, failure
        raise Unavailable(failure.message)
    return result


def _until_acknowledged(write: Callable[[], None]) -> None:
    until_s = time.monotonic() + ACKNOWLEDGED_WITHIN_S
    while True:
        try:
            return write()
        except (Unavailable, DeadlineExceeded):
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
