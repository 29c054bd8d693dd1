"""Answers are there before somebody waits for them, of this generation and of the next."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from protos.ringfort import v1 as pb
from services.cache.keys import answer_key
from services.cache.tier import CacheTier
from services.deadline import Deadline
from services.gateway.answers import Answers, Cached, Computed, Question
from services.gateway.warming import Warmed, Warming
from shard_router.errors import Unavailable

FAST = 1e6


def served(generation: int = 1) -> SimpleNamespace:
    collection = SimpleNamespace(uid=7, generation=generation)
    return SimpleNamespace(positions={"log": 5}, collection=collection)


@dataclass
class Asked:
    """Questions, and what became of them."""

    answers: Answers
    computed: list[tuple[int, str]] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def question(self, text: str) -> Question:
        async def compute(of: SimpleNamespace, deadline: Deadline) -> Computed:
            if text in self.broken:
                raise Unavailable("the shards are away")
            self.computed.append((of.collection.generation, text))
            return Computed(text.encode(), of.positions, int(time.time() * 1000), True, pb.Timings())

        def name(of: SimpleNamespace) -> bytes:
            return answer_key(7, "acme", of.collection.generation, 1, "", text.encode(), b"")

        return Question(name, compute, 0.0)

    async def ask(self, of: SimpleNamespace, text: str) -> Cached | Computed:
        question = self.question(text)
        name = question.name(of)
        found = await self.answers.get(of, name, question, {}, 0)
        return found or await self.answers.once(of, name, question, {}, Deadline.after(60))


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    """Three questions that are hot, and one that is not."""
    cache = CacheTier(l1_bytes=1_000_000, redis_url=None)
    asked = Asked(Answers(cache, ttl_s=60))
    for text in ("a", "b", "c"):
        for _ in range(50):
            await asked.ask(served(), text)
    await asked.ask(served(), "seldom")
    await cache.exchange.turn()
    for text in ("a", "b", "c", "seldom"):
        await asked.ask(served(), text)
    asked.computed.clear()
    yield asked
    await asked.answers.close()


async def warm(asked: Asked, of: SimpleNamespace, limit: int = 100, left_s: float = 60.0) -> Warmed:
    return await Warming(asked.answers).warm(of, limit=limit, rate=FAST, deadline=Deadline.after(left_s))


async def test_what_is_in_the_cache_is_left_alone(asked):
    assert await warm(asked, served()) == Warmed(known=3, computed=0, failed=0, left=0)


async def test_what_a_write_made_old_is_computed_the_latest_asked_first(asked):
    now = served()
    now.positions = {"log": 6}
    assert await warm(asked, now, limit=2) == Warmed(known=3, computed=2, failed=0, left=1)
    assert asked.computed == [(1, "c"), (1, "b")]
    assert type(await asked.ask(now, "c")) is Cached
    assert type(await asked.ask(now, "a")) is Computed


async def test_a_generation_s_answers_are_there_before_it_is_the_live_one(asked):
    following = served(generation=2)
    assert await warm(asked, following) == Warmed(known=3, computed=3, failed=0, left=0)
    assert {generation for generation, _ in asked.computed} == {2}
    assert [type(await asked.ask(following, text)) for text in ("a", "b", "c")] == [Cached] * 3


async def test_one_that_fails_keeps_none_of_the_others(asked, caplog):
    now = served()
    now.positions = {"log": 6}
    asked.broken.add("b")
    assert await warm(asked, now) == Warmed(known=3, computed=2, failed=1, left=1)
    assert "the shards are away" in caplog.text


async def test_it_ends_before_its_caller_s_time_does(asked):
    now = served()
    now.positions = {"log": 6}
    assert await warm(asked, now, left_s=0.4) == Warmed(known=3, computed=0, failed=0, left=3)


async def test_another_collection_s_questions_are_its_own(asked):
    other = served()
    other.collection.uid = 8
    assert await warm(asked, other) == Warmed(known=0, computed=0, failed=0, left=0)
