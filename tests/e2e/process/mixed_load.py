"""Writers and searchers side by side, what they saw, and when."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import numpy as np

from protos.ringfort import v1 as pb
from protos.ringfort.v1.document_pb2_grpc import DocumentServiceStub
from protos.ringfort.v1.search_pb2_grpc import SearchServiceStub
from ringfort import Client
from ringfort.errors import RingfortError

DIM = 8
#: A write is repeated until it is acknowledged, for so long.
ACKNOWLEDGED_WITHIN_S = 120.0


@dataclass
class Seen:
    """What the searches of one kind saw during a phase."""

    searches: Counter[str] = field(default_factory=Counter)
    least_coverage: float = 1.0

    def __str__(self) -> str:
        failed = {name: count for name, count in self.searches.items() if name != "OK"}
        return (
            f"{self.searches['OK']} answered, failed {failed or 'none'}, coverage >= {self.least_coverage:g}"
        )


class MixedLoad:
    """Upserts, searches over shards of one and of two copies, text searches and counts, without end."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address)
        self._searches = SearchServiceStub(self._channel)
        self._documents = DocumentServiceStub(self._channel)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._began_s = time.monotonic()
        #: By id, what was acknowledged last, in either collection.
        self.acknowledged: dict[str, int] = {}
        self.writes = 0
        self.seen: dict[str, Seen] = {}
        self.timeline: list[str] = []
        self.failure: BaseException | None = None
        with Client(address) as client:
            for name, replicas in (("sole", 1), ("pair", 2)):
                client.create_collection(
                    name, dim=DIM, attributes={"number": "int"}, shards=2, replicas=replicas
                )
            client.create_collection("texts", shards=1, replicas=2)
            client.upsert("texts", [{"id": str(i), "text": f"text number {i}"} for i in range(50)])
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, *args), daemon=True)
            for work, *args in (
                (self._write,), (self._search, "sole"), (self._search, "pair"), (self._search_texts,),
                (self._count_pair,),
            )
        ]  # fmt: skip

    def __enter__(self) -> "MixedLoad":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * ACKNOWLEDGED_WITHIN_S)
        self._channel.close()

    def tell(self, event: str) -> None:
        """Put an event into the timeline."""
        self.timeline.append(f"{time.monotonic() - self._began_s:7.2f} s  {event}")

    def phase(self, name: str) -> dict[str, Seen]:
        """Begin a phase; what was seen in the one before, which goes into the timeline."""
        assert self.failure is None, self.failure
        with self._lock:
            seen, self.seen = self.seen, {}
        for kind, each in sorted(seen.items()):
            self.tell(f"    {kind}: {each}")
        self.tell(name)
        return seen

    def enough(self, searches: int) -> bool:
        """Whether so many searches of each kind were answered in this phase."""
        assert self.failure is None, self.failure
        with self._lock:
            answered = [
                self.seen[kind].searches["OK"] if kind in self.seen else 0
                for kind in ("sole", "pair", "texts", "count")
            ]
        return min(answered) >= searches

    def _guarded(self, work: object, *args: object) -> None:
        try:
            with Client(self._address, timeout_s=10) as client:
                while not self._over.is_set():
                    work(client, *args)  # type: ignore[operator]
        except BaseException as error:
            self.failure = error
            raise

    def _write(self, client: Client) -> None:
        number = len(self.acknowledged) and max(self.acknowledged.values()) + 1
        rows = {f"d{(number + i) % 997}": number + i for i in range(20)}
        vectors = {id: np.random.default_rng(value).standard_normal(DIM) for id, value in rows.items()}
        documents = [
            {"id": id, "vector": vectors[id].astype(np.float32), "attributes": {"number": value}}
            for id, value in rows.items()
        ]
        until_s = time.monotonic() + ACKNOWLEDGED_WITHIN_S
        for collection in ("sole", "pair"):
            while True:
                try:
                    client.upsert(collection, documents)
                    break
                except RingfortError:
                    if time.monotonic() > until_s:
                        raise
                    time.sleep(0.05)
        self.acknowledged.update(rows)
        self.writes += 1

    def _search(self, client: Client, collection: str) -> None:
        query = np.random.default_rng().standard_normal(DIM).astype(np.float32)
        vector = pb.Matrix(data=query.tobytes(), rows=1, dim=DIM)
        self._ask(collection, pb.SearchRequest(collection=collection, vector=vector, k=5))

    def _search_texts(self, client: Client) -> None:
        text = f"number {np.random.default_rng().integers(1 << 30)}"
        self._ask("texts", pb.SearchRequest(collection="texts", text=text, k=3))

    def _count_pair(self, client: Client) -> None:
        # By filter, so that shards are asked and not the database; it waits for the log, so that needs it.
        self._ask("count", pb.CountRequest(collection="pair", filter=pb.Filter(text="number >= 0")))

    def _ask(self, kind: str, request: pb.SearchRequest | pb.CountRequest) -> None:
        outcome, coverage = "OK", 1.0
        try:
            # Message by message: the client's channel would try again by itself.
            if isinstance(request, pb.CountRequest):
                self._documents.Count(request, timeout=10)
            else:
                told = self._searches.Search(request, timeout=10).coverage
                coverage = told.shards_answered / told.shards_asked
        except grpc.RpcError as error:
            outcome = error.code().name
            time.sleep(0.02)
        with self._lock:
            seen = self.seen.setdefault(kind, Seen())
            seen.searches[outcome] += 1
            if outcome == "OK":
                seen.least_coverage = min(seen.least_coverage, coverage)
