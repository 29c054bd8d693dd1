"""Computations are shared, and nobody is handed one that may lack what was acknowledged before it came."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from protos.ringfort import v1 as pb
from services.cache.tier import CacheTier
from services.deadline import Deadline
from services.gateway.answers import Answers, Cached, Computed, Question
from services.gateway.served import Served


class Search:
    """Computes one answer after another, each as far as `reached` says when it begins, held until `go`."""

    def __init__(self, reached: int) -> None:
        self.reached, self.begun = reached, 0
        self.go = asyncio.Event()

    async def __call__(self, served: Served, deadline: Deadline) -> Computed:
        self.begun += 1
        number, reached = self.begun, self.reached
        await self.go.wait()
        return Computed(b"%d" % number, {"log": reached}, int(time.time() * 1000), True, pb.Timings())


@pytest.fixture
async def answers() -> Answers:
    return Answers(CacheTier(l1_bytes=1_000_000, redis_url=None), ttl_s=60)


def asking(answers: Answers, search: Search) -> "asyncio.Task[Cached | Computed]":
    """One who knows of the log up to 5."""
    served = cast(Served, cast(Any, SimpleNamespace(positions={"log": 5}, collection=SimpleNamespace(uid=1))))
    question = Question(lambda _: b"rf1:a:1:q", search, 0.0)
    return asyncio.create_task(answers.once(served, b"rf1:a:1:q", question, {}, Deadline.after(60)))


async def test_equal_requests_share_one_computation(answers: Answers) -> None:
    search = Search(reached=5)
    tasks = [asking(answers, search) for _ in range(5)]
    await asyncio.sleep(0)
    search.go.set()
    assert {(await task).body for task in tasks} == {b"1"}
    assert search.begun == 1


async def test_what_was_begun_before_a_copy_had_what_is_known_is_not_shared(answers: Answers) -> None:
    # The write at 5 is committed, but a copy has yet to apply it when the first is asked.
    search = Search(reached=4)
    first = asking(answers, search)
    while not search.begun:  # noqa: ASYNC110
        await asyncio.sleep(0)
    # It is acknowledged as visible; whoever comes now has to see it.
    search.reached = 5
    later = [asking(answers, search) for _ in range(5)]
    await asyncio.sleep(0)
    search.go.set()
    assert (await first).body == b"1"
    assert {(await task).body for task in later} == {b"2"}
    assert search.begun == 2, "and what they compute anew they share"
