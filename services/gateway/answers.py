"""The answer cache as the read paths see it: look up, compute once, keep.

An entry says which log position it certainly includes and is served only while nothing later is known
(or within the staleness the collection or the request allows). What is known comes from this gateway's own
commits and what it hears of others', never from Redis; where it cannot say (its lease is over), nothing is
exact and nothing is shared.
"""

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protos.ringfort import v1 as pb
from services import tasks
from services.cache import keys
from services.cache.envelope import AnswerEntry, due, fresh, includes, reaches
from services.cache.single_flight import SingleFlight
from services.cache.tier import CacheTier
from services.deadline import Deadline
from services.gateway.served import Served
from shard_router.errors import RingfortError

log = logging.getLogger(__name__)

TIERS = {"L1": pb.L1, "REDIS": pb.REDIS}
#: Answers computed anew, before or after their time, behind the callers' backs; each within its own time.
MAX_REFRESHES, REFRESH_TIMEOUT_S = 16, 30.0
#: Questions remembered, those asked last; only hot ones are.
MAX_HOT_QUESTIONS = 1_024


@dataclass(frozen=True, slots=True)
class Computed:
    """A serialized answer, the positions it includes, when they were read, and whether it may be kept."""

    body: bytes
    #: By log.
    positions: Mapping[str, int]
    as_of_ms: int
    complete: bool
    timings: pb.Timings


