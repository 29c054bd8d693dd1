"""Calls that the head alone carries out: which they are, and that they arrive as they were made."""

import pytest

from protos.ringfort import v1 as pb
from services.deadline import Deadline
from services.gateway.handing import (
    HANDED_ON,
    OVER_ALL,
    HandedOn,
    OfTheHead,
    OverGateways,
    WatchedJobs,
    carry_out,
)
from services.gateway.server import SERVICES, method_of
from services.gateway.servicers import Call
from shard_router.errors import DeadlineExceeded, NotFound, NotImplementedHere, Unavailable


class Collections:
    """The head's servicer."""

    async def Delete(self, request: pb.DeleteCollectionRequest, call: Call) -> pb.DeleteCollectionResponse:
        raise NotFound("collection", f"{call.tenant}/{request.name}")

    async def List(self, request: pb.ListCollectionsRequest, call: Call) -> pb.ListCollectionsResponse:
        return pb.ListCollectionsResponse()


class Jobs:
    """A job that goes on with every look at it."""

    def __init__(self, *states: "pb.Job.State.ValueType") -> None:
        self.states = list(states)

    async def GetJob(self, request: pb.GetJobRequest, call: Call) -> pb.Job:
        return pb.Job(id=request.id, state=self.states.pop(0), collection=call.tenant)


def head(service: str, servicer: object):
    async def hand_on(to: str, method: str, tenant: str, request: bytes, deadline: Deadline) -> bytes:
        return await carry_out({service: (servicer,)}, to, method, tenant, request, deadline)

    return hand_on


def call(within_s: float = 20) -> Call:
    return Call("me", Deadline.after(within_s))


@pytest.mark.parametrize("service", HANDED_ON)
def test_what_is_handed_on_is_of_the_contract(service: str) -> None:
    for method in HANDED_ON[service]:
        assert method in SERVICES[service].methods_by_name


async def test_a_call_arrives_with_its_tenant_and_its_error_comes_back() -> None:
    handed = HandedOn("CollectionService", head("CollectionService", Collections()))
    with pytest.raises(NotFound) as refused:
        await handed.Delete(pb.DeleteCollectionRequest(name="notes"), call())
    assert refused.value.name == "me/notes"


async def test_nothing_else_is_handed_on_or_carried_out() -> None:
    hand_on = head("CollectionService", Collections())
    assert not hasattr(HandedOn("CollectionService", hand_on), "List")
    for method in ("List", "Nothing", "__init__"):
        with pytest.raises(NotImplementedHere):
            await hand_on("CollectionService", method, "me", b"", Deadline.after(20))
    with pytest.raises(NotImplementedHere):
        await hand_on("DocumentService", "Upsert", "me", b"", Deadline.after(20))


async def test_the_first_servicer_that_has_a_method_answers_it() -> None:
    collections, jobs = Collections(), Jobs()
    servicers = {"CollectionService": (HandedOn("CollectionService", head("", None)), collections)}
    assert method_of(servicers, "CollectionService", "List") == collections.List
    assert method_of(servicers, "CollectionService", "Delete") != collections.Delete
    assert method_of({"IndexService": (jobs,)}, "IndexService", "ListJobs") is None
    assert method_of({}, "IndexService", "ListJobs") is None


async def test_a_job_is_watched_until_it_has_ended() -> None:
    states = (pb.Job.RUNNING, pb.Job.RUNNING, pb.Job.SUCCEEDED)
    watched = WatchedJobs(head("IndexService", Jobs(*states)))
    told = [job async for job in watched.WatchJob(pb.WatchJobRequest(id="j"), call())]
    # What has not changed is not told again.
    assert [job.state for job in told] == [pb.Job.RUNNING, pb.Job.SUCCEEDED]
    assert {(job.id, job.collection) for job in told} == {("j", "me")}


async def test_a_watch_ends_at_its_deadline() -> None:
    watched = WatchedJobs(head("IndexService", Jobs(*[pb.Job.RUNNING] * 100)))
    with pytest.raises(DeadlineExceeded):
        async for _ in watched.WatchJob(pb.WatchJobRequest(id="j"), call(0.3)):
            pass


class Caches:
    """What one gateway's cache has done."""

    def __init__(self, hits: int, entries: int, state: str = "up") -> None:
        self._tier = {"hits": hits, "misses": 1, "entries": entries, "bytes": 10 * entries, "state": state}

    async def CacheStats(self, request: pb.CacheStatsRequest, call: Call) -> pb.CacheStatsResponse:
        tiers = [pb.TierStats(name=name, **self._tier) for name in ("L1", "REDIS")]
        return pb.CacheStatsResponse(tiers=tiers, superseded=2, stampedes_avoided=3, gateways=2)

    async def WarmCache(self, request: pb.WarmCacheRequest, call: Call) -> pb.WarmCacheResponse:
        return pb.WarmCacheResponse(known=3, computed=2, failed=1)


def together(own: Caches, *others: Caches) -> OverGateways:
    async def ask(service: str, method: str, tenant: str, request: bytes, deadline: Deadline) -> list[bytes]:
        servicers = [{"ClusterService": (other,)} for other in others]
        return [
            await carry_out(each, service, method, tenant, request, deadline, OVER_ALL) for each in servicers
        ]

    return OverGateways(own, ask)  # type: ignore[arg-type]


async def test_caches_of_all_gateways_are_counted_as_one() -> None:
    told = await together(Caches(5, 4), Caches(7, 3)).CacheStats(pb.CacheStatsRequest(), call())
    first, second = told.tiers
    assert (first.hits, first.misses, first.entries, first.bytes, first.state) == (12, 2, 7, 70, "up")
    # The second tier is one server, of which each tells the same.
    assert (second.hits, second.misses, second.entries, second.bytes) == (12, 2, 4, 40)
    assert (told.superseded, told.stampedes_avoided, told.gateways) == (4, 6, 2)


async def test_a_tier_that_some_cannot_reach_is_there_partly() -> None:
    told = await together(Caches(1, 1), Caches(1, 1, "down")).CacheStats(pb.CacheStatsRequest(), call())
    assert {tier.state for tier in told.tiers} == {"partly"}


async def test_all_gateways_warm_what_they_were_asked() -> None:
    told = await together(Caches(0, 0), Caches(0, 0)).WarmCache(pb.WarmCacheRequest(), call())
    assert (told.known, told.computed, told.failed, told.left) == (6, 4, 2, 0)


async def test_a_gateway_answers_for_itself_while_the_head_is_away() -> None:
    async def away(*_: object) -> bytes:
        raise Unavailable("the head is away")

    told = await OfTheHead(Caches(5, 4), away).CacheStats(pb.CacheStatsRequest(), call())  # type: ignore[arg-type]
    assert told.tiers[0].hits == 5
