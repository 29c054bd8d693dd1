"""Any process killed at any moment, many times over: nothing acknowledged is lost, nothing deleted returns.

Memtables are so small that seals and merges go on all the time, and half of the kills wait for one that is
half written; now and then writing pauses, so that graphs are built, and the kill comes amid one.
KILLS says how many (20; `make long` 200), SEED repeats a sequence.
"""

import contextlib
import os
import secrets
import time
from pathlib import Path
from random import Random

import pytest
from command_line import all_gone, eventually
from killable import Killable
from ledger import SCHEMA, Ledger
from shard_files import ShardFiles

from index_builder.segments.index_spec import IndexKind

KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("SEED", "0")) or secrets.randbits(32)

#: What is killed, and how often of a hundred times.
VICTIMS = {"postgres": 25, "valkey": 25, "service": 20, "everything": 20, "start": 10}
SETTINGS = {"RINGFORT_SHARD__MEMTABLE_ROWS": "32", "RINGFORT_SHARD__GRAPH_ROWS": "64"}
#: Every so many kills one comes in calm.
CALM_EVERY = 10


def kill(service: Killable, files: ShardFiles, victim: str, rng: Random) -> None:
    """Kills, and brings back what does not come back by itself."""
    match victim:
        case "postgres" | "valkey":
            service.kill_server(victim)
        case "service":
            orphans = service.kill_service()
            files.require_whole()
            service.start()
            assert all_gone(orphans)
        case "everything":
            service.kill_service()
            service.kill_server("postgres")
            service.kill_server("valkey")
            files.require_whole()
            service.start()
        case "start":
            orphans = service.kill_service()
            service.start_and_kill(after_s=rng.uniform(0.2, 1.5))
            files.require_whole()
            service.start()
            assert all_gone(orphans)


@pytest.mark.timeout(120 + 10 * KILLS)
def test_whatever_is_killed_nothing_acknowledged_is_lost(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n[{KILLS} kills, SEED={SEED}]")
    rng = Random(SEED)
    files = ShardFiles(data_dir, SCHEMA)
    victims = rng.choices(list(VICTIMS), list(VICTIMS.values()), k=KILLS)
    with Killable(data_dir, SETTINGS) as service, service.client() as client:
        ledger = Ledger(client, Random(SEED))
        ledger.start()
        try:
            for n, victim in enumerate(victims):
                written = ledger.writes
                time.sleep(rng.uniform(0, 0.4))
                calm = n % CALM_EVERY == CALM_EVERY - 1
                with ledger.still() if calm else contextlib.nullcontext():
                    if calm:  # the seals under way are over by then; graphs follow at 3 s without a write
                        time.sleep(2.0)
                    half_written = (calm or rng.random() < 0.5) and files.being_written(4.0)
                    amid = ", amid a file" if half_written else ""
                    print(f"kill {n}: {victim} after {written} writes{amid}")
                    kill(service, files, victim, rng)
                # One may have been under way; the second was begun after the kill.
                written = ledger.writes
                eventually(lambda: ledger.failure or ledger.writes >= written + 2, 60)  # noqa: B023
                ledger.compare()
        finally:
            ledger.close()
        ledger.compare()
        eventually(lambda: IndexKind.HNSW in files.kinds(), 60)
        ledger.compare()
        service.stop()
        assert files.written() > 2 * KILLS
        assert files.merged() > KILLS
        assert files.require_whole() > 0
        # Torn and flipped bytes are noticed, and what they held comes from the log.
        damaged = files.damage(rng)
        service.start()
        ledger.compare()
        eventually(lambda: len(files.quarantined()) >= 2, 30)
        ledger.compare()
        assert damaged
        service.stop()
        files.require_whole()
