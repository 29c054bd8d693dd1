"""Which replica answers for which shard in one query."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shard_router.shard_map import ShardMap


@dataclass(frozen=True, slots=True)
class ShardCall:
    """One replica to ask. `slots` are those it is asked for; None means all that its shard owns."""

    shard: int
    replica: int
    slots: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class FanoutPlan:
    """The calls of one query, at most one a shard, and the shards that no replica can answer for."""

    epoch: int
    calls: tuple[ShardCall, ...]
    unreachable: tuple[int, ...] = ()


def plan_fanout(
    shard_map: ShardMap, loads: Mapping[int, Sequence[float | None]], rng: random.Random
) -> FanoutPlan:
    """One replica of every shard, the less loaded of two drawn at random (Mitzenmacher, 2001).

    `loads[shard][replica]` counts what is in flight there, None where it is down. A shard with no replica
    up, or not in `loads`, is unreachable. Shards ascend in the plan.
    """
    calls, unreachable = [], []
    for shard in shard_map.shards:
        up = [(load, replica) for replica, load in enumerate(loads.get(shard, ())) if load is not None]
        if up:
            calls.append(ShardCall(shard, _less_loaded(up, rng)))
        else:
            unreachable.append(shard)
    return FanoutPlan(shard_map.epoch, tuple(calls), tuple(unreachable))


def _less_loaded(up: Sequence[tuple[float, int]], rng: random.Random) -> int:
    """The replica of the smaller load among two of these (load, replica); chance decides between equals."""
    if len(up) == 1:
        return up[0][1]
    # Two draws of random() cost a tenth of sample().
    first = int(rng.random() * len(up))
    second = int(rng.random() * (len(up) - 1))
    second += second >= first
    (load, replica), (other_load, other_replica) = up[first], up[second]
    return replica if load <= other_load else other_replica


class Latencies:
    """The 95th percentile of the latest answer times, in ms; None until there are enough to tell."""

    #: Answers that are remembered, after how many the percentile is taken anew, and how many it needs.
    WINDOW, EVERY, ENOUGH = 256, 32, 64

    __slots__ = ("_at", "_latest", "_since", "p95_ms")

    def __init__(self) -> None:
        self._latest: list[float] = []
        self._at = self._since = 0
        self.p95_ms: float | None = None

    def add(self, took_ms: float) -> None:
        """An answer came after so long."""
        if len(self._latest) < self.WINDOW:
            self._latest.append(took_ms)
        else:
            self._latest[self._at] = took_ms
            self._at = (self._at + 1) % self.WINDOW
        self._since += 1
        if self._since >= self.EVERY and len(self._latest) >= self.ENOUGH:
            self._since = 0
            self.p95_ms = sorted(self._latest)[len(self._latest) * 95 // 100]


class HedgeBudget:
    """Second questions are a twentieth of the first ones at most, and a few in reserve.

    Else a slow moment, in which every question would be asked twice, would become a slower one.
    """

    SHARE, RESERVE = 0.05, 8.0

    __slots__ = ("_saved",)

    def __init__(self) -> None:
        self._saved = self.RESERVE

    def asked(self) -> None:
        """A first question was asked."""
        self._saved = min(self.RESERVE, self._saved + self.SHARE)

    def spend(self) -> bool:
        """Whether a second question may be asked; it then counts as asked."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this replica."""

    replica: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until one of those asked answers or fails."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The shard does not answer."""


class ShardQuestion:
    """How one query gets one shard's answer: whom to ask next, as answers stay away or fail.

    At most one hedge, once the 95th percentile has passed and the budget allows it; at most one retry,
    where a replica says that it is unavailable: of another that is up, else of the same.
    """

    __slots__ = ("_asked", "_hedged", "_loads", "_pending", "_retried", "first")

    def __init__(self, first: int, loads: Sequence[float | None]) -> None:
        """first: who is asked already; loads: as of plan_fanout."""
        self.first, self._loads = first, loads
        self._asked = [first]
        self._pending = {first}
        self._hedged = self._retried = False

    @property
    def may_hedge(self) -> bool:
        """Whether it makes sense to look at the clock."""
        return not self._hedged and self._other() is not None

    def late(self, budget: HedgeBudget) -> Ask | Wait:
        """The answer has not come within the 95th percentile."""
        other = self._other()
        if self._hedged or other is None or not budget.spend():
            return Wait()
        self._hedged = True
        return self._ask(other)

    def failed(self, replica: int, *, unavailable: bool) -> Ask | Wait | GiveUp:
        """A replica that was asked answered with an error; `unavailable` is one that another may not have."""
        self._pending.discard(replica)
        if unavailable and not self._retried and not self._pending:
            self._retried = True
            other = self._other()
            return self._ask(replica if other is None else other)
        return Wait() if self._pending else GiveUp()

    def _ask(self, replica: int) -> Ask:
        self._asked.append(replica)
        self._pending.add(replica)
        return Ask(replica)

    def _other(self) -> int | None:
        """The least loaded replica that is up and was not asked yet."""
        left = [
            (load, number)
            for number, load in enumerate(self._loads)
            if load is not None and number not in self._asked
        ]
        return min(left)[1] if left else None


#: How long to wait before a query is planned again that met replicas at another epoch: the first time not at
#: all, then longer and longer.
STALE_PAUSES_S = (0.0, 0.001, 0.004, 0.016, 0.05)


def stale_pause_s(attempt: int) -> float:
    """Seconds to wait before attempt 1, 2 and so on to plan a query again."""
    return STALE_PAUSES_S[min(attempt, len(STALE_PAUSES_S)) - 1]
