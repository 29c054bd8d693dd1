"""Gateways over one real Redis, one log that is the truth, and a world that decides who goes on when.

Everybody stops at `World.step` again and again; the world lets one go on at a time, by the seed, and time
passes meanwhile. Messages are delayed, repeated and lost; a gateway that is paused stands wherever it stood,
while its lease runs out. What is answered has to include every write to what is asked for that was
acknowledged, as visible to all, before the read began.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from protos.ringfort import v1 as pb
from services.cache.tier import CacheTier
from services.cache.watermark import Watermark
from services.deadline import Deadline
from services.gateway.answers import Answers, Cached, Computed, Question
from shard_router.errors import RingfortError, Unavailable

LEASE_S = 1.0
#: How much longer the granter waits; clocks run at speeds that differ by less.
DRIFT = 0.02
QUESTIONS = 3


class Stale(AssertionError):
    """A read was answered with less than was acknowledged before it began."""


class World:
    """Time, chance, and who goes on next. `busy` says whether somebody waits for something real."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        self.busy: Callable[[], bool] = lambda: False
        #: Until when nobody in there goes on, by gateway.
        self.paused_until_s: dict[int, float] = {}
        self._waiting: list[tuple[float, int | None, asyncio.Future[None]]] = []
        self._tasks: list[asyncio.Future[None]] = []

    async def step(self, gateway: int | None = None, delay_s: float = 0.0) -> None:
        """Stand still until the world says go on, at the earliest after the delay."""
        go = asyncio.get_running_loop().create_future()
        self._waiting.append((self.now_s + delay_s, gateway, go))
        await go

    def begin(self, actor: Coroutine[Any, Any, None]) -> None:
        """One more that acts, until the end of the run."""
        self._tasks.append(asyncio.ensure_future(actor))

    async def run(self, over: Callable[[], bool]) -> None:
        """Until it is over; raises what one of the actors raises."""
        try:
            while not over():
                await self._settle()
                if failed := next((t for t in self._tasks if t.done() and t.exception()), None):
                    failed.result()
                self._let_one_go()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _settle(self) -> None:
        """Until everybody stands still, or waits for somebody who does."""
        for _ in range(4):
            await asyncio.sleep(0)
            while self.busy():  # noqa: ASYNC110 - a server's answer sets no event here
                await asyncio.sleep(0)

    def _let_one_go(self) -> None:
        self._waiting = [entry for entry in self._waiting if not entry[2].done()]
        self.now_s += self.rng.expovariate(100)
        ready = [entry for entry in self._waiting if self._ready_s(entry) <= self.now_s]
        if not ready:
            first = min(self._waiting, key=self._ready_s)
            self.now_s, ready = self._ready_s(first), [first]
        entry = self.rng.choice(ready)
        self._waiting.remove(entry)
        entry[2].set_result(None)

    def _ready_s(self, entry: tuple[float, int | None, asyncio.Future[None]]) -> float:
        at_s, gateway, _ = entry
        return at_s if gateway is None else max(at_s, self.paused_until_s.get(gateway, 0.0))


@dataclass
class Truth:
    """The database: the log, what every question's answer is as of now, and the leases it granted."""

    log_id: str = "log-0"
    position: int = 0
    #: By question, the position of the last write that changed its answer.
    latest: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(QUESTIONS), 0))
    #: The same, of writes acknowledged as visible to all.
    acknowledged: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(QUESTIONS), 0))
    #: By gateway, until when its lease may be valid; on the granter's clock.
    leases_s: dict[int, float] = field(default_factory=dict)
    #: Nothing is granted or acknowledged before then: leases of the log before may still be valid.
    grants_from_s: float = 0.0

    def restore(self, now_s: float, back: int) -> None:
        """Another log takes over, as it was some positions ago."""
        self.log_id = f"log-{int(self.log_id[4:]) + 1}"
        self.position = max(0, self.position - back)
        self.latest = {q: min(at, self.position) for q, at in self.latest.items()}
        self.acknowledged = {q: min(at, self.position) for q, at in self.acknowledged.items()}
        self.grants_from_s = max([now_s, self.grants_from_s, *self.leases_s.values()])
        self.leases_s.clear()


