"""Calls that the head of a cluster alone carries out, whichever gateway they reach.

What changes the collections, the registry of models or the shards has one place, so that nothing has to be
agreed on; jobs run there, and are told of from there. The head answers once every gateway knows.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from google.protobuf import message_factory
from google.protobuf.message import Message

from protos.ringfort import v1 as pb
from services.deadline import Deadline
from services.gateway.cluster_service import CacheReads
from services.gateway.server import SERVICES, Servicers, method_of
from services.gateway.servicers import Call
from shard_router.errors import NotImplementedHere, Unavailable

#: By service.
HANDED_ON: dict[str, tuple[str, ...]] = {
    "CollectionService": ("Create", "Delete", "SetAlias"),
    "ModelService": ("Register", "SetTraffic", "Promote", "Rollback"),
    "ClusterService": ("AddShard", "DrainShard", "SetReplicas", "Describe", "CacheStats", "WarmCache"),
    "IndexService": ("Reindex", "Activate", "Rollback", "GetJob", "ListJobs", "CancelJob"),
}
#: How often a job that is watched is asked after, and how long the head may take to answer.
WATCH_S, JOB_S = 0.1, 10.0

#: What every gateway answers for itself; the head puts it together.
OVER_ALL = {"ClusterService": ("CacheStats", "WarmCache")}

HandOn = Callable[[str, str, str, bytes, Deadline], Awaitable[bytes]]
#: The same, answered by each of the other gateways that can be reached.
AskOthers = Callable[[str, str, str, bytes, Deadline], Awaitable[list[bytes]]]


class HandedOn:
    """The methods of one service that are handed on."""

    def __init__(self, service: str, hand_on: HandOn) -> None:
        """`hand_on`: service, method, tenant, request, deadline -> the head's answer."""
        self._service, self._hand_on = service, hand_on

    def __getattr__(self, method: str) -> Callable[[Any, Call], Awaitable[bytes]]:
        if method not in HANDED_ON[self._service]:
            raise AttributeError(method)

        def handed(request: Any, call: Call) -> Awaitable[bytes]:
            return self._hand_on(
                self._service, method, call.tenant, request.SerializeToString(), call.deadline
            )

        return handed


class WatchedJobs:
    """WatchJob, by asking the head again and again."""

    def __init__(self, hand_on: HandOn) -> None:
        self._hand_on = hand_on

    async def WatchJob(self, request: pb.WatchJobRequest, call: Call) -> AsyncIterator[pb.Job]:
        """A job whenever it has changed, until it has ended; NotFound."""
        asked = pb.GetJobRequest(id=request.id).SerializeToString()
        told: pb.Job | None = None
        while told is None or told.state in (pb.Job.PENDING, pb.Job.RUNNING):
            # Each question has a time of its own: a watch may go on for a day.
            within = Deadline.after(min(JOB_S, call.deadline.require("the job")))
            job = pb.Job.FromString(await self._hand_on("IndexService", "GetJob", call.tenant, asked, within))
            if job != told:
                told = job
                yield job
            await asyncio.sleep(WATCH_S)


class OverGateways:
    """The caches of all gateways as one, asked of the head."""

    def __init__(self, own: CacheReads, ask_others: AskOthers) -> None:
        self._own, self._ask_others = own, ask_others

    async def CacheStats(self, request: pb.CacheStatsRequest, call: Call) -> pb.CacheStatsResponse:
        """Counts added up; what a common tier says of itself is as the fullest answer has it."""
        told = await self._own.CacheStats(request, call)
        for answer in await self._others("CacheStats", request, call):
            other = pb.CacheStatsResponse.FromString(answer)
            for tier, others in zip(told.tiers, other.tiers, strict=True):
                _add(tier, others)
            told.superseded += other.superseded
            told.stampedes_avoided += other.stampedes_avoided
            told.refreshed_early += other.refreshed_early
            told.gateways = max(told.gateways, other.gateways)
        return told

    async def WarmCache(self, request: pb.WarmCacheRequest, call: Call) -> pb.WarmCacheResponse:
        """Each gateway computes what it was asked for; at most `limit`, and at most `rate` a second, each."""
        told, others = await asyncio.gather(
            self._own.WarmCache(request, call), self._others("WarmCache", request, call)
        )
        for other in map(pb.WarmCacheResponse.FromString, others):
            told.known += other.known
            told.computed += other.computed
            told.failed += other.failed
            told.left += other.left
        return told

    async def _others(self, method: str, request: Message, call: Call) -> list[bytes]:
        return await self._ask_others(
            "ClusterService", method, call.tenant, request.SerializeToString(), call.deadline
        )


class OfTheHead:
    """The same asked of a further gateway: of the head, and while that is away of this one alone."""

    def __init__(self, own: CacheReads, hand_on: HandOn) -> None:
        self._own, self._hand_on = own, hand_on

    async def CacheStats(self, request: pb.CacheStatsRequest, call: Call) -> Any:
        return await self._asked("CacheStats", request, call)

    async def WarmCache(self, request: pb.WarmCacheRequest, call: Call) -> Any:
        return await self._asked("WarmCache", request, call)

    async def _asked(self, method: str, request: Message, call: Call) -> Any:
        body = request.SerializeToString()
        try:
            return await self._hand_on("ClusterService", method, call.tenant, body, call.deadline)
        except Unavailable:
            return await getattr(self._own, method)(request, call)


def _add(tier: pb.TierStats, other: pb.TierStats) -> None:
    common = tier.name != "L1"
    for name in ("hits", "misses", "errors"):
        setattr(tier, name, getattr(tier, name) + getattr(other, name))
    for name in ("entries", "bytes", "evictions", "eviction_storms", "removed", "purges"):
        one, another = getattr(tier, name), getattr(other, name)
        setattr(tier, name, max(one, another) if common else one + another)
    if tier.state != other.state:
        tier.state = "partly"


async def carry_out(
    servicers: Servicers,
    service: str,
    method: str,
    tenant: str,
    request: bytes,
    deadline: Deadline,
    which: Mapping[str, tuple[str, ...]] = HANDED_ON,
) -> bytes:
    """What a call that was handed on answers here; NotImplementedHere where it is none of `which`."""
    answer = method_of(servicers, service, method) if method in which.get(service, ()) else None
    if answer is None:
        raise NotImplementedHere(f"{service}.{method}")
    message = message_factory.GetMessageClass(SERVICES[service].methods_by_name[method].input_type)
    answered = await answer(message.FromString(request), Call(tenant, deadline))
    return bytes(answered.SerializeToString())
