"""Who takes part in a cluster: its head knows, and every process that joins says where it answers.

A process takes part for as long as its call to the head lasts, so one that is killed is gone at once, and one
that hangs when its connection's probes fail.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1.head_pb2_grpc import HeadStub
from services import tasks
from services.deadline import Deadline
from services.peers import Peer
from shard_router.errors import InvalidField, RingfortError, Unavailable

if TYPE_CHECKING:
    from protos.ringfort.internal.v1.head_pb2_grpc import HeadAsyncStub

log = logging.getLogger(__name__)

#: How often the head looks whether its claim is another.
CLAIM_LOOK_S = 0.25
#: Pauses between a process's attempts to join.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0

#: Hears of a member that joined (True) or left (False).
Listener = Callable[[internal.Member, bool], None]


class Head:
    """The service Head of protos/ringfort/internal: members come and go, listeners hear of it."""

    def __init__(
        self,
        claim: Callable[[], internal.Claim],
        partitions: Callable[[], Mapping[str, internal.Claim]] = dict,
    ) -> None:
        """They tell the present claim to the home database, and by name those to its partitions."""
        self._claim, self._partitions = claim, partitions
        self._members: dict[tuple[str, str], internal.Member] = {}
        self._listeners: list[Listener] = []
        #: Set, and replaced, whenever somebody joins or leaves.
        self._changed = asyncio.Event()

    def listen(self, listener: Listener) -> None:
        """Hear of those that are here, and of every change."""
        self._listeners.append(listener)
        for member in self._members.values():
            listener(member, True)

    def members(self, kind: str) -> list[internal.Member]:
        """Those of a kind, by name."""
        return [member for (its, _), member in sorted(self._members.items()) if its == kind]

    async def wait_for(self, ready: Callable[[], bool], deadline: Deadline, what: str) -> None:
        """Return once `ready` says so, asked again whenever somebody joins; Unavailable when it is late."""
        while not ready():
            try:
                async with asyncio.timeout(deadline.left_s()):
                    await self._changed.wait()
            except TimeoutError:
                raise Unavailable(f"{what} did not join in time") from None

    async def Join(
        self, reports: AsyncIterator[internal.Report], deadline: Deadline
    ) -> AsyncIterator[internal.Word]:
        """Count the caller in until its call ends, and tell it what changes."""
        member = (await anext(reports)).member
        if not (member.kind and member.name and member.address):
            raise InvalidField("member", "has no kind, name or address")
        key = member.kind, member.name
        ending = asyncio.ensure_future(_until_the_end(reports))
        # A restarted process may come before its former self is known to have gone.
        if (former := self._members.pop(key, None)) is not None:
            self._tell(former, False)
        self._members[key] = member
        log.info("%s %s joined at %s", member.kind, member.name, member.address)
        self._tell(member, True)
        told: internal.Word | None = None
        try:
            while not ending.done():
                changed = self._changed
                word = internal.Word(
                    claim=self._claim(), members=self._members.values(), partitions=self._partitions()
                )
                if word != told:
                    told = word
                    yield word
                waiting = asyncio.ensure_future(changed.wait())
                await asyncio.wait(
                    (ending, waiting), timeout=CLAIM_LOOK_S, return_when=asyncio.FIRST_COMPLETED
                )
                await tasks.end(waiting)
        finally:
            await tasks.end(ending)
            if self._members.get(key) is member:
                del self._members[key]
                log.info("%s %s left", member.kind, member.name)
                self._tell(member, False)

    def _tell(self, member: internal.Member, here: bool) -> None:
        for listener in self._listeners:
            listener(member, here)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _until_the_end(reports: AsyncIterator[internal.Report]) -> None:
    async for _ in reports:
        pass


class Membership:
    """A process's part in the cluster: joins, hears the head, and joins again when the head was away."""

    def __init__(
        self, head: str, token: str, member: internal.Member, hear: Callable[[internal.Word], None]
    ) -> None:
        """head: HOST:PORT; `hear` gets every word of it."""
        self._member, self._hear = member, hear
        self._peer: Peer[HeadAsyncStub] = Peer("the head", HeadStub, token)
        self._peer.move(head)
        self._joined = asyncio.Event()
        self._keeping = asyncio.create_task(self._keep(), name=f"membership {member.name}")

    async def joined(self, deadline: Deadline) -> None:
        """Return when the head has said its first word; Unavailable when it is late."""
        try:
            async with asyncio.timeout(deadline.left_s()):
                await self._joined.wait()
        except TimeoutError:
            raise Unavailable(f"the head at {self._peer.address} cannot be joined") from None

    async def close(self) -> None:
        """Take no more part."""
        await tasks.end(self._keeping)
        await self._peer.close()

    async def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                with self._peer.calling() as stub:
                    words = stub.Join(self._reports(), metadata=self._peer.metadata)
                    try:
                        async for word in words:
                            pause_s = _FIRST_PAUSE_S
                            self._hear(word)
                            self._joined.set()
                    finally:
                        words.cancel()
            except RingfortError as error:
                if pause_s == _FIRST_PAUSE_S:
                    log.warning("the head cannot be heard: %s", error)
            except Exception:
                log.exception("the head cannot be heard")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _reports(self) -> AsyncIterator[internal.Report]:
        yield internal.Report(member=self._member)
        await asyncio.Event().wait()