class Gateway:
    """One gateway: the real cache and the real answers; its clock runs a little fast or slow."""

    #: What a test puts a mistake into.
    watermark_of: type[Watermark] = Watermark
    counts_lease_from_receipt = False
    reads_position_after_search = False
    knows_no_logs = False
    confirms_everything = False

    def __init__(self, number: int, world: World, truth: Truth, redis_url: str) -> None:
        self.number, self.world, self.truth = number, world, truth
        self.cache = CacheTier(l1_bytes=200_000, redis_url=redis_url, op_timeout_ms=5_000, rng=world.rng)
        self._speed = world.rng.uniform(1 - DRIFT / 3, 1 + DRIFT / 3)
        self.watermark = self.watermark_of(LEASE_S)
        self.answers = Answers(self.cache, ttl_s=60, known=self._known, rng=world.rng)
        self.served = self._serve("")

    @property
    def busy(self) -> bool:
        """Whether something is on its way to or from Redis that somebody here may wait for."""
        redis = self.cache._redis
        return bool(redis._reads._lanes) or redis._commands._lane is not None

    def now_s(self) -> float:
        return self.world.now_s * self._speed

    def _serve(self, log_id: str) -> SimpleNamespace:
        return SimpleNamespace(log_id=log_id, positions={log_id: 0}, collection=SimpleNamespace(uid=1))

    def _known(self, served: SimpleNamespace) -> Mapping[str, int] | None:
        known = self.watermark.known(self.now_s())
        return known if known is not None and served.log_id in known else None

    def heard(self, log_id: str, position: int) -> bool:
        """Whether the message may be confirmed."""
        return self.watermark.heard(log_id, position) or self.confirms_everything

    def renewed(self, sent_s: float, log_id: str, position: int) -> None:
        sent_s = self.now_s() if self.counts_lease_from_receipt else sent_s
        self.watermark.renewed(sent_s, {log_id: position})
        [followed] = self.watermark.positions
        if self.served.log_id != followed:
            self.served = self._serve(followed)

    async def ask(self, question: int) -> int:
        """The position of the last write that the answer includes."""
        served, name = self.served, b"rf1:a:1:%d" % question

        async def compute(served: SimpleNamespace, deadline: Deadline) -> Computed:
            return await self._search(served, question)

        asked = Question(lambda served: name, compute, 0.0)
        found: Cached | Computed | None = await self.answers.get(served, name, asked, {}, 0)
        if found is None:
            found = await self.answers.once(served, name, asked, {}, Deadline.after(60))
        await self.world.step(self.number)
        return int(found.body)

    async def _search(self, served: SimpleNamespace, question: int) -> Computed:
        """As the shards answer: with a position read before the search, of the log they follow."""

        async def stand() -> None:
            await self.world.step(self.number)
            if self.truth.log_id != served.log_id and not self.knows_no_logs:
                raise Unavailable("the shards follow another log")

        await stand()
        position = self.truth.position
        await stand()
        latest = self.truth.latest[question]
        await stand()
        if self.reads_position_after_search:
            position = self.truth.position
        made = Computed(
            b"%d" % latest, {served.log_id: position}, int(time.time() * 1000), True, pb.Timings()
        )
        await stand()
        return made


