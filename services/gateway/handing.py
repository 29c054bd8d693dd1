"""Calls that the head of a cluster alone carries out, whichever gateway they reach.

What changes the collections, the registry of models or the shards has one place, so that nothing has to be
agreed on; jobs run there, and are told of from there. The head answers once every gateway knows.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf import message_factory

from protos.ringfort import v1 as pb
from services.deadline import Deadline
from services.gateway.server import SERVICES, Servicers, method_of
from services.gateway.servicers import Call
from shard_router.errors import NotImplementedHere

#: By service.
HANDED_ON: dict[str, tuple[str, ...]] = {
    "CollectionService": ("Create", "Delete", "SetAlias"),
    "ModelService": ("Register", "SetTraffic", "Promote", "Rollback"),
    "ClusterService": ("AddShard", "DrainShard", "SetReplicas", "Describe"),
    "IndexService": ("GetJob", "ListJobs", "CancelJob"),
}
#: How often a job that is watched is asked after, and how long the head may take to answer.
WATCH_S, JOB_S = 0.1, 10.0

HandOn = Callable[[str, str, str, bytes, Deadline], Awaitable[bytes]]


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


async def carry_out(
    servicers: Servicers, service: str, method: str, tenant: str, request: bytes, deadline: Deadline
) -> bytes:
    """What a call that was handed on answers here; NotImplementedHere where it is none of those."""
    answer = method_of(servicers, service, method) if method in HANDED_ON.get(service, ()) else None
    if answer is None:
        raise NotImplementedHere(f"{service}.{method}")
    message = message_factory.GetMessageClass(SERVICES[service].methods_by_name[method].input_type)
    answered = await answer(message.FromString(request), Call(tenant, deadline))
    return bytes(answered.SerializeToString())
