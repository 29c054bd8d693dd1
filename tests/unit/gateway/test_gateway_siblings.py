"""What the head tells further gateways, in which order, and whom a write waits for: each race by hand."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from memory_log import collection

from protos.ringfort.internal import v1 as internal
from services.deadline import Deadline
from services.gateway import news
from services.gateway.catalog import Catalog
from services.gateway.served import Served
from services.gateway.siblings import Siblings
from shard_router.model import HOME
from shard_router.resharding import Copy
from shard_router.shard_map import Migrating, ShardMap, Steady

LEASE_S = 10.0
#: So long a lease lasts by the head's clock, and a little more.
OVER_S = 11.0


class Replica:
    """A copy of which the test says how far it is."""

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self.fell = asyncio.Event()
        self.moved = asyncio.Event()
        self.woken = 0

    def move(self, position: int) -> None:
        self.position = position
        self.moved.set()

    def fall(self) -> None:
        self.fell.set()
        self.moved.set()

    def wake(self) -> None:
        self.woken += 1

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        while self.position < position and not self.fell.is_set():
            self.moved.clear()
            async with asyncio.timeout(deadline.left_s()):
                await self.moved.wait()
        return not self.fell.is_set()


class Head:
    """A head with collections, and a clock that stands unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.catalog = Catalog(cast("Any", None), cast("Any", None))
        self.catalog.log_id = "log-1"

    def begin(self) -> None:
        self.siblings = Siblings(
            self.catalog, self._nothing, self._nothing, clock=lambda: self.now_s, lease_s=LEASE_S
        )
        self.now_s += OVER_S  # whoever was granted a lease by a head before this one has none any more

    async def _nothing(self, *_: Any) -> Any:
        raise AssertionError("nobody asked for it")

    def serve(self, uid: int, *replicas: Replica) -> Served:
        one = replace(collection(), uid=uid, name=f"c{uid}", replicas=len(replicas))
        served = Served(one, Steady(ShardMap.create(16, 1)))
        served.logs[HOME].attach("log-1", 0)
        for number, replica in enumerate(replicas):
            served.join(Copy(0, number), cast("Any", replica))
        self.catalog._index(served)
        return served


class Gateway:
    """A further gateway, by hand."""

    def __init__(self, head: Head, name: str) -> None:
        self._head, self._name, self._beat = head, name, 0
        self._requests: asyncio.Queue[internal.FollowRequest] = asyncio.Queue()
        self.say()
        self._told = head.siblings.Follow(self._sent(), Deadline.after(60))

    async def _sent(self) -> AsyncIterator[internal.FollowRequest]:
        while True:
            yield await self._requests.get()

    def say(self, heard: int = 0, settled: int = 0, *, leaving: bool = False) -> None:
        self._beat += 1
        self._requests.put_nowait(
            internal.FollowRequest(
                gateway=self._name, beat=self._beat, heard=heard, settled=settled, leaving=leaving
            )
        )

    async def hear(self) -> internal.News:
        async with asyncio.timeout(10):
            return await anext(self._told)

    async def leave(self) -> None:
        await cast("Any", self._told).aclose()


@pytest.fixture
async def head() -> AsyncIterator[Head]:
    head = Head()
    head.begin()
    yield head
    await head.siblings.close()


def written(served: Served, position: int) -> None:
    """Every copy has all up to there."""
    for _, replica in served.copies():
        cast("Any", replica).move(position)


def visible(head: Head, served: Served, position: int, within_s: float = 20) -> "asyncio.Task[bool]":
    return asyncio.create_task(head.siblings.visible(served, {"log-1": position}, Deadline.after(within_s)))


