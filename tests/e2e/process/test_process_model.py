"""Random writes and reads, with a restart among them, through a real service: as a dictionary would answer.

SEQUENCES says how many (3; `make long` 64), SEED which is the first of them.
"""

import os
import secrets
from pathlib import Path
from random import Random

import pytest
from dictionary import SCHEMA, Player
from killable import Killable
from shard_files import ShardFiles

from shard_router.model import AttributeType

SEQUENCES = int(os.environ.get("SEQUENCES", "3"))
SEED = int(os.environ.get("SEED", "0")) or secrets.randbits(32)
#: Sequences that share a service, and so its restart.
TOGETHER = 8
#: Calls of each sequence before the restart, and after it.
BEFORE, AFTER = 130, 60
#: So small that a sequence seals and merges many segments.
SETTINGS = {"RINGFORT_SHARD__MEMTABLE_ROWS": "16"}


@pytest.mark.timeout(120 + 15 * SEQUENCES)
def test_the_service_answers_as_a_dictionary_would(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\n[{SEQUENCES} sequences, SEED={SEED}]")
    files = ShardFiles(data_dir, {name: AttributeType(kind) for name, kind in SCHEMA.items()})
    with Killable(data_dir, SETTINGS) as service, service.client() as client:
        for first in range(0, SEQUENCES, TOGETHER):
            seeds = range(SEED + first, SEED + min(first + TOGETHER, SEQUENCES))
            players = {seed: Player(client, f"c-{seed}", Random(seed)) for seed in seeds}
            for seed, player in players.items():
                print(f"seed {seed}")
                player.play(BEFORE)
            # Ended in order or killed, by turns.
            if first % (2 * TOGETHER):
                service.stop()
            else:
                service.kill_service()
            assert files.merged() > 5 * len(seeds)
            service.start()
            for seed, player in players.items():
                print(f"seed {seed}, after a restart")
                player.look_at_everything()
                player.play(AFTER)
                client.delete_collection(f"c-{seed}")
        service.stop()
