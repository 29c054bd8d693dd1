"""Two databases under a service that is killed, and killed themselves: nothing acknowledged is lost."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from command_line import all_gone, eventually
from killable import Killable
from ledger import COLLECTION, IDS, Ledger
from second_postgres import SecondPostgres

from shard_router.databases import DatabaseMap


@pytest.fixture
def second(made_data_dir: Path, tmp_path: Path) -> Iterator[SecondPostgres]:
    # cp keeps owners, who under root are not root.
    subprocess.run(["cp", "-a", made_data_dir, tmp_path / "second"], check=True)
    with SecondPostgres(tmp_path / "second") as server:
        yield server


@pytest.fixture
def service(data_dir: Path, second: SecondPostgres) -> Iterator[Killable]:
    settings = {
        "RINGFORT_METADATA__PARTITIONS": json.dumps({"east": second.url}),
        "RINGFORT_SHARD__MEMTABLE_ROWS": "64",
    }
    with Killable(data_dir, settings) as service:
        yield service


def _goes_on(ledger: Ledger) -> None:
    """Wait until two writes more were acknowledged."""
    written = ledger.writes
    eventually(lambda: ledger.failure or ledger.writes >= written + 2, 60)


@pytest.mark.timeout(300)
def test_whatever_is_killed_amid_writes_to_both_nothing_acknowledged_is_lost(
    service: Killable, second: SecondPostgres
) -> None:
    rng = Random(1)
    with service.client() as client:
        ledger = Ledger(client, rng)
        collection = client.collection(COLLECTION)
        assert collection.databases == ("home", "east")
        ledger.start()
        try:
            for victim in ("service", "east", "service", "postgres", "east", "service"):
                time.sleep(rng.uniform(0.1, 0.6))
                match victim:
                    case "service":
                        orphans = service.kill_service()
                        service.start()
                        assert all_gone(orphans)
                    case "postgres":
                        service.kill_server("postgres")
                    case "east":
                        second.kill()
                        # Searches go on over all that is there.
                        found = client.search(COLLECTION, vector=np.ones(8, np.float32), k=5, cache=False)
                        assert found.coverage.complete
                        time.sleep(rng.uniform(0, 0.4))
                        second.start()
                _goes_on(ledger)
                ledger.compare()
        finally:
            ledger.close()
        ledger.compare()
        cut = DatabaseMap(collection.slots, collection.databases).cut(sorted(ledger.documents))
        assert all(cut.get(name) for name in collection.databases), "both have some"
        assert len(IDS) > len(ledger.documents) > 0
        service.stop()
