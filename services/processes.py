"""The cluster's processes as children of the head, on one machine and without Ray.

A child hears what it is on stdin, and stops when that is closed: with the head, however the head ends.
"""

import asyncio
import logging
import sys
from collections.abc import Sequence

import msgspec

from services import tasks
from services.members import EmbedderNodeSettings, MemberSettings, ShardNodeSettings
from services.sibling import SiblingSettings

log = logging.getLogger(__name__)

#: How long a child has to stop in order, a little more than its calls under way have; then it is killed.
_GRACE_S = 8.0
#: Pauses before a child that died is started again.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
#: A child that lived this long did not die of its start.
_STEADY_S = 30.0


class ProcessLauncher:
    """Starts members as child processes; one that dies is started again."""

    def __init__(self, *, embedders: int) -> None:
        """embedders: processes of each model."""
        self._embedders = embedders
        self._nodes: list[asyncio.Task[None]] = []
        self._gateways: list[asyncio.Task[None]] = []
        #: By NAME@VERSION.
        self._models: dict[str, list[asyncio.Task[None]]] = {}

    async def start_nodes(self, nodes: Sequence[ShardNodeSettings]) -> None:
        """See Launcher."""
        self._nodes += [_kept(node) for node in nodes]

    async def start_gateways(self, gateways: Sequence[SiblingSettings]) -> None:
        """See Launcher."""
        self._gateways += [_kept(gateway) for gateway in gateways]

    async def stop_gateways(self) -> None:
        """See Launcher."""
        await tasks.end(*self._gateways)
        self._gateways.clear()

    async def start_model(self, model: str, settings: EmbedderNodeSettings) -> None:
        """See Launcher."""
        names = [f"{settings.name}-{i}" for i in range(self._embedders)]
        self._models[model] = [_kept(msgspec.structs.replace(settings, name=name)) for name in names]

    async def stop_model(self, model: str) -> None:
        """See Launcher."""
        await tasks.end(*self._models.pop(model, ()))

    async def close(self) -> None:
        """See Launcher."""
        await self.stop_gateways()
        for model in list(self._models):
            await self.stop_model(model)
        await tasks.end(*self._nodes)


def _kept(settings: MemberSettings) -> asyncio.Task[None]:
    return asyncio.create_task(_keep(settings), name=f"keep {settings.name}")


async def _keep(settings: MemberSettings) -> None:
    """Run a child, and another whenever it dies, until cancelled; then it has ended."""
    clock, pause_s = asyncio.get_running_loop().time, _FIRST_PAUSE_S
    while True:
        since_s = clock()
        status = await _run(settings)
        if clock() - since_s >= _STEADY_S:
            pause_s = _FIRST_PAUSE_S
        log.error("%s ended with status %d; starting it again", settings.name, status)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _run(settings: MemberSettings) -> int:
    """Run a child to its end; its exit status."""
    # -P: a `services` in the working directory is not ours.
    command = (sys.executable, "-P", "-m", "services", "member")
    pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    spawning = asyncio.ensure_future(
        asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=nowhere, start_new_session=True)
    )
    try:
        process = await asyncio.shield(spawning)
    except asyncio.CancelledError:
        # Cancelled itself it might leave a process that nobody knows of.
        await _end(await spawning)
        raise
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(settings) + b"\n")
    waiting = asyncio.ensure_future(process.wait())
    try:
        return await asyncio.shield(waiting)
    finally:
        ending = asyncio.ensure_future(_end(process))
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                continue
        await waiting


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_GRACE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
