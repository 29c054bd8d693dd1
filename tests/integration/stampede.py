"""A gateway's answers over a real cache, of a collection that a test makes up; as a program, one that hangs.

`python stampede.py REDIS_URL QUESTION…` takes the questions' leases (hex), says "computing", and never ends.
"""

import asyncio
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from protos.ringfort import v1 as pb
from services.cache.tier import CacheTier
from services.deadline import Deadline
from services.gateway.answers import Answers, Cached, Computed, Known, Question, known_here

PATIENT_MS = 10_000


def question() -> bytes:
    """The name of an answer that nobody asked for before."""
    return b"rf1:a:7:" + uuid.uuid4().bytes


class Asked:
    """A collection as far as answers look at it: one log, and how far that is known."""

    def __init__(self, log_id: str, position: int, uid: int) -> None:
        self.log_id, self.position = log_id, position
        self.collection = SimpleNamespace(uid=uid)

    @property
    def positions(self) -> dict[str, int]:
        return {self.log_id: self.position}


@dataclass
class Gateway:
    """One gateway."""

    cache: CacheTier
    answers: Answers
    served: Asked

    @classmethod
    async def open(cls, redis_url: str, *, known: Known = known_here) -> "Gateway":
        cache = CacheTier(l1_bytes=1_000_000, redis_url=redis_url, op_timeout_ms=PATIENT_MS)
        await cache.open()
        served = Asked("log", 5, 7)
        return cls(cache, Answers(cache, ttl_s=60, known=known), served)

    async def close(self) -> None:
        await self.answers.close()
        await self.cache.close()

    def computed(self, body: bytes, position: int | None = None) -> Computed:
        """An answer that includes the position, or all that is known."""
        includes = self.served.position if position is None else position
        return Computed(body, {self.served.log_id: includes}, int(time.time() * 1000), True, pb.Timings())

    async def ask(
        self,
        name: bytes,
        compute: Callable[["Gateway"], Awaitable[Computed]],
        *,
        max_staleness_ms: int = 0,
        timeout_s: float = 60.0,
    ) -> Cached | Computed:
        """As the read paths do."""
        asked = Question(lambda served: name, lambda served, deadline: compute(self), 0.0)
        found = await self.answers.get(self.served, name, asked, {}, max_staleness_ms)
        if found is not None:
            return found
        return await self.answers.once(self.served, name, asked, {}, Deadline.after(timeout_s))

    async def ask_many(
        self,
        names: Sequence[bytes],
        compute: Callable[["Gateway", Sequence[bytes]], Awaitable[Sequence[Computed]]],
        *,
        timeout_s: float = 60.0,
    ) -> list[Cached | Computed]:
        """As BatchSearch does."""
        found = await self.answers.get_many(self.served, names, {}, 0)
        missing = [name for name, each in zip(names, found, strict=True) if each is None]
        made = await self.answers.once_many(
            self.served,
            missing,
            lambda places: compute(self, [missing[place] for place in places]),
            {},
            Deadline.after(timeout_s),
        )
        rest = dict(zip(missing, made, strict=True))
        return [each or rest[name] for name, each in zip(names, found, strict=True)]


async def hang(redis_url: str, names: Sequence[bytes]) -> None:
    async def forever(gateway: Gateway) -> Computed:
        print("computing", flush=True)
        await asyncio.sleep(3600)
        raise AssertionError

    async def forever_many(gateway: Gateway, names: Sequence[bytes]) -> Sequence[Computed]:
        return [await forever(gateway)]

    gateway = await Gateway.open(redis_url)
    gateway.cache.exchange._others[b"somebody"] = gateway.cache.exchange.windows.report(0.0)
    if len(names) == 1:
        await gateway.ask(names[0], forever, timeout_s=3600)
    await gateway.ask_many(names, forever_many, timeout_s=3600)


if __name__ == "__main__":
    asyncio.run(hang(sys.argv[1], [bytes.fromhex(name) for name in sys.argv[2:]]))
