"""With no staleness allowed, no read is answered with less than was acknowledged before it began."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping

import pytest
from gateways import Gateway, Play, Stale
from valkeys import Valkey

from services.cache.watermark import Watermark

SEEDS = int(os.environ.get("SEEDS", "6"))
#: Seeds tried until a mistake shows: most do within a dozen, but chance has its part in it.
PATIENCE = 400
WRITES = 60


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    from services.servers.child import free_port

    valkey = Valkey(tmp_path_factory.mktemp("valkey"), free_port(random.Random()))
    valkey.start()
    yield valkey
    valkey.kill()


def disturber(valkey: Valkey, seed: int) -> Callable[[], Awaitable[None]]:
    """Empties Redis, deletes a key, or kills it and starts it anew."""
    rng = random.Random(seed)

    def restart() -> None:
        valkey.kill()
        valkey.start()

    async def disturb() -> None:
        match rng.randrange(4):
            case 0:
                restarting = asyncio.ensure_future(asyncio.to_thread(restart))
                try:
                    await asyncio.shield(restarting)
                finally:  # a play that ends meanwhile leaves a server that runs to the next
                    await asyncio.wait([restarting])
            case 1:
                with valkey.client() as client:
                    client.flushall()
            case _:
                with valkey.client() as client:
                    client.delete(b"rf1:a:1:%d" % rng.randrange(3))

    return disturb


async def play(seed: int, valkey: Valkey, gateway: type[Gateway]) -> Play:
    with valkey.client() as client:
        client.flushall()
    run = Play(seed, valkey.url, gateway)
    await run.open()
    try:
        await run.run(writes=WRITES, disturb=disturber(valkey, seed))
    finally:
        await run.close()
    return run


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_no_read_is_older_than_what_was_acknowledged(seed: int, valkey: Valkey) -> None:
    run = await play(seed, valkey, Gateway)
    assert run.reads > 50
    assert run.acknowledged > 10
    served = sum(tier["hits"] for gateway in run.gateways for tier in gateway.cache.tiers())
    assert served > 10


class ForgetsItsLease(Watermark):
    """Relies on what it knows although its lease is over."""

    def known(self, now_s: float) -> Mapping[str, int] | None:
        return self.positions


class HearsOnlyItself(Watermark):
    """Takes a renewal for news of the lease alone, and none of the position."""

    def renewed(self, sent_s: float, positions: Mapping[str, int]) -> None:
        followed = positions.keys() == self.positions.keys()
        super().renewed(sent_s, dict.fromkeys(positions, 0) if followed else positions)


class KnowsNoLogs(Watermark):
    """Takes the positions of every log for those of one."""

    def heard(self, log_id: str, position: int) -> bool:
        return super().heard("log", position)

    def renewed(self, sent_s: float, positions: Mapping[str, int]) -> None:
        super().renewed(sent_s, {"log": max(positions.values())})


MISTAKES = {
    "a lease that is over is relied on": {"watermark_of": ForgetsItsLease},
    "a renewal brings no position": {"watermark_of": HearsOnlyItself},
    "a lease is counted from the reply": {"counts_lease_from_receipt": True},
    "the position is read after the search": {"reads_position_after_search": True},
    "another log is taken for the same": {"watermark_of": KnowsNoLogs, "knows_no_logs": True},
}
if "SEEDS" in os.environ:  # it may take a hundred; tests/unit/cache/test_cache_watermark.py shows it at once
    MISTAKES["what is not followed is confirmed"] = {"confirms_everything": True}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_shows(mistake: str, valkey: Valkey) -> None:
    wrong = type("Wrong", (Gateway,), MISTAKES[mistake])
    for seed in range(PATIENCE):
        try:
            await play(seed, valkey, wrong)
        except Stale:
            return
    pytest.fail(f"{PATIENCE} runs did not find that {mistake}")
