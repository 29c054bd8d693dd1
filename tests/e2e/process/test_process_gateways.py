"""Two gateways behind one port: no answer is older than what was acknowledged, whatever happens to one.

COMPOSITION=ray runs it on a local Ray cluster; else the processes are the head's children. With DATABASES=2
the documents lie in two databases.
"""

import base64
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from command_line import eventually
from partitions import lend_partitions
from up import Up, end

from protos.ringfort import v1 as pb
from protos.ringfort.v1.document_pb2_grpc import DocumentServiceStub
from ringfort import Client
from services.gateway.siblings import LEASE_S

LAUNCHER = os.environ.get("COMPOSITION", "processes")
ENVIRONMENT = {"RINGFORT_CLUSTER__LAUNCHER": LAUNCHER, "RINGFORT_SHARD__MEMTABLE_ROWS": "500"}
DIM = 8
#: So many writers that some of them are at the other gateway, whichever of the two is stopped.
WRITERS, READERS = 12, 2
#: A writer's pause between two writes: answers are to be kept between those of all.
PAUSE_S = 0.1
#: Of one document.
VERSIONS = 20
READS = 50
BACK_WITHIN_S = 90.0
QUERY = np.ones(DIM, np.float32)


@pytest.fixture
def service(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[Up]:
    with lend_partitions(request) as partitions:
        env = ENVIRONMENT | partitions
        up = Up.start(data_dir, "--cluster", "--gateways", "2", env=env, ready_within_s=240)
        yield up
        if up.process.poll() is None:
            assert up.stop(60) == 0
        end(up.process)


@dataclass(frozen=True)
class Seen:
    """What is certain of one document, and what may be."""

    #: The last version that was acknowledged as visible, and whether it was a delete.
    version: int = 0
    deleted: bool = True
    #: The last delete that was sent: it may be there, or come at any time.
    deleting: int = 0

    def allows(self, found: int | None) -> bool:
        """Whether an answer may have that version, or lack the document."""
        if found is not None:
            return found > self.version or (found == self.version and not self.deleted)
        return self.deleted or self.deleting > self.version


class Adversaries:
    """Writers and deleters over the common port, readers at each gateway; a stale answer is a failure."""

    def __init__(self, address: str, gateways: dict[str, str]) -> None:
        """gateways: by name, where each alone answers HTTP."""
        self._address = address
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._documents: dict[str, Seen] = {}
        self.reads: Counter[tuple[str, str]] = Counter()
        self.acknowledged = self.failed_writes = 0
        self.failure: BaseException | None = None
        self._threads = [
            *(threading.Thread(target=self._guarded, args=(self._write, n)) for n in range(WRITERS)),
            *(
                threading.Thread(target=self._guarded, args=(self._read, name, http))
                for name, http in gateways.items()
                for _ in range(READERS)
            ),
        ]

    def __enter__(self) -> "Adversaries":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert self.failure is None, self.failure

    def move(self, name: str, http: str) -> None:
        """A gateway that was started again alone answers there."""
        self._threads.append(threading.Thread(target=self._guarded, args=(self._read, name, http)))
        self._threads[-1].start()

    def cached(self, name: str) -> int:
        """Answers that a gateway has served from its cache."""
        assert self.failure is None, self.failure
        return self.reads[name, "L1"]

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        try:
            work(*args)
        except BaseException as error:
            self.failure = error
            self._over.set()
            raise

    def _write(self, number: int) -> None:
        """Versions of one document after another; after an unknown outcome another document is begun."""
        begun = 0
        while not self._over.is_set():
            id = f"w{number}/{begun}"
            begun += 1
            # A channel of its own reaches either gateway.
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(self._address, options) as channel:
                stub = DocumentServiceStub(channel)
                for version in range(1, VERSIONS + 1):
                    if self._over.is_set() or not self._sent(stub, id, version):
                        break
                    self._over.wait(PAUSE_S)

    def _sent(self, stub: DocumentServiceStub, id: str, version: int) -> bool:
        """Whether a version was acknowledged; every fifth is a delete."""
        delete = version % 5 == 0
        with self._lock:
            before = self._documents.get(id, Seen())
            self._documents[id] = replace(before, deleting=version) if delete else before
        try:
            visible = (_delete if delete else _upsert)(stub, id, version)
        except grpc.RpcError:
            visible = False
        if not visible:
            self.failed_writes += 1
            return False
        with self._lock:
            self._documents[id] = Seen(version, delete, version if delete else before.deleting)
            self.acknowledged += 1
        return True

    def _read(self, name: str, http: str) -> None:
        """The same question again and again, at one gateway."""
        vector = {"rows": 1, "dim": DIM, "data": base64.b64encode(QUERY.tobytes()).decode()}
        body = {"collection": "ledger", "vector": vector, "k": 1_000, "min_coverage": 1.0}
        with httpx.Client(base_url=f"http://{http}", timeout=20.0) as web:
            while not self._over.is_set():
                with self._lock:
                    before = dict(self._documents)
                try:
                    answer = web.post("/v1/search", json=body)
                except httpx.HTTPError:
                    if not _answers(http):
                        return  # it was killed
                    continue
                if answer.status_code != 200:
                    self.reads[name, str(answer.status_code)] += 1
                    self._over.wait(0.05)
                    continue
                told = answer.json()
                found = {hit["id"]: int(hit["attributes"]["version"]["int"]) for hit in told["hits"]}
                with self._lock:
                    # A delete that was sent while it was asked may be in the answer.
                    known = {
                        id: replace(each, deleting=self._documents[id].deleting)
                        for id, each in before.items()
                    }
                    self.reads[name, told["served_from"]] += 1
                for id, each in known.items():
                    assert each.allows(found.get(id)), (
                        f"{name} has {id} as of {found.get(id)} from {told['served_from']}, and it was {each}"
                    )


def _upsert(stub: DocumentServiceStub, id: str, version: int) -> bool:
    document = pb.Document(id=id, attributes={"version": pb.Value(int=version)})
    vectors = pb.Matrix(data=QUERY.tobytes(), rows=1, dim=DIM)
    request = pb.UpsertRequest(collection="ledger", documents=[document], vectors=vectors, wait=pb.VISIBLE)
    return bool(stub.Upsert(request, timeout=2 * LEASE_S).visible)


def _delete(stub: DocumentServiceStub, id: str, version: int) -> bool:
    request = pb.DeleteRequest(collection="ledger", ids=[id], wait=pb.VISIBLE)
    return bool(stub.Delete(request, timeout=2 * LEASE_S).visible)


def _answers(http: str) -> bool:
    try:
        return httpx.get(f"http://{http}/healthz", timeout=20.0).status_code == 200
    except httpx.HTTPError:
        return False


def gateways(client: Client) -> dict[str, str]:
    """By name, where each gateway alone answers HTTP."""
    told = {
        each.name: each.detail for each in client.cluster().components if each.name.startswith("gateway ")
    }
    return {
        name.removeprefix("gateway "): detail.partition("http://")[2]
        for name, detail in told.items()
        if "http://" in detail
    }


def pid_of(client: Client, name: str) -> int:
    """A further gateway's process, once it is there."""

    def found() -> int:
        for each in client.cluster().components:
            if each.name == f"gateway {name}" and each.detail.startswith("pid "):
                return int(each.detail.split()[1])
        return 0

    return eventually(found, BACK_WITHIN_S)


@pytest.mark.timeout(600)
def test_no_answer_is_older_than_what_was_acknowledged(service: Up) -> None:
    with Client(service.grpc, timeout_s=30) as client:
        client.create_collection("ledger", dim=DIM, attributes={"version": "int"}, shards=2)
        at = gateways(client)
        assert set(at) == {"head", "gateway-1"}
        with Adversaries(service.grpc, at) as load:

            def cached_again() -> None:
                before = {name: load.cached(name) for name in at}
                acknowledged = load.acknowledged
                eventually(
                    lambda: all(load.cached(name) > before[name] + READS for name in at), BACK_WITHIN_S
                )
                eventually(lambda: load.acknowledged > acknowledged + READS, BACK_WITHIN_S)

            cached_again()
            pid = pid_of(client, "gateway-1")
            for stopped_s in (LEASE_S / 2, 2 * LEASE_S, 2 * LEASE_S):
                os.kill(pid, signal.SIGSTOP)
                acknowledged = load.acknowledged
                time.sleep(stopped_s)
                os.kill(pid, signal.SIGCONT)
                assert load.failure is None, load.failure
                # Who writes by the other one has waited for the end of the lease, and no longer.
                assert stopped_s < LEASE_S or load.acknowledged > acknowledged
                cached_again()

            os.kill(pid, signal.SIGKILL)
            with Client(service.grpc, timeout_s=30) as other:
                eventually(lambda: pid_of(other, "gateway-1") != pid, BACK_WITHIN_S)
                at = gateways(other)
            load.move("gateway-1", at["gateway-1"])
            cached_again()

            # The head stops: the other gateway goes on, and takes nothing for exact.
            os.kill(service.pid, signal.SIGSTOP)
            try:
                time.sleep(2 * LEASE_S)
                assert httpx.get(f"http://{at['gateway-1']}/readyz", timeout=30).status_code == 200
                before = load.cached("gateway-1")
                reads = load.reads["gateway-1", "INDEX"]
                eventually(lambda: load.reads["gateway-1", "INDEX"] > reads + READS, BACK_WITHIN_S)
                assert load.cached("gateway-1") == before
            finally:
                os.kill(service.pid, signal.SIGCONT)
            cached_again()
        assert {kind for _, kind in load.reads} <= {"L1", "REDIS", "INDEX", "503", "504"}, load.reads
        print(f"\n{dict(load.reads)}, {load.acknowledged} acknowledged, {load.failed_writes} not")
