"""Which operators of a model take its time: batches that others ask for, run by a session that is timed."""

import asyncio
import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path

from index_builder.models.engine import Engine, Timed
from services.deadline import Deadline

#: Batches timed, about. The runtime writes its trace without letting go of the interpreter: for a graph of
#: 160 operators 1 ms a batch.
MOST_RUNS = 32
#: How often it is looked whether there are enough.
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Profile:
    """How many batches were timed, and the runtime's trace of them: JSON, compressed by gzip."""

    runs: int
    trace: bytes


async def profile(engine: Engine, seconds: float) -> Profile:
    """Times the operators of what others run, for so long or about MOST_RUNS batches; EngineUnavailable.

    A second session does it, loaded before and gone afterwards. Whatever happens, the engine runs on its own
    again.
    """
    until = Deadline.after(seconds)
    with tempfile.TemporaryDirectory(prefix="ringfort-profile-", ignore_cleanup_errors=True) as directory:
        timed = await asyncio.to_thread(engine.timed, Path(directory, "trace"))
        engine.run_on(timed)
        try:
            while timed.runs < MOST_RUNS and until.left_s() > 0:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
        finally:
            engine.run_on(None)
        return await asyncio.to_thread(_ended, timed)


def _ended(timed: Timed) -> Profile:
    return Profile(timed.runs, gzip.compress(timed.trace().read_bytes()))
