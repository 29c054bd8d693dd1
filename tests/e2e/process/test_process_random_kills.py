"""Any process killed at any moment, many times over: nothing acknowledged is lost, nothing deleted returns.

Memtables are so small that seals and merges go on all the time, and merges of a few rows have a process of
their own. Kills of the service, and of such a process alone, come in turn amid a seal, amid a merge, and at
any moment; now and then writing pauses, so that graphs are built, and the kill comes amid one.
KILLS says how many (12; `make long` 200), SEED repeats a sequence.
"""

import contextlib
import itertools
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
from command_line import all_gone, eventually
from killable import Killable
from ledger import SCHEMA, Ledger
from shard_files import ShardFiles

from index_builder.segments.index_spec import IndexKind

KILLS = int(os.environ.get("KILLS", "12"))
SEED = int(os.environ.get("SEED", "0")) or secrets.randbits(32)

#: What is killed, and how often of a hundred times.
VICTIMS = {"postgres": 20, "valkey": 20, "service": 20, "everything": 15, "start": 10, "merge": 15}
SETTINGS = {
    "RINGFORT_SHARD__MEMTABLE_ROWS": "32",
    "RINGFORT_SHARD__GRAPH_ROWS": "64",
    "RINGFORT_SHARD__CHILD_ROWS": "64",
}
#: Every so many kills one comes in calm.
CALM_EVERY = 10
#: Seals and merges go on all the time: one is come upon within this, or the kill comes at any moment.
MET_WITHIN_S = 15.0


class Moments:
    """Waits for the service to be amid something, and counts what it was amid when it was killed."""

    def __init__(self, service: Killable, files: ShardFiles) -> None:
        self._service, self._files = service, files
        self.met: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()

    def meet(self, what: str) -> psutil.Process | None:
        """Until a segment is half written by a `seal` of the service, or by a `merge` in a process of its
        own, which is returned; a `graph` is a merge in calm. Not for ever, on a machine that is busy."""
        until_s = time.monotonic() + MET_WITHIN_S
        while time.monotonic() < until_s:
            time.sleep(0.001)
            parts = self._files.half_written()
            if not parts:
                continue
            merges = self._service.merges()
            for merge, paths in merges.items():
                if what != "seal" and any(path.parent in parts for path in paths):
                    self.met[what] += 1
                    return merge
            if what == "seal" and not merges:
                self.met[what] += 1
                return None
        self.missed[what] += 1
        return None


def kill(
    service: Killable, files: ShardFiles, victim: str, merge: psutil.Process | None, rng: Random
) -> None:
    """Kills, and brings back what does not come back by itself."""
    match victim:
        case "postgres" | "valkey":
            service.kill_server(victim)
        case "merge":
            with contextlib.suppress(psutil.NoSuchProcess):  # it was quicker
                if merge is not None:
                    merge.kill()
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


def moments_of(victims: list[str]) -> Iterator[str]:
    """What each kill comes amid; nothing in particular where it is empty."""
    turns = {victim: itertools.cycle(["merge", "seal", ""]) for victim in VICTIMS}
    for n, victim in enumerate(victims):
        if n % CALM_EVERY == CALM_EVERY - 1:
            yield "graph"
        elif victim == "merge":
            yield "merge"
        else:
            yield next(turns[victim])


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
        moments, ledger = Moments(service, files), Ledger(client, Random(SEED))
        ledger.start()
        try:
            for n, (victim, moment) in enumerate(zip(victims, moments_of(victims), strict=True)):
                written = ledger.writes
                time.sleep(rng.uniform(0, 0.4))
                # Graphs follow at 3 s without a write.
                with ledger.still() if moment == "graph" else contextlib.nullcontext():
                    merge = moments.meet(moment) if moment else None
                    print(f"kill {n}: {victim} after {written} writes, amid {moment or 'anything'}")
                    kill(service, files, victim, merge, rng)
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
        with capsys.disabled():
            print(f"[kills amid {dict(moments.met)}, too late for {dict(moments.missed)}]")
        assert moments.met.keys() == {"seal", "merge", "graph"}
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
        # Stopped while what they held may lie in no segment yet: the next start reads it again.
        service.stop()
        service.start()
        ledger.compare()
        service.stop()