async def still(task: "asyncio.Task[Any]") -> bool:
    """Whether it waits, after everything that could go on has."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


async def test_a_write_waits_for_every_gateway_with_a_lease(head: Head) -> None:
    served = head.serve(1, Replica(position=6))
    one, two = Gateway(head, "one"), Gateway(head, "two")
    for gateway in (one, two):
        gateway.say((await gateway.hear()).version)
    written(served, 7)
    writing = visible(head, served, 7)
    told = await one.hear()
    assert [dict(each.positions) for each in told.collections] == [{"log-1": 7}]
    assert not told.collections[0].HasField("shape")
    one.say(told.version)
    assert await still(writing)
    two.say((await two.hear()).version)
    assert await writing


async def test_a_gateway_whose_lease_is_over_is_not_waited_for(head: Head) -> None:
    served = head.serve(1, Replica(position=6))
    one, two = Gateway(head, "one"), Gateway(head, "two")
    for gateway in (one, two):
        gateway.say((await gateway.hear()).version)
    written(served, 7)
    writing = visible(head, served, 7)
    one.say((await one.hear()).version)
    assert await still(writing)
    head.now_s += OVER_S
    one.say(1)
    assert await writing
    # It comes back: what it is granted by tells of the write.
    two.say(1)
    told = await two.hear()
    assert dict(told.collections[0].positions) == {"log-1": 7}


async def test_a_gateway_that_says_nothing_is_not_waited_for_for_ever_however_much_is_written(
    head: Head,
) -> None:
    served = head.serve(1, Replica())
    one, two = Gateway(head, "one"), Gateway(head, "two")
    await one.hear()
    two.say((await two.hear()).version)
    written(served, 100)
    first = visible(head, served, 1)
    for position in range(2, 5):
        head.now_s += LEASE_S / 3
        writing = visible(head, served, position)
        await one.hear()  # it is told, and says nothing
        two.say((await two.hear()).version)
        assert await still(writing)
        writing.cancel()
    head.now_s += 1
    two.say(1)
    assert await first


async def test_what_was_visible_before_the_head_began_is_told_first(head: Head) -> None:
    """An answer that Redis kept from then is not exact, though nothing was written since."""
    head.serve(1, Replica(position=50))
    one = Gateway(head, "one")
    assert dict((await one.hear()).collections[0].positions) == {"log-1": 50}


async def test_a_lease_that_is_given_back_is_not_waited_for(head: Head) -> None:
    served = head.serve(1, Replica(position=6))
    one = Gateway(head, "one")
    await one.hear()
    written(served, 7)
    writing = visible(head, served, 7)
    assert await still(writing)
    one.say(leaving=True)
    assert await still(writing) is False
    assert await writing


async def test_a_head_that_begins_waits_for_the_leases_of_the_one_before() -> None:
    head = Head()
    head.begin()
    head.now_s -= OVER_S
    served = head.serve(1, Replica(position=7))
    assert not await head.siblings.visible(served, {"log-1": 7}, Deadline.after(0.2))
    head.now_s += OVER_S
    assert await head.siblings.visible(served, {"log-1": 7}, Deadline.after(0.2))
    await head.siblings.close()


async def test_a_write_waits_for_the_copies_before_anybody_is_asked(head: Head) -> None:
    replica = Replica(position=6)
    served = head.serve(1, replica)
    one = Gateway(head, "one")
    one.say((await one.hear()).version)
    writing = visible(head, served, 7)
    one.say((await one.hear()).version)
    assert await still(writing)
    replica.move(7)
    assert await writing


async def test_a_copy_that_falls_is_waited_for_by_whom_it_may_be_asked(head: Head) -> None:
    """The head counts it out at once, but another gateway may ask it until it has heard of that."""
    well, lagging = Replica(position=6), Replica(position=6)
    served = head.serve(1, well, lagging)
    one = Gateway(head, "one")
    first = await one.hear()
    assert len(first.collections[0].shape.copies) == 2
    one.say(first.version)
    well.move(7)
    writing = visible(head, served, 7)
    one.say((await one.hear()).version)
    lagging.fall()
    told = await one.hear()
    assert [copy.replica for copy in told.collections[0].shape.copies] == [0]
    assert await still(writing), "the copy may be asked by who has not heard"
    one.say(told.version)
    assert await writing


async def test_a_copy_that_is_opened_anew_has_another_number(head: Head) -> None:
    served = head.serve(1, Replica(), Replica())
    one = Gateway(head, "one")
    before = news.copies_of((await one.hear()).collections[0].shape)
    served.leave(Copy(0, 1))
    served.join(Copy(0, 1), cast("Any", Replica()))
    after = news.copies_of((await one.hear()).collections[0].shape)
    assert before[Copy(0, 0)] == after[Copy(0, 0)]
    assert before[Copy(0, 1)] != after[Copy(0, 1)]


async def test_a_copy_that_joins_while_a_write_is_waited_for_has_it(head: Head) -> None:
    """It is told where the log stands before anything is waited for."""
    served = head.serve(1, Replica(position=6))
    joining = Replica()
    served.logs[HOME].joining.add(cast("Any", joining))
    writing = visible(head, served, 7, within_s=1)
    await asyncio.sleep(0)
    assert served.positions == {"log-1": 7}
    assert joining.woken
    assert await still(writing)
    writing.cancel()


async def test_a_change_of_owners_is_told_before_it_is_gone_on(head: Head) -> None:
    served = head.serve(1, Replica())
    one = Gateway(head, "one")
    one.say((await one.hear()).version)
    state = served.state
    assert isinstance(state, Steady)
    served.state = state.migrate(lambda shard_map: shard_map.add_shard(1))
    telling = asyncio.create_task(head.catalog.spread())
    told = await one.hear()
    assert news.state_of(told.collections[0].shape) == served.state
    one.say(told.version)
    assert await still(telling), "it goes by it, and has not done yet what it asks for"
    one.say(told.version, told.version)
    await telling


@pytest.mark.parametrize("phase", ["steady", "migrating", "retiring"])
def test_every_state_of_a_map_crosses(phase: str) -> None:
    steady = Steady(ShardMap.create(16, 2))
    migrating = steady.migrate(lambda shard_map: shard_map.add_shard(2))
    assert isinstance(migrating, Migrating)
    state = {"steady": steady, "migrating": migrating, "retiring": migrating.cut_over()}[phase]
    served = Served(collection(), state)
    served.logs[HOME].attach("log-1", 0)
    shape = internal.Shape.FromString(news.shape_of(served, {Copy(1, 0): 5}).SerializeToString())
    assert news.state_of(shape) == state
    assert news.collection_of(shape) == served.collection
    assert news.copies_of(shape) == {Copy(1, 0): 5}


async def test_who_comes_is_told_everything_and_then_what_changes(head: Head) -> None:
    head.serve(1, Replica())
    one = Gateway(head, "one")
    first = await one.hear()
    assert first.whole
    head.serve(2, Replica())
    spreading = asyncio.create_task(head.catalog.spread())
    second = await one.hear()
    assert not second.whole
    assert [each.collection for each in second.collections] == [2]
    again = Gateway(head, "one")
    assert {each.collection for each in (await again.hear()).collections} == {1, 2}
    again.say(second.version, second.version)
    await spreading


async def test_a_collection_that_goes_makes_the_news_whole(head: Head) -> None:
    served = head.serve(1, Replica())
    head.serve(2, Replica())
    one = Gateway(head, "one")
    one.say((await one.hear()).version)
    head.catalog._unindex(served)
    spreading = asyncio.create_task(head.catalog.spread())
    told = await one.hear()
    assert told.whole
    assert [each.collection for each in told.collections] == [2]
    one.say(told.version, told.version)
    await spreading
    # A write of it that is still under way is visible nowhere.
    assert not await head.siblings.visible(served, {"log-1": 9}, Deadline.after(5))


async def test_positions_of_another_log_are_visible_nowhere(head: Head) -> None:
    head.serve(1, Replica(position=9))
    request = internal.VisibleRequest(collection=1, positions={"log-0": 3})
    assert not (await head.siblings.Visible(request, Deadline.after(5))).visible
    request = internal.VisibleRequest(collection=1, positions={"log-1": 3})
    assert (await head.siblings.Visible(request, Deadline.after(5))).visible


async def test_a_change_of_models_is_waited_for_until_it_is_learnt(head: Head) -> None:
    one = Gateway(head, "one")
    first = await one.hear()
    one.say(first.version, first.version)
    changing = asyncio.create_task(head.siblings.registry_changed())
    told = await one.hear()
    assert told.registry == first.registry + 1
    one.say(told.version, first.version)
    assert await still(changing)
    one.say(told.version, told.version)
    await changing
