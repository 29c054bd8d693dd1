"""A replica on a small filesystem that fills up and is freed again; run by test_shard_full_disk.py.

Prints, a line each: condition and documents found while the disk is full, and once there is room again.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from memory_log import MemoryLog, collection

from services.deadline import Deadline
from services.shard.replica import Replica

#: What is left: less than a seal writes, so that the files of one come to different ends.
LEFT_BYTES = 300_000


async def told(replica: Replica) -> None:
    query = np.ones((1, 64), np.float32)
    answer = await replica.search(query, 1000, filter=None, deadline=Deadline.after(10))
    print(replica.condition()[0], len(answer.hits[0]), answer.complete, replica.describe()["pending_rows"])


async def run(disk: Path, threads: ThreadPoolExecutor) -> None:
    log, rng = MemoryLog(64), np.random.default_rng(0)
    replica = await Replica.open(
        collection(dim=64), directory=disk / "shard-0", log_id=log.log_id, tail=log.tail,
        search_threads=threads, memtable_rows=500, poll_ms=10,
    )  # fmt: skip
    try:
        room = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - LEFT_BYTES))
        async with asyncio.timeout(20):
            while replica.condition()[0] != "disk_full":
                assert replica.offer(log.write({f"d{log.counter}": rng.standard_normal(64)}))
                await asyncio.sleep(0.001)
            await told(replica)
            (disk / "filler").unlink()
            while replica.condition()[0] != "serving" or replica.describe()["pending_rows"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await told(replica)
        replica.validate_state()
    finally:
        await replica.close()


if __name__ == "__main__":
    with ThreadPoolExecutor(1) as threads:
        asyncio.run(run(Path(sys.argv[1]), threads))