@dataclass(frozen=True, slots=True)
class Cached:
    """A serialized answer out of a cache, and which tier it came from."""

    body: bytes
    served_from: "pb.ServedFrom.ValueType"


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked: the name of its answer in a collection as it is served, and how that is computed.

    Both say it of any generation of the collection, so that a question can be asked again of the next.
    """

    name: Callable[[Served], bytes]
    compute: Callable[[Served, Deadline], Coroutine[Any, Any, Computed]]
    min_coverage: float


#: log_id -> the position that an exact answer has to include; None where this gateway cannot say.
Known = Callable[[Served], Mapping[str, int] | None]


def known_here(served: Served) -> Mapping[str, int]:
    """What the one gateway there is knows: all that was committed."""
    return served.positions


class Answers:
    """Serialized answers by what was asked."""

    def __init__(
        self,
        cache: CacheTier,
        *,
        ttl_s: float,
        known: Known = known_here,
        rng: random.Random | None = None,
    ) -> None:
        self._cache = cache
        self._known = known
        self._ttl_s = ttl_s
        self._rng = rng or random.Random()
        self._flights = SingleFlight()
        #: By collection's uid and question's name, the hot ones; the one asked last at the end.
        self._hot: OrderedDict[tuple[int, bytes], Question] = OrderedDict()
        #: By name, those computed anew behind the callers' backs.
        self._refreshing: dict[bytes, asyncio.Task[None]] = {}
        self._superseded = self._refreshed = self._refreshes_failed = 0

    async def close(self) -> None:
        """Ends what goes on behind the callers' backs."""
        await tasks.end(*self._refreshing.values())

    def key(self, served: Served, ranker_version: str, query: bytes, options: bytes) -> bytes:
        """The name of an answer: everything it depends on but the documents themselves."""
        return self.keys(served, ranker_version, (query,), options)[0]

    def keys(
        self, served: Served, ranker_version: str, queries: Iterable[bytes], options: bytes
    ) -> list[bytes]:
        """The names of answers to queries that have everything else in common."""
        c = served.collection
        return keys.answer_keys(
            c.uid, c.tenant, c.generation, c.schema_version, ranker_version, queries, options
        )

    async def get(
        self,
        served: Served,
        name: bytes,
        question: Question,
        at_least: Mapping[str, int],
        max_staleness_ms: int,
    ) -> Cached | None:
        """The answer of that name, if one is kept and still good enough.

        It includes the positions `at_least`, by log, whatever staleness is allowed. One that soon could not
        be served any more is computed anew, and nobody waits for that.
        """
        if self._cache.is_hot(name):
            self._remember(served, name, question)
        tier = "L1"
        value = self._cache.peek(name)
        if value is None:
            (found,) = await self._cache.get_many([name])
            if found is None:
                return None
            value, tier = found
        known, now_ms = self._known(served), _now_ms()
        entry = self._good(served, name, value, at_least, known, now_ms, max_staleness_ms)
        if entry is None:
            return None
        # Where no age is allowed, what is served includes all that is known.
        if max_staleness_ms > 0:
            exact = known is not None and includes(entry, known)
            if not exact and due(entry, now_ms, max_staleness_ms, self._rng.random()):
                self.refresh(served, question)
        return Cached(entry.body, TIERS[tier])

    async def get_many(
        self, served: Served, names: Sequence[bytes], at_least: Mapping[str, int], max_staleness_ms: int
    ) -> list[Cached | None]:
        """The answers of those names that are kept and still good enough, in order, by one read of each tier.

        They include the positions `at_least`, by log, whatever staleness is allowed.
        """
        known, now_ms = self._known(served), _now_ms()
        answers: list[Cached | None] = []
        for name, found in zip(names, await self._cache.get_many(names), strict=True):
            if found is None:
                answers.append(None)
                continue
            entry = self._good(served, name, found.value, at_least, known, now_ms, max_staleness_ms)
            answers.append(Cached(entry.body, TIERS[found.tier]) if entry else None)
        return answers

    async def once(
        self,
        served: Served,
        name: bytes,
        question: Question,
        at_least: Mapping[str, int],
        deadline: Deadline,
    ) -> Cached | Computed:
        """Compute an answer, or share the computation of an equal request that is under way; keep it.

        A computation is shared only between requests that know of the same writes and ask for the same
        coverage, and by who comes while it is under way only if it includes those writes: a copy may have
        been asked before it had one that was acknowledged since.
        Where other gateways use the same Redis, one of them computes and the others wait for its answer.
        """
        known = self._known(served)
        positions = {} if known is None else known

        async def make() -> Cached | Computed:
            made = await question.compute(served, deadline)
            entry = self._entry(made)
            if entry is None:
                pass
            elif self._cache.shared:
                await self._cache.publish(name, entry, ttl_s=self._ttl_s)
            else:
                self._cache.put_many([(name, entry)], ttl_s=self._ttl_s)
            return made

        async def find() -> Cached | Computed | None:
            value = await self._cache.look_behind(name)
            entry = AnswerEntry.decode(value) if value is not None else None
            # Nothing older will do: what was known when we asked has to be in it.
            if entry is None or not (includes(entry, positions) and entry.reaches(at_least)):
                return None
            return Cached(entry.body, pb.REDIS)

        if known is None:
            # What is under way may have begun before a write that was acknowledged since.
            return await make()

        led = False

        async def lead() -> Cached | Computed:
            nonlocal led
            led = True
            if not self._cache.shared:
                return await make()
            lease = keys.lease_key(name, positions)
            return await self._cache.leases.run(lease, find, make, deadline)

        flight = name, tuple(positions.items()), question.min_coverage
        answer = await self._flights.run(flight, lead)
        if led or isinstance(answer, Cached) or reaches(answer.positions, positions):
            return answer
        # Whatever is under way now was begun after this request came.
        return await self._flights.run(flight, lead)

    async def once_many(
        self,
        served: Served,
        names: Sequence[bytes],
        compute: Callable[[Sequence[int]], Awaitable[Sequence[Computed]]],
        at_least: Mapping[str, int],
        deadline: Deadline,
        *,
        lease: bool = True,
    ) -> Sequence[Cached | Computed]:
        """The answers of those names, no two alike; what `compute` makes, given places among them, is kept.

        With `lease`, and where other gateways use the same Redis, what another call is computing, there or
        here, is waited for once all the rest has been computed.
        """
        known = self._known(served)

        async def make(places: Sequence[int]) -> Sequence[Cached | Computed]:
            made = await compute(places)
            self.keep(served, [(names[place], each) for place, each in zip(places, made, strict=True)])
            return made

        if not lease or known is None or not self._cache.shared:
            return await make(range(len(names)))
        positions = known

        async def find(places: Sequence[int]) -> Mapping[int, Cached | Computed]:
            values = await self._cache.look_behind_many([names[place] for place in places])
            found: dict[int, Cached | Computed] = {}
            for place in places:
                value = values.get(names[place])
                entry = AnswerEntry.decode(value) if value is not None else None
                if entry is not None and includes(entry, positions) and entry.reaches(at_least):
                    found[place] = Cached(entry.body, pb.REDIS)
            return found

        return await self._cache.leases.run_many(
            [keys.lease_key(name, positions) for name in names], find, make, deadline,
            soon=lambda made: isinstance(made, Computed) and made.complete,
        )  # fmt: skip

    def refresh(self, served: Served, question: Question) -> bool:
        """Compute an answer anew behind the callers' backs; False where that is under way or too much is."""
        name = question.name(served)
        if name in self._refreshing or len(self._refreshing) >= MAX_REFRESHES:
            return False
        refreshing = asyncio.create_task(self._refresh(served, name, question))
        self._refreshing[name] = refreshing
        refreshing.add_done_callback(lambda _: self._refreshing.pop(name))
        return True

    async def _refresh(self, served: Served, name: bytes, question: Question) -> None:
        try:
            await self.once(served, name, question, {}, Deadline.after(REFRESH_TIMEOUT_S))
        except Exception as error:
            self._refreshes_failed += 1
            known = isinstance(error, RingfortError)
            log.warning("an answer could not be computed anew: %s", error, exc_info=not known)
        else:
            self._refreshed += 1

    def _remember(self, served: Served, name: bytes, question: Question) -> None:
        asked = (served.collection.uid, name)
        self._hot[asked] = question
        self._hot.move_to_end(asked)
        if len(self._hot) > MAX_HOT_QUESTIONS:
            self._hot.popitem(last=False)

    def hot_questions(self, uid: int) -> list[Question]:
        """What a collection was asked while it was hot, the latest first."""
        return [question for (of, _), question in reversed(self._hot.items()) if of == uid]

    def holds(self, served: Served, question: Question) -> bool:
        """Whether L1 has an exact answer; not a read."""
        value = self._cache.held(question.name(served))
        entry = AnswerEntry.decode(value) if value is not None else None
        known = self._known(served)
        return entry is not None and known is not None and includes(entry, known)

    def keep(self, served: Served, answers: Sequence[tuple[bytes, Computed]]) -> None:
        """Keep the answers that may be kept."""
        entries = [(name, self._entry(made)) for name, made in answers]
        items = [(name, entry) for name, entry in entries if entry is not None]
        if items:
            self._cache.put_many(items, ttl_s=self._ttl_s)

    @staticmethod
    def _entry(made: Computed) -> bytes | None:
        """What is kept of an answer; None where it may not be."""
        if not made.complete:
            return None
        cost_ms = max(0, _now_ms() - made.as_of_ms)
        return AnswerEntry(dict(made.positions), made.body, made.as_of_ms, cost_ms).encode()

    def _good(
        self,
        served: Served,
        name: bytes,
        value: bytes,
        at_least: Mapping[str, int],
        known: Mapping[str, int] | None,
        now_ms: int,
        max_staleness_ms: int,
    ) -> AnswerEntry | None:
        entry = AnswerEntry.decode(value)
        if entry is None:
            return None
        if not at_least or entry.reaches(at_least):
            if entry.positions == known:
                return entry
            # Where this gateway cannot say what is known, the age alone decides; but of these logs.
            logs = served.positions if known is None else known
            if entry.positions.keys() == logs.keys() and fresh(entry, known, now_ms, max_staleness_ms):
                return entry
        self._superseded += 1
        if max_staleness_ms == 0:
            self._cache.drop(name)
        return None

    def stats(self) -> dict[str, float]:
        """Entries refused because a write had moved past them; recomputes under way, avoided, early."""
        return {
            "superseded_total": self._superseded,
            "refreshed_total": self._refreshed,
            "refreshes_failed_total": self._refreshes_failed,
            "refreshing": len(self._refreshing),
            "hot_questions": len(self._hot),
            **self._flights.stats(),
        }


def _now_ms() -> int:
    return int(time.time() * 1000)
