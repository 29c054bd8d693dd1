"""A cluster without I/O: a database, copies of shards, gateways and a coordinator on a bad network.

What they decide by are the pure modules that the service decides by: the states of the shard map, the
resharding machine, holdings, leases, the fan-out plan and the merge. Clocks run at speeds of their own;
processes crash and pause; messages are late, overtake each other and are lost.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from services.shard.holdings import Holdings
from shard_router.errors import PreconditionFailed, StaleEpoch, Unavailable
from shard_router.fanout_plan import Ask, GiveUp, ShardQuestion, plan_fanout, stale_pause_s
from shard_router.hashing import slot_of
from shard_router.leases import GrantedLeases, HeldLease
from shard_router.merge import merge
from shard_router.model import HOME, Hit, Version
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
from shard_router.shard_map import MapState, Migrating, Retiring, ShardMap, Steady

SLOTS, LEASE_S, PAGE_ROWS = 8, 0.5, 3
FOLLOW_S, CALL_S, PATIENCE_S = 0.06, 0.4, 2.0


class Fenced(Exception):
    """Another coordinator has the claim."""


@dataclass
class Conditions:
    """How hard a world is."""

    #: Shares of messages that are lost, and that are very late.
    lost: float
    late: float
    #: How often a follower lags behind, and for how long at most.
    lags: float
    lag_s: float
    #: How long a follower's read waits at most for its turn at the database.
    queue_s: float
    #: How long a page of a backfill takes at most to be taken in.
    page_s: float
    #: How long a gateway waits for a copy before it asks whether it has a lease.
    apply_s: float
    #: How often something happens between a coordinator's storing of a state and its telling of it.
    disturbed: float
    #: Crashes, pauses and the like, a second.
    chaos: float
    #: Whether some gateways only write and others only read, so that neither learn of a map by the other.
    apart: bool

    @classmethod
    def drawn(cls, rng: random.Random) -> "Conditions":
        """Each of them kind or hard, whatever the others are."""

        def either(kind: float, hard: float) -> float:
            return rng.choice((kind, hard))

        return cls(
            lost=either(0.02, 0.08),
            late=either(0.03, 0.15),
            lags=either(0.15, 0.5),
            lag_s=either(10 * FOLLOW_S, 20 * FOLLOW_S),
            queue_s=either(0.0, 0.4),
            page_s=either(0.0, 0.3),
            apply_s=either(CALL_S, CALL_S / 4),
            disturbed=either(0.2, 0.6),
            chaos=either(0.5, 2.0),
            apart=rng.random() < 0.7,
        )


class Network:
    """Carries calls, some of them badly."""

    def __init__(self, rng: random.Random, conditions: Conditions) -> None:
        self.rng, self.conditions = rng, conditions

    async def call(
        self, caller: "Process", work: Callable[[], Awaitable[Any]], limit_s: float = CALL_S
    ) -> Any:
        """What `work` returns at the other end; Unavailable if a message is lost or it takes too long."""
        life = caller.life
        # What is on its way arrives, whether the caller still waits or not.
        delivery = asyncio.ensure_future(self._deliver(work, limit_s))
        delivery.add_done_callback(lambda one: one.cancelled() or one.exception())
        done, _ = await asyncio.wait([delivery], timeout=limit_s)
        await caller.awake(life)
        if not done or delivery.cancelled():
            raise Unavailable("no answer")
        return delivery.result()

    async def _deliver(self, work: Callable[[], Awaitable[Any]], limit_s: float) -> Any:
        await self._travel(limit_s)
        answer = await work()
        await self._travel(limit_s)
        return answer

    async def _travel(self, limit_s: float) -> None:
        if self.rng.random() < self.conditions.lost:
            await asyncio.sleep(2 * limit_s)
            raise Unavailable("lost")
        await asyncio.sleep(
            self.rng.uniform(0.001, 0.01) * (40 if self.rng.random() < self.conditions.late else 1)
        )


class Process:
    """Something with a clock of its own that may pause, and crash."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.speed, self._offset_s = rng.uniform(0.996, 1.004), rng.uniform(0, 1000)
        self._paused_until_s = 0.0
        #: One more with each crash; what was begun in an earlier life does not go on.
        self.life = 0
        self._tasks: list[asyncio.Task[None]] = []

    def now(self) -> float:
        return self._offset_s + asyncio.get_running_loop().time() * self.speed

    def pause(self, seconds: float) -> None:
        self._paused_until_s = asyncio.get_running_loop().time() + seconds

    async def awake(self, life: int | None = None) -> None:
        """Return once this is not paused; CancelledError where its life is over."""
        while (left_s := self._paused_until_s - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        if life is not None and life != self.life:
            raise asyncio.CancelledError

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    def crash(self) -> None:
        self.life += 1
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()


@dataclass
class Row:
    seq: int
    deleted: bool


class Database:
    """The truth, the log and the stored map; each call is one transaction."""

    def __init__(self, shards: int) -> None:
        self.rows: dict[str, Row] = {}
        self.counter = 0
        self.state: MapState = Steady(ShardMap.create(SLOTS, shards))
        self.claim = 0
        #: By slot that has moved: where the log stood when its new owner was last waited for, and since which
        #: epoch it answers.
        self.passed: dict[int, tuple[int, int]] = {}
        self._read = 0

    async def write(self, ids: Sequence[str], deletes: bool) -> tuple[int, int]:
        for id in ids:
            self.counter += 1
            self.rows[id] = Row(self.counter, deletes)
        return self.counter, self.state.epoch

    async def tail(self, after: int, slots: Sequence[int] | None) -> tuple[list[tuple[str, Row]], int, bool]:
        """A page of the log, where it ends, and whether that is the log's end."""
        rows = sorted(
            (
                (id, Row(row.seq, row.deleted))
                for id, row in self.rows.items()
                if row.seq > after and (slots is None or slot_of(id, SLOTS) in slots)
            ),
            key=lambda pair: pair[1].seq,
        )
        page = rows[:PAGE_ROWS]
        ends = len(page) == len(rows)
        return page, self.counter if ends else page[-1][1].seq, ends

    async def position(self, claim: int | None = None) -> int:
        if claim is not None and claim != self.claim:
            raise Fenced
        return self.counter

    async def position_to_pass(self, claim: int) -> int:
        """The position that new owners have to pass."""
        self._read = await self.position(claim)
        return self._read

    async def read_state(self) -> MapState:
        return self.state

    async def put(self, claim: int, state: MapState) -> MapState:
        if claim != self.claim:
            raise Fenced
        if state.epoch == self.state.epoch + 1:
            self.state = state
            if isinstance(state, Retiring):
                moved = (slot for slots in state.gains.values() for slot in slots)
                self.passed |= dict.fromkeys(moved, (self._read, state.epoch))
        return self.state


class Replica(Process):
    """One copy of a shard, in memory only: a crash loses all of it."""

    def __init__(self, copy: Copy, cluster: "Cluster") -> None:
        super().__init__(cluster.rng)
        self.copy, self._cluster = copy, cluster
        #: Whom it takes for the coordinator, which somebody else may be by now.
        self.coordinator = cluster.coordinator
        self._cut_off_until_s, self._cut_off_from = 0.0, self.coordinator
        self.start()

    def start(self) -> None:
        self.rows: dict[str, int] = {}
        #: While anything is backfilled: what was deleted meanwhile.
        self.deleted: set[str] = set()
        self.backfilling = 0
        self.holdings = Holdings(SLOTS, (), 0)
        self.lease = HeldLease(LEASE_S)
        self.cursor = self.position = 0
        self.state: MapState | None = None
        self.spawn(self._follow())
        self.spawn(self._renew())

    def cut_off(self, seconds: float) -> None:
        """The coordinator that is one now and it do not reach each other for so long; everybody else does."""
        self._cut_off_until_s = asyncio.get_running_loop().time() + seconds
        self._cut_off_from = self._cluster.coordinator

    async def reached(self, coordinator: "Coordinator", work: Callable[[], Awaitable[Any]]) -> Any:
        """What it and a coordinator have to say to each other."""
        cut_off = asyncio.get_running_loop().time() < self._cut_off_until_s
        if cut_off and coordinator is self._cut_off_from:
            raise Unavailable("cut off")
        return await work()

    async def search(self, epoch: int, read_after: int) -> list[Hit]:
        await self.awake()
        if not await self.applied(read_after):
            raise Unavailable("behind")
        if not self.lease.may_answer(self.now()):
            raise Unavailable("no lease")
        self.holdings.require(epoch)
        served = self.holdings.served
        return [Hit(id, 1.0, Version(1, seq)) for id, seq in self.rows.items() if served[slot_of(id, SLOTS)]]

    async def applied(self, position: int) -> bool:
        await self.awake()
        for _ in range(20):
            if self.position >= position:
                return True
            await asyncio.sleep(FOLLOW_S / 2)
            await self.awake()
        return False

    async def hear(self, state: MapState) -> bool:
        """Whether this copy answers as that state wants it to."""
        await self.awake()
        return self.settle(state)

    def settle(self, state: MapState) -> bool:
        if self.state is not None and state.epoch < self.state.epoch:
            return True
        try:
            self.holdings.serve(state.epoch, state.served_by(self.copy.shard))
        except ValueError:
            return False
        self.state = state
        self.drop(set(range(SLOTS)).difference(state.followed_by(self.copy.shard)))
        return True

    def drop(self, slots: set[int]) -> None:
        self.holdings.release(sorted(slots))
        self.rows = {id: seq for id, seq in self.rows.items() if slot_of(id, SLOTS) not in slots}
        self.deleted = {id for id in self.deleted if slot_of(id, SLOTS) not in slots}

    async def backfill(self, slots: Sequence[int]) -> None:
        await self.awake()
        life, wanted = self.life, self.holdings.follow(slots)
        if not wanted:
            return
        begun, after, ends = self.holdings.changes, 0, False
        self.backfilling += 1
        while not ends:
            try:
                page, after, ends = await self._cluster.ask_database(
                    self, lambda after=after: self._cluster.database.tail(after, wanted)
                )
            except Unavailable:
                continue
            await asyncio.sleep(self.rng.uniform(0, self._cluster.conditions.page_s))
            await self.awake(life)
            if not self.holdings.kept(wanted, begun):
                break
            for id, row in page:
                here = id in self.rows or id in self.deleted or not self.holdings.followed[slot_of(id, SLOTS)]
                if not row.deleted and not here:
                    self.rows[id] = row.seq
        else:
            self.holdings.complete(wanted)
        self.backfilling -= 1
        if not self.backfilling:
            self.deleted.clear()

    async def _follow(self) -> None:
        life = self.life
        while True:
            changes, cursor, slots = self.holdings.changes, self.cursor, self.holdings.slots_followed()
            await asyncio.sleep(self.rng.uniform(0, self._cluster.conditions.queue_s))
            try:
                page, upto, ends = await self._cluster.ask_database(
                    self, lambda cursor=cursor, slots=slots: self._cluster.database.tail(cursor, slots)
                )
            except Unavailable:
                continue
            await self.awake(life)
            if changes != self.holdings.changes:
                continue
            for id, row in page:
                if row.deleted:
                    self.rows.pop(id, None)
                    if self.backfilling:
                        self.deleted.add(id)
                else:
                    self.rows[id] = row.seq
            self.cursor = upto
            if ends:
                self.position = upto
                self.lease.caught_up(upto)
                # Now and then somebody lags behind.
                conditions = self._cluster.conditions
                lags = self.rng.random() < conditions.lags
                await asyncio.sleep(self.rng.uniform(0, conditions.lag_s if lags else 2 * FOLLOW_S))

    async def _renew(self) -> None:
        life = self.life
        while True:
            sent_s = self.now()
            try:
                position, state = await self._cluster.network.call(
                    self, lambda: self.reached(self.coordinator, lambda: self.coordinator.renew(self.copy))
                )
            except (Unavailable, Fenced):
                self.coordinator = self._cluster.coordinator
                await asyncio.sleep(FOLLOW_S)
                continue
            await self.awake(life)
            # Whoever cannot answer as the map wants gets no lease from knowing of it: it catches up first.
            await self.backfill(state.served_by(self.copy.shard))
            if self.settle(state):
                self.lease.renewed(sent_s, self.now(), position)
                self.lease.caught_up(self.position)
                await asyncio.sleep(LEASE_S / 3)


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
                if told is not None:
                    return told
            except Unavailable:
                await asyncio.sleep(FOLLOW_S)
        if self.machine is not machine:
            return None
        self.up.discard(copy)
        return Left(copy)


@dataclass
class Found:
    """A search's hits by id, and the slots that were answered for."""

    seqs: Mapping[str, int]
    slots: frozenset[int]
    epoch: int


class Gateway(Process):
    """Writes and searches by the map it knows."""

    def __init__(self, cluster: "Cluster") -> None:
        super().__init__(cluster.rng)
        self._cluster = cluster
        self.coordinator = cluster.coordinator
        self.state: MapState = cluster.database.state

    async def write(self, ids: Sequence[str], *, deletes: bool, visible: bool) -> tuple[int, bool]:
        """The position of the commit, and whether it is visible; Unavailable where that is not known."""
        database = self._cluster.database
        upto, epoch = await self._cluster.ask_database(self, lambda: database.write(ids, deletes))
        if not visible:
            return upto, False
        until_s = self.now() + PATIENCE_S
        while self.state.epoch < epoch:
            if self.now() > until_s:
                return upto, False
            await self.refresh()
        state, slots = self.state, {slot_of(id, SLOTS) for id in ids}
        for copy in self._cluster.copies():
            if slots.intersection(state.followed_by(copy.shard)):
                while not await self._applied(copy, upto):
                    if self.now() > until_s:
                        return upto, False
        return upto, True

    async def _applied(self, copy: Copy, position: int) -> bool:
        replica, limit_s = self._cluster.replicas[copy], self._cluster.conditions.apply_s
        try:
            if await self._cluster.network.call(self, lambda: replica.applied(position), limit_s):
                return True
        except Unavailable:
            pass
        try:
            return not await self._cluster.network.call(self, lambda: self.coordinator.leased(copy))
        except (Unavailable, Fenced):
            self.coordinator = self._cluster.coordinator
            return False

    async def refresh(self) -> None:
        try:
            state = await self._cluster.ask_database(self, self._cluster.database.read_state)
        except Unavailable:
            return
        if state.epoch > self.state.epoch:
            self.state = state

    async def search(self, read_after: int) -> Found:
        """What is found; StaleEpoch where the map goes on changing."""
        attempt = 0
        while True:
            state = self.state
            copies = range(self._cluster.copies_a_shard)
            plan = plan_fanout(
                state.answering, {shard: [0.0 for _ in copies] for shard in state.answering.shards}, self.rng
            )
            try:
                answers = await asyncio.gather(
                    *(self._ask(state, call.shard, call.replica, read_after) for call in plan.calls)
                )
            except StaleEpoch:
                attempt += 1
                if attempt > 20:
                    raise
                await self.refresh()
                await asyncio.sleep(stale_pause_s(attempt))
                continue
            answered = [
                call.shard for call, hits in zip(plan.calls, answers, strict=True) if hits is not None
            ]
            hits = merge([hits for hits in answers if hits is not None], 1000)
            slots = frozenset(slot for shard in answered for slot in state.served_by(shard))
            return Found({hit.id: hit.version.seq for hit in hits}, slots, state.epoch)

    async def _ask(self, state: MapState, shard: int, first: int, read_after: int) -> list[Hit] | None:
        question, number = ShardQuestion(first, [0.0] * self._cluster.copies_a_shard), first
        while True:
            replica = self._cluster.replicas[Copy(shard, number)]
            try:
                hits: list[Hit] = await self._cluster.network.call(
                    self, lambda replica=replica: replica.search(state.epoch, read_after)
                )
                return hits
            except Unavailable:
                match question.failed(number, unavailable=True):
                    case Ask(other):
                        number = other
                    case GiveUp():
                        return None


@dataclass
class Cluster:
    """All of it, and what is wished of it."""

    rng: random.Random
    shards: int
    copies_a_shard: int
    #: Shards that may ever be.
    most_shards: int
    conditions: Conditions
    changes: int = 0
    #: Whether one change follows upon another.
    restless: bool = True

    def __post_init__(self) -> None:
        self.network = Network(self.rng, self.conditions)
        self.database = Database(self.shards)
        self.replicas: dict[Copy, Replica] = {}
        self.coordinator = Coordinator(self)
        for shard in range(self.most_shards):
            for number in range(self.copies_a_shard):
                copy = Copy(shard, number)
                self.replicas[copy] = Replica(copy, self)
        self.gateways = [Gateway(self) for _ in range(2)]

    def copies(self) -> list[Copy]:
        """Every copy there is, whether its shard has slots or not."""
        return [Copy(s, n) for s in range(self.most_shards) for n in range(self.copies_a_shard)]

    def moving(self, id: str) -> bool:
        """Whether a document's slot is changing owners."""
        state = self.database.state
        return isinstance(state, Migrating | Retiring) and any(
            slot_of(id, SLOTS) in slots for slots in state.gains.values()
        )

    def wish(self, state: Steady) -> Migrating | None:
        """The next change that is asked for."""
        if not self.restless:
            return None
        unused = [shard for shard in range(self.most_shards) if shard not in state.shards]
        if len(state.shards) == 1 or (unused and self.rng.random() < 0.5):
            return state.migrate(lambda shard_map: shard_map.add_shard(unused[0]))
        drained = self.rng.choice(state.shards)
        return state.migrate(lambda shard_map: shard_map.drain_shard(drained))

    async def ask_database(self, caller: Process, work: Callable[[], Awaitable[Any]]) -> Any:
        return await self.network.call(caller, work)

    def crash_copy(self, copy: Copy) -> None:
        self.replicas[copy].crash()
        self.replicas[copy].start()

    def cut_off(self, share: float) -> None:
        """Cut about so many of the copies off from the coordinator, for a while."""
        for replica in self.replicas.values():
            if self.rng.random() < share:
                replica.cut_off(self.rng.uniform(0.2, 1.0))

    def take_over(self) -> None:
        """Another coordinator is sure that this one is dead, which it is now or later."""
        before, self.coordinator = self.coordinator, Coordinator(self)
        self.cut_off(0.5)
        if self.rng.random() < 0.5:
            before.crash()
        else:
            asyncio.get_running_loop().call_later(self.rng.uniform(0.5, 3.0), before.crash)
