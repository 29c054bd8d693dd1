"""Generations are built and exchanged under writes and kills; nothing is lost or comes back.

KILLS says how many (2; `make long` 200), SEED repeats a sequence.
"""

import contextlib
import os
import secrets
import threading
import time
from pathlib import Path
from random import Random

import grpc
import pytest
from command_line import all_gone, eventually
from killable import Killable
from ledger import COLLECTION, Ledger
from rpc import Rpc

from protos.ringfort import v1 as pb

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("SEED", "0")) or secrets.randbits(32)
SETTINGS = {"RINGFORT_SHARD__MEMTABLE_ROWS": "64"}
KINDS = ("flat", "hnsw", "auto")


class Operator:
    """Has generations built and exchanged."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._rpc = Rpc.on(self._channel)

    def live(self) -> tuple[int, str]:
        """The live generation's number and index."""
        told = self._rpc.collection.Get(
            pb.GetCollectionRequest(name=COLLECTION), wait_for_ready=True, timeout=60
        )
        return told.generation, told.index.kind

    def build(self, kind: str) -> pb.Job:
        """A generation of that index, being built."""
        request = pb.ReindexRequest(collection=COLLECTION, index=pb.IndexSpec(kind=kind))
        return self._rpc.index.Reindex(request, wait_for_ready=True, timeout=60)

    def exchange(self, *, back: bool) -> None:
        """Begin an activation or a rollback; what the service says of it does not matter."""
        with contextlib.suppress(grpc.RpcError):
            if back:
                self._rpc.index.Rollback(pb.RollbackRequest(collection=COLLECTION), timeout=60)
            else:
                self._rpc.index.Activate(pb.ActivateRequest(collection=COLLECTION), timeout=60)

    def ended(self) -> pb.Job:
        """The latest job, once it has come to its end."""
        request = pb.ListJobsRequest(collection=COLLECTION)
        latest = self._rpc.index.ListJobs(request, wait_for_ready=True, timeout=60).jobs[0]
        job = pb.Job()
        watching = pb.WatchJobRequest(id=latest.id)
        for job in self._rpc.index.WatchJob(watching, wait_for_ready=True, timeout=120):
            assert job.state in (pb.Job.RUNNING, pb.Job.SUCCEEDED), job
        return job

    def close(self) -> None:
        """Ask nothing more."""
        self._channel.close()


@pytest.mark.timeout(240 + 30 * KILLS)
def test_changes_of_generations_survive_kills_and_lose_nothing(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n[{KILLS} kills, SEED={SEED}]")
    rng = Random(SEED)
    with Killable(data_dir, SETTINGS) as service, service.client() as client:
        ledger = Ledger(client, Random(SEED))
        ledger.start()
        operator = Operator(service.grpc)

        def kill(amid: str) -> None:
            time.sleep(rng.choice((0.0, 0.02, 0.1, 0.3)))
            print(f"kill amid {amid}")
            orphans = service.kill_service()
            service.start()
            assert all_gone(orphans)
            ledger.compare()

        try:
            for n in range(max(1, KILLS // 2)):
                eventually(lambda: ledger.failure or ledger.writes >= 5, 60)
                number, _ = operator.live()
                kind = rng.choice(KINDS)
                building = operator.build(kind)
                kill(f"building generation {building.generation} ({kind})")
                job = operator.ended()
                assert (job.id, job.generation) == (building.id, building.generation)
                ledger.compare()
                while operator.live()[0] == number:
                    exchanging = threading.Thread(target=operator.exchange, kwargs={"back": False})
                    exchanging.start()
                    kill("the exchange")
                    exchanging.join()
                    # Where the service was killed before it had written the job down, nothing has begun.
                    operator.ended()
                assert operator.live() == (building.generation, kind)
                ledger.compare()
                if n % 2 == 0:
                    operator.exchange(back=True)
                    assert operator.live()[0] == number
                    ledger.compare()
        finally:
            operator.close()
            ledger.close()
        ledger.compare()
        service.stop()
