"""Answers computed before somebody waits for them: what is asked for most, and is not in the cache."""

import asyncio
import logging
from dataclasses import dataclass

from services.deadline import Deadline
from services.gateway.answers import Answers
from services.gateway.served import Served
from shard_router.errors import DeadlineExceeded, RingfortError

log = logging.getLogger(__name__)

#: Time kept of the caller's own to answer in.
_REST_S = 0.5


@dataclass(frozen=True, slots=True)
class Warmed:
    """Hot questions known; those computed now, those that failed, and those not in the cache still."""

    known: int
    computed: int
    failed: int
    left: int


class Warming:
    """Asks a collection's hot questions again, one at a time, so that callers notice nothing of it."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def warm(self, served: Served, *, limit: int, rate: float, deadline: Deadline) -> Warmed:
        """Compute at most `limit` answers, at most `rate` a second, as far as the deadline allows.

        `served` may be another generation of the collection than the one that was asked: before that becomes
        the live one, its answers are made so that whoever asks next finds them.
        """
        questions = self._answers.hot_questions(served.collection.uid)
        cold = [question for question in questions if not self._answers.holds(served, question)]
        computed = failed = 0
        for question in cold[:limit]:
            pause = asyncio.create_task(asyncio.sleep(1 / rate))
            try:
                if deadline.left_s() <= _REST_S:
                    break
                name = question.name(served)
                within = Deadline(deadline.at_s - _REST_S, deadline.clock)
                await self._answers.once(served, name, question, {}, within)
                computed += 1
                if computed + failed < min(limit, len(cold)):
                    await pause
            except DeadlineExceeded:
                break
            except RingfortError as error:
                failed += 1
                log.warning("an answer could not be warmed: %s", error)
            finally:
                pause.cancel()
        return Warmed(len(questions), computed, failed, len(cold) - computed)
