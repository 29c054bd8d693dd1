"""Shards and replicas come and go under writes while the service is killed: nothing is lost or comes back.

KILLS says how many (4; `make long` 200), SEED repeats a sequence.
"""

import os
import secrets
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

KILLS = int(os.environ.get("KILLS", "4"))
SEED = int(os.environ.get("SEED", "0")) or secrets.randbits(32)
SETTINGS = {"RINGFORT_SHARD__MEMTABLE_ROWS": "32"}
MOST_SHARDS = 4


class Operator:
    """Asks for one change after the other."""

    def __init__(self, address: str, rng: Random) -> None:
        self._channel = grpc.insecure_channel(address)
        self._rpc, self._rng = Rpc.on(self._channel), rng

    def begin(self) -> pb.Job:
        """A change that is under way."""
        shards, replicas = self.described()
        if self._rng.random() < 0.3:
            request = pb.SetReplicasRequest(collection=COLLECTION, replicas=1 + replicas % 2)
            return self._rpc.cluster.SetReplicas(request, wait_for_ready=True, timeout=60)
        if len(shards) == 1 or (len(shards) < MOST_SHARDS and self._rng.random() < 0.5):
            return self._rpc.cluster.AddShard(pb.AddShardRequest(collection=COLLECTION), timeout=60)
        drain = pb.DrainShardRequest(collection=COLLECTION, shard=self._rng.choice(sorted(shards)))
        return self._rpc.cluster.DrainShard(drain, timeout=60)

    def described(self) -> tuple[set[int], int]:
        """The shards there are, and how many copies each has."""
        answer = self._rpc.cluster.Describe(pb.DescribeRequest(), wait_for_ready=True, timeout=60)
        replicas = next(each for each in answer.collections if each.name == COLLECTION).replicas
        return {each.shard for each in replicas}, 1 + max(each.replica for each in replicas)

    def ended(self, id: str) -> pb.Job:
        """The job, once it has come to its end."""
        job = pb.Job()
        for job in self._rpc.index.WatchJob(pb.WatchJobRequest(id=id), wait_for_ready=True, timeout=120):
            assert job.state in (pb.Job.RUNNING, pb.Job.SUCCEEDED), job
        return job

    def close(self) -> None:
        """Ask nothing more."""
        self._channel.close()


@pytest.mark.timeout(180 + 20 * KILLS)
def test_changes_of_shards_survive_kills_and_lose_nothing(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n[{KILLS} kills, SEED={SEED}]")
    rng = Random(SEED)
    with Killable(data_dir, SETTINGS) as service, service.client() as client:
        ledger = Ledger(client, Random(SEED))
        ledger.start()
        operator = Operator(service.grpc, rng)
        try:
            for n in range(KILLS):
                eventually(lambda: ledger.failure or ledger.writes >= 5, 60)
                before = operator.described()
                job = operator.begin()
                time.sleep(rng.choice((0.0, 0.02, 0.1, 0.5)))
                print(f"kill {n}: amid {job.kind} of {before}")
                orphans = service.kill_service()
                service.start()
                assert all_gone(orphans)
                # Amid the change, and after it.
                ledger.compare()
                assert operator.ended(job.id).state == pb.Job.SUCCEEDED
                ledger.compare()
                assert operator.described() != before
        finally:
            operator.close()
            ledger.close()
        ledger.compare()
        service.stop()
