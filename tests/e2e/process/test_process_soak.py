"""Under mixed load and writes nothing grows: memory, handles, threads, connections, queues.

SOAK_MIN minutes (`make long` takes 20), of which the figures are kept in build/soak.json; by default a few
seconds, which show that it is watched.
"""

import asyncio
import dataclasses
import os
from pathlib import Path

import msgspec
import pytest

from loadtests import corpus, machine
from loadtests.drive import driver, result
from loadtests.drive.scenario import read
from loadtests.drive.vitals import Vitals
from loadtests.service import Service, new_data_dir

SECONDS = 60 * float(os.environ.get("SOAK_MIN", "0.1"))
#: So small that caches are full and segments sealed and merged again and again from the first minute on.
SETTINGS = {
    "RINGFORT_CACHE__L1_BYTES": str(2 * 1024 * 1024),
    "RINGFORT_SHARD__MEMTABLE_ROWS": "100",
}
KEPT = Path(__file__).parents[3] / "build" / "soak.json"


@pytest.mark.timeout(SECONDS + 180)
def test_nothing_grows_under_mixed_load(model_dir: Path, tmp_path: Path) -> None:
    scenario = msgspec.structs.replace(
        read("soak"), seconds=SECONDS, rate=60.0 if SECONDS > 60 else 20.0, population=500
    )
    data_dir = new_data_dir(tmp_path / "data", model_dir, release="test")
    with Service(data_dir, env=SETTINGS) as service:
        stage = driver.prepare(
            service.grpc, scenario, corpus_file=corpus.TOP, documents=1_000, directory=tmp_path
        )
        with Vitals(service, every_s=max(0.25, SECONDS / 1_000)) as vitals:
            measured = asyncio.run(driver.run(stage, scenario))
        growths = vitals.growths()
    total = measured.tallies.all()
    if "SOAK_MIN" in os.environ:
        kept = {
            "machine": machine.described(),
            "run": measured.told(),
            "growth": [dataclasses.asdict(each) for each in growths],
            "samples": vitals.told(),
        }
        result.write(KEPT, kept)
    print(f"soak: {SECONDS:g} s, {total.calls} calls, failed {total.failed_share:.2%}", *growths, sep="\n")
    assert total.failed_share <= 0.01
    assert not [str(each) for each in growths if each.beyond_noise]