class Play:
    """Actors of one seeded run."""

    def __init__(self, seed: int, redis_url: str, gateway: type[Gateway], count: int = 3) -> None:
        self.rng = random.Random(seed)
        self.world = World(self.rng)
        self.truth = Truth()
        self.gateways = [gateway(number, self.world, self.truth, redis_url) for number in range(count)]
        self.reads = self.acknowledged = 0

    async def open(self) -> None:
        for gateway in self.gateways:
            await gateway.cache.open()
        for gateway in self.gateways:
            await gateway.cache.exchange.turn()

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.answers.close()
            await gateway.cache.close()

    async def run(self, *, writes: int, disturb: Callable[[], Awaitable[None]]) -> None:
        """Until so many writes have been tried; `disturb` mistreats Redis now and then."""
        self.left = writes
        self.world.busy = lambda: any(gateway.busy for gateway in self.gateways)
        for actor in (
            *(self._write(writes // 2) for _ in range(2)),
            *(self._read() for _ in range(4)),
            *(self._renew(gateway) for gateway in self.gateways),
            self._trouble(disturb),
        ):
            self.world.begin(actor)
        await self.world.run(lambda: self.left == 0)

    async def _write(self, count: int) -> None:
        for _ in range(count):
            await self.world.step(delay_s=self.rng.expovariate(4))
            await self._commit(self.rng.choice(self.gateways), self.rng.randrange(QUESTIONS))
            self.left -= 1

    async def _commit(self, by: Gateway, question: int) -> None:
        """A write through a gateway: commit, tell everybody, and acknowledge once all have heard."""
        truth, world = self.truth, self.world
        await world.step(by.number)
        truth.position += 1
        truth.latest[question] = truth.position
        log_id, position = truth.log_id, truth.position
        heard = {by.number} if by.heard(log_id, position) else set()
        for gateway in self.gateways:
            if gateway is not by and self.rng.random() > 0.2:  # else it is lost
                for _ in range(self.rng.choice((1, 1, 2))):
                    self.world.begin(self._tell(gateway, log_id, position, heard))
        until_s = world.now_s + 4 * LEASE_S
        while world.now_s < until_s:
            await world.step(by.number, delay_s=0.02)
            if truth.log_id != log_id:
                return  # nobody knows what became of it
            waits_for = {number for number, end_s in truth.leases_s.items() if world.now_s < end_s}
            if waits_for <= heard and world.now_s >= truth.grants_from_s:
                truth.acknowledged[question] = max(truth.acknowledged[question], position)
                self.acknowledged += 1
                return

    async def _tell(self, gateway: Gateway, log_id: str, position: int, heard: set[int]) -> None:
        await self.world.step(gateway.number, delay_s=self.rng.expovariate(5))
        if gateway.heard(log_id, position):
            heard.add(gateway.number)

    async def _renew(self, gateway: Gateway) -> None:
        while True:
            await self.world.step(gateway.number, delay_s=self.rng.uniform(0.1, 0.5))
            sent_s = gateway.now_s()
            if self.rng.random() < 0.1:
                continue  # lost on its way
            await self.world.step(delay_s=self.rng.expovariate(8))
            now_s = self.world.now_s
            if now_s < self.truth.grants_from_s:
                continue
            self.truth.leases_s[gateway.number] = now_s + LEASE_S * (1 + DRIFT)
            log_id, position = self.truth.log_id, self.truth.position
            for _ in range(self.rng.choice((0, 1, 1, 1, 2))):
                self.world.begin(self._reply(gateway, sent_s, log_id, position))

    async def _reply(self, gateway: Gateway, sent_s: float, log_id: str, position: int) -> None:
        await self.world.step(gateway.number, delay_s=self.rng.expovariate(5))
        gateway.renewed(sent_s, log_id, position)

    async def _read(self) -> None:
        while True:
            gateway, question = self.rng.choice(self.gateways), self.rng.randrange(QUESTIONS)
            await self.world.step(gateway.number, delay_s=self.rng.expovariate(10))
            truth = self.truth
            log_id, needed = truth.log_id, truth.acknowledged[question]
            settled = self.world.now_s >= truth.grants_from_s
            try:
                got = await gateway.ask(question)
            except RingfortError:
                continue
            self.reads += 1
            if not settled or truth.log_id != log_id:
                continue  # begun under a log that was about to be given up
            if got < needed:
                raise Stale(f"gateway {gateway.number} answered {question} as of {got}, not {needed}")
            if got > truth.position:
                raise Stale(f"gateway {gateway.number} answered {question} as of {got}, which never was")

    async def _trouble(self, disturb: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self.world.step(delay_s=self.rng.expovariate(0.7))
            match self.rng.randrange(8):
                case 0 | 1 | 2 | 3:
                    number = self.rng.randrange(len(self.gateways))
                    self.world.paused_until_s[number] = self.world.now_s + self.rng.uniform(0.2, 4.0)
                case 4 | 5 | 6:
                    await disturb()
                case _:
                    self.truth.restore(self.world.now_s, self.rng.randrange(4))
