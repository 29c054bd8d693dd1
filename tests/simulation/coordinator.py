"""The coordinator of a simulated cluster: grants leases and carries out what the resharding machine says."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from database import Fenced
from network import CALL_S, FOLLOW_S, Process
from replica import LEASE_S

from shard_router.errors import PreconditionFailed, Unavailable
from shard_router.leases import GrantedLeases
from shard_router.model import HOME
from shard_router.resharding import (
    Applied,
    AwaitApplied,
    Backfill,
    Backfilled,
    CancelAsked,
    Copy,
    Event,
    Finish,
    Heard,
    Instruction,
    Joined,
    Left,
    Overtaken,
    PositionRead,
    ReadPosition,
    Resharding,
    Store,
    Stored,
    Tell,
)
from shard_router.shard_map import MapState, Steady

if TYPE_CHECKING:
    from cluster import Cluster


class Coordinator(Process):
    """Grants leases and reshards; whoever takes the claim over goes on from the stored map."""

    def __init__(self, cluster: "Cluster") -> None:
        super().__init__(cluster.rng)
        self._cluster = cluster
        self.start()

    def start(self) -> None:
        database = self._cluster.database
        database.claim += 1
        self.claim = database.claim
        self.leases = GrantedLeases(LEASE_S)
        # Leases that a predecessor granted may last as long as if they had been granted now.
        for copy in self._cluster.copies():
            self.leases.grant(copy, self.now())
        self.machine: Resharding | None = None
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.told: MapState = database.state
        self.up: set[Copy] = set()
        self.spawn(self._run())

    async def renew(self, copy: Copy) -> tuple[int, MapState]:
        await self.awake(0)
        if copy not in self.leases.holders(self.now()):
            self.up.discard(copy)
            self.events.put_nowait(Left(copy))
        self.leases.grant(copy, self.now())
        position = await self._cluster.ask_database(self, lambda: self._cluster.database.position(self.claim))
        if copy not in self.up:
            self.up.add(copy)
            self.events.put_nowait(Joined(copy))
        return position, self.told

    async def leased(self, copy: Copy) -> bool:
        """Whether a copy may still believe that it has a lease."""
        await self.awake(0)
        may = copy in self.leases.holders(self.now())
        await self._cluster.ask_database(self, lambda: self._cluster.database.position(self.claim))
        return may

    async def _run(self) -> None:
        while True:
            state: MapState = await self._insist(lambda: self._cluster.database.read_state())
            self.told = state
            wish = None
            if isinstance(state, Steady):
                wish = self._cluster.wish(state)
                if wish is None:
                    await asyncio.sleep(0.05)
                    continue
                self.machine, instructions = Resharding.begin(wish, self.up)
            else:
                self.machine, instructions = Resharding.resume(state, self.up)
            finished = self._begin(instructions)
            while finished is None:
                event = await self.events.get()
                with suppress(PreconditionFailed):  # it is too late to cancel
                    finished = self._begin(self.machine.handle(event))
            self._cluster.changes += finished.moved

    def cancel(self) -> None:
        if self.machine is not None:
            self.events.put_nowait(CancelAsked())

    def _begin(self, instructions: Sequence[Instruction]) -> Finish | None:
        for instruction in instructions:
            if isinstance(instruction, Finish):
                return instruction
            self.spawn(self._carry_out(instruction))
        return None

    async def _insist(self, work: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await self._cluster.ask_database(self, work)
            except Unavailable:
                await asyncio.sleep(FOLLOW_S)

    async def _carry_out(self, instruction: Instruction) -> None:
        machine = self.machine
        try:
            event = await self._do(instruction)
        except Fenced:
            return  # somebody else goes on
        # What came of an earlier change is nothing to the next.
        if event is not None and machine is self.machine:
            self.events.put_nowait(event)

    async def _do(self, instruction: Instruction) -> Event | None:
        database = self._cluster.database
        match instruction:
            case Store(state):
                stored = await self._insist(lambda: database.put(self.claim, state))
                await self._disturbed()
                return Stored() if stored == state else Overtaken(stored)
            case Tell(state):
                self.told = state
                # Whoever has a lease at this moment may know no better; who gets one later is told.
                waiting = {copy for copy in self._cluster.copies() if copy in self.leases.holders(self.now())}
                while waiting := {copy for copy in waiting if not await self._knows(copy, state)}:  # noqa: ASYNC110
                    await asyncio.sleep(FOLLOW_S)
                return Heard(state.epoch)
            case Backfill(copy, slots):
                replica = self._cluster.replicas[copy]
                return await self._ask_copy(copy, lambda: replica.backfill(slots), lambda _: Backfilled(copy))
            case ReadPosition():
                position = await self._insist(lambda: database.position_to_pass(self.claim))
                return PositionRead({HOME: position})
            case AwaitApplied(copy, position):
                replica = self._cluster.replicas[copy]
                return await self._ask_copy(
                    copy,
                    lambda: replica.applied(position),
                    lambda done: Applied(copy, position) if done else None,
                )
        raise AssertionError(instruction)

    async def _disturbed(self) -> None:
        """What may come between a change and everybody's hearing of it."""
        if self.rng.random() < self._cluster.conditions.disturbed:
            match self.rng.randrange(4):
                case 0:
                    self.pause(self.rng.uniform(0.1, 0.6))
                case 1:
                    self._cluster.cut_off(0.5)
                case _ if self._cluster.coordinator is self:
                    asyncio.get_running_loop().call_soon(self._cluster.take_over)
                    await asyncio.sleep(0)
            await self.awake(0)

    async def _knows(self, copy: Copy, state: MapState) -> bool:
        if copy not in self.leases.holders(self.now()):
            return True
        replica = self._cluster.replicas[copy]
        try:
            return bool(
                await self._cluster.network.call(
                    self, lambda: replica.reached(self, lambda: replica.hear(state))
                )
            )
        except Unavailable:
            return False

    async def _ask_copy(
        self, copy: Copy, work: Callable[[], Awaitable[Any]], event: Callable[[Any], Event | None]
    ) -> Event | None:
        replica = self._cluster.replicas[copy]
        life, machine = replica.life, self.machine
        while replica.life == life and self.machine is machine:
            try:
                told = event(
                    await self._cluster.network.call(self, lambda: replica.reached(self, work), 2 * CALL_S)
                )
                # Whoever came back in between is known to have come before it is heard.
                if told is not None and replica.life == life:
                    return told
            except Unavailable:
                await asyncio.sleep(FOLLOW_S)
        if self.machine is not machine:
            return None
        self.up.discard(copy)
        return Left(copy)
