"""What a search costs more on another process than in this one: processor time of both sides, and latency.

python -m loadtests.hop [--seconds S] [--rounds N]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvloop

from protos.ringfort.internal.v1 import shard_node_pb2
from protos.ringfort.internal.v1.shard_node_pb2_grpc import ShardNodeStub
from services.deadline import Deadline
from services.gateway.endpoints import ShardEndpoint
from services.gateway.remote_shard import RemoteShard
from services.peers import Peer, Port
from services.shard.local_shards import LocalShards
from services.shard.node import ShardNode
from shard_router.model import Collection, LogDelta, LogRow, Metric, Version

DIM, DOCUMENTS, K = 384, 2_000, 10
CALLERS = (1, 16, 64)
LOG, SLOTS, TOKEN = "log", 16, "token"
THINGS = Collection(
    uid=1, tenant="default", name="things", dim=DIM, metric=Metric.COSINE, schema={}, schema_version=1,
    model=None, slots=SLOTS, shards=1, replicas=1, index="auto", max_staleness_ms=0, generation=1,
    space=f"vectors:{DIM}", created_at_us=0,
)  # fmt: skip
WHOLE = {"slots": range(SLOTS), "epoch": 1, "log_id": LOG}


def vectors(seed: int, count: int) -> np.ndarray:
    """Random vectors, float32 [count, DIM]."""
    return np.random.default_rng(seed).standard_normal((count, DIM), np.float32)


def local_shards(directory: str, threads: ThreadPoolExecutor) -> LocalShards:
    """Replicas of a log that holds the same documents in every process."""
    rows = [LogRow(f"d{i}", i % SLOTS, Version(1, i + 1), False, None, {}) for i in range(DOCUMENTS)]
    all_of_it = LogDelta(LOG, 0, DOCUMENTS, rows, vectors(1, DOCUMENTS))
    nothing = LogDelta(LOG, DOCUMENTS, DOCUMENTS, [], np.zeros((0, DIM), np.float32))

    async def tail(after: int, slots: Sequence[int] | None = None, rows: int | None = None) -> LogDelta:
        return nothing if after else all_of_it

    return LocalShards(
        Path(directory), lambda *_: tail, search_threads=threads, memtable_rows=8_192, graph_rows=50_000,
        poll_ms=500, device="cpu",
    )  # fmt: skip


async def serve() -> None:
    """The other process: says where it answers, then its processor time for every line it is sent."""
    with ThreadPoolExecutor(1) as threads, tempfile.TemporaryDirectory() as directory:
        node = ShardNode(local_shards(directory, threads))
        port = Port({shard_node_pb2.DESCRIPTOR.services_by_name["ShardNode"]: node}, TOKEN)
        print(await port.start(), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(time.process_time(), flush=True)
        node.leave()
        await port.stop(1)
        await node.close()


async def load(shard: ShardEndpoint, callers: int, seconds: float) -> tuple[int, float, float]:
    """A closed loop of callers: searches answered, this process's seconds of processor, median in ms."""
    queries, took_ms = vectors(2, 256)[:, None, :], list[float]()
    until_s, used_s = time.perf_counter() + seconds, time.process_time()

    async def caller(number: int) -> None:
        while (began_s := time.perf_counter()) < until_s:
            query = queries[(31 * number + len(took_ms)) % len(queries)]
            answer = await shard.search_rendered(query, K, filter=None, deadline=Deadline.after(10))
            answer.hits[0].body()
            took_ms.append((time.perf_counter() - began_s) * 1e3)

    await asyncio.gather(*map(caller, range(callers)))
    return len(took_ms), time.process_time() - used_s, statistics.median(took_ms)


async def measure(seconds: float, rounds: int) -> None:
    """Print a line for each number of callers: the middle of the rounds, the sides in turns."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "loadtests.hop", "--serve")
    other = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert other.stdin is not None
    assert other.stdout is not None
    out, into = other.stdout, other.stdin
    peer = Peer("node", ShardNodeStub, TOKEN)
    peer.move((await out.readline()).decode().strip())

    async def used_there_s() -> float:
        into.write(b"\n")
        return float(await out.readline())

    with ThreadPoolExecutor(1) as threads, tempfile.TemporaryDirectory() as directory:
        here = await local_shards(directory, threads).open(THINGS, 0, 0, **WHOLE)  # type: ignore[arg-type]
        there = await RemoteShard.open(peer, THINGS, 0, 0, **WHOLE)  # type: ignore[arg-type]
        for callers in CALLERS:
            found: list[tuple[float, float, float, float]] = []
            for _ in range(rounds + 1):
                count, used_s, alone_ms = await load(here, callers, seconds)
                before_s = await used_there_s()
                remote, gateway_s, hop_ms = await load(there, callers, seconds)
                node_s = await used_there_s() - before_s
                cpu_ms, hop_cpu_ms = 1e3 * used_s / count, 1e3 * (gateway_s + node_s) / remote
                found.append((cpu_ms, hop_cpu_ms - cpu_ms, alone_ms, hop_ms))
            cpu, hop, alone, over = (statistics.median(column) for column in zip(*found[1:], strict=True))
            print(
                f"{callers:3d} callers: {cpu:.3f} ms of processor in process, {hop:+.3f} ms over the hop; "
                f"p50 {alone:.2f} ms in process, {over:.2f} ms over the hop"
            )
        await there.close()
        await here.close()
    await peer.close()
    into.close()
    await other.wait()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    uvloop.run(serve() if arguments.serve else measure(arguments.seconds, arguments.rounds))


if __name__ == "__main__":
    main()
