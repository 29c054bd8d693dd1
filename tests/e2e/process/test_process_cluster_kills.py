"""Every process of a cluster killed in turn, under a mixed load: what goes on, fails, and comes back.

COMPOSITION=ray runs it on a local Ray cluster; else the processes are the head's children.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from command_line import eventually
from mixed_load import MixedLoad
from up import Up, end

from protos.ringfort import v1 as pb
from protos.ringfort.v1.cluster_pb2_grpc import ClusterServiceStub
from ringfort import Client

LAUNCHER = os.environ.get("COMPOSITION", "processes")
pytestmark = pytest.mark.skipif(
    not os.environ.keys() & {"COMPOSITION", "KILLS"},
    reason="make test-cluster runs it on Ray, make long without",
)
ENVIRONMENT = {
    "RINGFORT_CLUSTER__LAUNCHER": LAUNCHER,
    "RINGFORT_CLUSTER__EMBEDDERS": "2",
    "RINGFORT_SHARD__MEMTABLE_ROWS": "500",
}
CLUSTER = ("--cluster", "--nodes", "2", "--gateways", "2")
#: Two nodes, two processes of the model, and the gateway beside the head's.
PROCESSES = 5
SEARCHES = 20
BACK_WITHIN_S = 90.0


@pytest.fixture
def service(data_dir: Path) -> Iterator[Up]:
    up = Up.start(data_dir, *CLUSTER, env=ENVIRONMENT, ready_within_s=240)
    yield up
    if up.process.poll() is None:
        assert up.stop() == 0
    end(up.process)


def components(client: Client) -> dict[str, int]:
    """The processes of the cluster that are there, by name, with their ids."""
    told = client.cluster().components
    return {each.name: int(each.detail.split()[1]) for each in told if each.detail.startswith("pid ")}


def servers(up: Up) -> dict[str, int]:
    """Postgres and Valkey of the service, with their process ids."""
    found = {}
    for child in psutil.Process(up.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it was there a moment ago
            found[child.name()] = child.pid
    return {name: pid for name, pid in found.items() if name in ("postgres", "valkey-server")}


def succeeded(client: Client, job: pb.Job) -> bool:
    """Whether a job has; fails where it never will."""
    told = client.job(job.id)
    assert told.state in (pb.Job.PENDING, pb.Job.RUNNING, pb.Job.SUCCEEDED), told
    return told.state == pb.Job.SUCCEEDED


def shards(client: Client, collection: str) -> dict[int, int]:
    """The slots of each shard of a collection."""
    [told] = [each for each in client.cluster().collections if each.name == collection]
    return {replica.shard: replica.slots for replica in told.replicas if replica.slots}


def whole(client: Client) -> bool:
    """Whether every copy of every shard answers."""
    collections = client.cluster().collections
    return all(replica.state == "serving" for each in collections for replica in each.replicas)


@pytest.mark.timeout(600)
def test_whatever_dies_the_rest_goes_on_and_it_comes_back(service: Up, data_dir: Path) -> None:
    with Client(service.grpc) as client:
        eventually(lambda: len(components(client)) == PROCESSES, BACK_WITHIN_S)
        with MixedLoad(service.grpc) as load:

            def quiet() -> None:
                eventually(lambda: whole(client) and len(components(client)) == PROCESSES, BACK_WITHIN_S)
                written = load.writes
                eventually(lambda: load.writes > written + 1, BACK_WITHIN_S)
                load.phase("everything is there")
                eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)

            def killed(name: str, pid: int) -> None:
                load.phase(f"SIGKILL {name} (pid {pid})")
                os.kill(pid, signal.SIGKILL)

            quiet()
            killed("shard node-0", components(client)["shard node-0"])
            eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)
            eventually(lambda: whole(client), BACK_WITHIN_S)
            seen = load.phase("node-0 is back")
            assert set(seen["pair"].searches) == {"OK"}, load.timeline
            assert seen["pair"].least_coverage == 1.0, load.timeline
            assert set(seen["sole"].searches) == {"OK"}, load.timeline
            assert seen["sole"].least_coverage == 0.5, load.timeline
            assert set(seen["texts"].searches) == {"OK"}, load.timeline
            assert set(seen["count"].searches) == {"OK"}, load.timeline

            quiet()
            name = next(name for name in components(client) if name.startswith("embedder "))
            killed(name, components(client)[name])
            eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)
            seen = load.phase("after an embedder's death")
            for kind in ("sole", "pair", "texts"):
                assert set(seen[kind].searches) == {"OK"}, load.timeline
                assert seen[kind].least_coverage == 1.0, load.timeline

            quiet()
            killed("gateway gateway-1", components(client)["gateway gateway-1"])
            eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)
            eventually(lambda: len(components(client)) == PROCESSES, BACK_WITHIN_S)
            seen = load.phase("gateway-1 is back")
            for kind in ("sole", "pair", "texts", "count"):
                # Whoever was connected to it is told so, and is connected to the other one then.
                assert set(seen[kind].searches) <= {"OK", "UNAVAILABLE"}, load.timeline
                assert seen[kind].searches["UNAVAILABLE"] < SEARCHES, load.timeline
                assert seen[kind].least_coverage == 1.0, load.timeline

            for name in ("valkey-server", "postgres"):
                quiet()
                pid = servers(service)[name]
                killed(name, pid)
                eventually(lambda: servers(service).get(name, pid) != pid, BACK_WITHIN_S)  # noqa: B023
                eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)
                seen = load.phase(f"{name} is back")
                for kind in ("sole", "pair", "texts"):
                    assert set(seen[kind].searches) == {"OK"}, load.timeline
                    assert seen[kind].least_coverage == 1.0, load.timeline

            quiet()
            with grpc.insecure_channel(service.grpc) as channel:
                cluster = ClusterServiceStub(channel)
                load.phase("a shard is added")
                job = cluster.AddShard(pb.AddShardRequest(collection="pair"), timeout=30)
                eventually(lambda: succeeded(client, job), BACK_WITHIN_S)
                eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)
                assert len(shards(client, "pair")) == 3
                load.tell(f"    slots by shard: {shards(client, 'pair')}")
                added = load.phase("and is drained")
                job = cluster.DrainShard(pb.DrainShardRequest(collection="pair", shard=2), timeout=30)
                eventually(lambda: succeeded(client, job), BACK_WITHIN_S)
                eventually(lambda: load.enough(SEARCHES), BACK_WITHIN_S)
                assert len(shards(client, "pair")) == 2
            for seen in (added, load.phase("the end")):
                assert set(seen["pair"].searches) == {"OK"}, load.timeline
                assert seen["pair"].least_coverage == 1.0, load.timeline
        compare(client, load.acknowledged)
        began_s = time.monotonic()
        service.kill()
        load.tell("SIGKILL the head, and what runs beside it ends")
    end(service.process)
    again = Up.start(data_dir, *CLUSTER, env=ENVIRONMENT, ready_within_s=240)
    try:
        load.tell(f"another head is ready, {time.monotonic() - began_s:.1f} s later")
        with Client(again.grpc) as client:
            compare(client, load.acknowledged)
    finally:
        print("\n".join(["", *load.timeline]))
        assert again.stop() == 0


def compare(client: Client, acknowledged: dict[str, int]) -> None:
    """Whatever was acknowledged is there as it was, and nothing else."""
    for collection in ("sole", "pair"):
        stored = {row.id: row.attributes["number"] for row in client.scan(collection)}
        assert stored == acknowledged
        assert client.count(collection) == len(acknowledged)
