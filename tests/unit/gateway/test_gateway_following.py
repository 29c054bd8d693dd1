"""What a further gateway goes by, and how long: the head is a script, the copies are made of positions."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from memory_log import collection

from protos.ringfort.internal import v1 as internal
from protos.ringfort.internal.v1 import siblings_pb2
from services.deadline import Deadline
from services.gateway import news
from services.gateway.following import Following
from services.gateway.mirror import Mirror
from services.gateway.served import Served
from services.peers import Port
from shard_router.errors import NotFound, StorageUnavailable, Unavailable
from shard_router.model import HOME
from shard_router.resharding import Copy
from shard_router.shard_map import ShardMap, Steady

LEASE_S = 10.0
SERVICE = siblings_pb2.DESCRIPTOR.services_by_name["Siblings"]


class Replica:
    """A copy that has all up to a position."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.fell = asyncio.Event()
        self.closed = False
        #: Happens while it is waited for.
        self.meanwhile: Callable[[], None] = lambda: None

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return self.position >= position

    def wake(self) -> None: ...

    async def close(self) -> None:
        self.closed = True


class Nodes:
    """Where copies are attached to."""

    def __init__(self) -> None:
        self.position = 0
        self.attached: list[Replica] = []
        #: Attaching fails so often before it works.
        self.failures = 0
        #: Happens while a copy that was attached is waited for.
        self.meanwhile: Callable[[], None] = lambda: None

    async def attach(self, *_: object) -> Replica:
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        self.attached.append(Replica(self.position))
        self.attached[-1].meanwhile = self.meanwhile
        return self.attached[-1]


class Script:
    """The head: hears beats, and says what the test says."""

    def __init__(self) -> None:
        self.beats: asyncio.Queue[internal.FollowRequest] = asyncio.Queue()
        self.news: asyncio.Queue[internal.News | None] = asyncio.Queue()
        self.asked: list[dict[str, int]] = []
        self.refusals: list[Exception] = []

    async def Follow(
        self, requests: AsyncIterator[internal.FollowRequest], deadline: Deadline
    ) -> AsyncIterator[internal.News]:
        async def hear() -> None:
            async for request in requests:
                self.beats.put_nowait(request)
                if request.leaving:
                    self.news.put_nowait(None)

        hearing = asyncio.ensure_future(hear())
        try:
            while (told := await self.news.get()) is not None:
                yield told
        finally:
            hearing.cancel()

    async def Visible(self, request: internal.VisibleRequest, deadline: Deadline) -> internal.VisibleResponse:
        self.asked.append(dict(request.positions))
        if self.refusals:
            raise self.refusals.pop()
        return internal.VisibleResponse(visible=True)

    async def HandOn(self, request: internal.HandOnRequest, deadline: Deadline) -> internal.HandOnResponse:
        raise NotFound("collection", request.tenant)

    async def Load(self, request: internal.LoadRequest, deadline: Deadline) -> internal.LoadResponse:
        return internal.LoadResponse()

    async def beat(self, version: int = 0) -> internal.FollowRequest:
        """The next beat that says it goes by a version."""
        async with asyncio.timeout(20):
            while (beat := await self.beats.get()).heard < version:
                pass
            return beat


class Database:
    """Where the log stands, by the database."""

    log_id = "log-1"

    def __init__(self) -> None:
        self.counter: int | Exception = 0

    async def positions(self, _: object) -> dict[str, int]:
        if isinstance(self.counter, Exception):
            raise self.counter
        return {HOME: self.counter}


class Gateway:
    """A further gateway of that head, by a clock that stands."""

    def __init__(self, address: str) -> None:
        self.now_s, self.nodes, self.database = 1_000.0, Nodes(), Database()
        store = cast("Any", self.database)
        self.following = Following(address, "token", store, clock=lambda: self.now_s, lease_s=LEASE_S)
        self.mirror = Mirror(store, cast("Any", self.nodes), self.following.assure)
        self.learnt = 0

    async def learn(self) -> None:
        self.learnt += 1


@pytest.fixture
async def script() -> Script:
    return Script()


@pytest.fixture
async def gateway(script: Script) -> AsyncIterator[Gateway]:
    port = Port({SERVICE: script}, "token")
    gateway = Gateway(await port.start())
    gateway.following.begin(gateway.mirror, gateway.learn)
    yield gateway
    await gateway.following.close()
    await gateway.mirror.close()
    await port.stop(0)


def told(
    version: int, beat: int, *served: tuple[Served, int, int], whole: bool = False, registry: int = 0
) -> internal.News:
    """News of collections, each with a position and the number that its one copy was opened by."""
    return internal.News(
        version=version, beat=beat, log_id="log-1", whole=whole, registry=registry,
        collections=[
            internal.CollectionNews(
                collection=each.collection.uid,
                positions={each.logs[HOME].log_id: position},
                shape=news.shape_of(each, {Copy(0, 0): opened} if opened else {}),
            )
            for each, position, opened in served
        ],
    )  # fmt: skip


def things(uid: int = 1, log_id: str = "log-1") -> Served:
    served = Served(replace(collection(), uid=uid, name=f"c{uid}"), Steady(ShardMap.create(16, 1)))
    served.logs[HOME].attach(log_id, 0)
    return served


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_a_lease_counts_from_when_the_beat_was_sent(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    gateway.now_s += 4
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await script.beat(1)
    served = gateway.mirror.resolve("default", "c1")
    gateway.now_s += LEASE_S - 4.1
    assert gateway.following.known(served) == {"log-1": 5}
    gateway.now_s += 0.1
    assert gateway.following.known(served) is None


async def test_news_without_a_new_beat_prolong_nothing(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await script.beat(1)
    gateway.now_s += LEASE_S
    await script.news.put(told(2, beat.beat, (things(), 6, 1)))
    await script.beat(2)
    assert not gateway.following.leased
    assert gateway.following.known(gateway.mirror.resolve("default", "c1")) is None


async def test_what_is_not_named_in_news_is_renewed_as_it_was(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(1), 5, 1), (things(2), 7, 2), whole=True))
    gateway.now_s += LEASE_S / 2
    beat = await script.beat(1)
    await script.news.put(told(2, beat.beat, (things(1), 6, 1)))
    await script.beat(2)
    gateway.now_s += LEASE_S - 1
    assert gateway.following.known(gateway.mirror.resolve("default", "c2")) == {"log-1": 7}


async def test_what_a_copy_has_read_counts_as_known_too(script: Script, gateway: Gateway) -> None:
    gateway.nodes.position = 9
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await gateway.following.ready(Deadline.after(20))
    assert gateway.following.known(gateway.mirror.resolve("default", "c1")) == {"log-1": 9}


async def test_a_copy_that_left_is_not_asked_before_that_is_confirmed(
    script: Script, gateway: Gateway
) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await gateway.following.ready(Deadline.after(20))
    served = gateway.mirror.resolve("default", "c1")
    assert dict(served.copies())
    await script.news.put(told(2, beat.beat, (things(), 5, 0)))
    await script.beat(2)
    assert not dict(served.copies())
    await until(lambda: gateway.nodes.attached[0].closed)


async def test_a_copy_that_was_opened_anew_is_another_one(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await gateway.following.ready(Deadline.after(20))
    await script.news.put(told(2, beat.beat, (things(), 5, 2)))
    await until(lambda: len(gateway.nodes.attached) == 2)
    served = gateway.mirror.resolve("default", "c1")
    await until(lambda: dict(served.copies()) == {Copy(0, 0): gateway.nodes.attached[1]})
    assert gateway.nodes.attached[0].closed


async def test_a_copy_that_fell_here_alone_is_reached_again(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await gateway.following.ready(Deadline.after(20))
    gateway.nodes.failures = 2
    gateway.nodes.attached[0].fell.set()
    await until(lambda: len(gateway.nodes.attached) == 2)


async def test_a_copy_that_is_behind_what_was_committed_here_is_not_asked(
    script: Script, gateway: Gateway
) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 0), whole=True))
    await gateway.following.ready(Deadline.after(20))
    served = gateway.mirror.resolve("default", "c1")
    served.logs[HOME].committed(6, None)
    gateway.nodes.position = 5
    await script.news.put(told(2, beat.beat, (things(), 5, 1)))
    await until(lambda: bool(gateway.nodes.attached) and gateway.nodes.attached[0].closed)
    assert not dict(served.copies())
    gateway.nodes.position = 6
    await until(lambda: bool(dict(served.copies())))


async def test_a_copy_is_not_asked_that_lacks_what_was_committed_while_it_was_waited_for(
    script: Script, gateway: Gateway
) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 0), whole=True))
    await gateway.following.ready(Deadline.after(20))
    served = gateway.mirror.resolve("default", "c1")
    gateway.nodes.position = 5
    gateway.nodes.meanwhile = lambda: served.committed(6, None)
    await script.news.put(told(2, beat.beat, (things(), 5, 1)))
    await until(lambda: bool(gateway.nodes.attached) and gateway.nodes.attached[0].closed)
    assert not dict(served.copies())


async def test_another_log_makes_another_collection_of_it(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await gateway.following.ready(Deadline.after(20))
    former = gateway.mirror.resolve("default", "c1")
    dropped: list[Served] = []

    async def drop(served: Served) -> None:
        dropped.append(served)

    gateway.mirror.on_drop.append(drop)
    beat = await script.beat()
    await script.news.put(told(2, beat.beat, (things(log_id="log-2"), 2, 2)))
    await script.beat(2)
    assert gateway.following.known(former) is None
    latter = gateway.mirror.resolve("default", "c1")
    assert latter is not former
    assert gateway.following.known(latter) == {"log-2": 2}
    await until(lambda: dropped == [former])


async def test_what_is_gone_is_gone_in_whole_news(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(1), 5, 1), (things(2), 7, 2), whole=True))
    await script.beat(1)
    await script.news.put(told(2, beat.beat, (things(2), 7, 2), whole=True))
    await script.beat(2)
    with pytest.raises(NotFound):
        gateway.mirror.resolve("default", "c1")
    assert gateway.mirror.resolve("default", "c2")


async def test_the_registry_is_learnt_before_it_is_said_to_be(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, whole=True))
    await gateway.following.ready(Deadline.after(20))
    learnt = gateway.learnt
    await script.news.put(told(2, beat.beat, registry=1))
    while (beat := await script.beat(2)).settled < 2:
        pass
    assert gateway.learnt == learnt + 1


async def test_a_head_that_ends_the_call_is_followed_again(script: Script, gateway: Gateway) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await script.beat(1)
    await script.news.put(None)
    while not script.beats.empty():
        script.beats.get_nowait()
    again = await script.beat()
    assert again.gateway == beat.gateway
    assert again.beat > beat.beat
    await script.news.put(told(2, again.beat, (things(), 6, 1), whole=True))
    await script.beat(2)


async def test_who_leaves_gives_the_lease_back_and_relies_on_nothing(
    script: Script, gateway: Gateway
) -> None:
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await script.beat(1)
    closing = asyncio.create_task(gateway.following.close())
    async with asyncio.timeout(20):
        while not (await script.beats.get()).leaving:
            pass
    assert not gateway.following.leased
    await closing


async def test_without_a_lease_the_copies_have_to_have_what_the_database_has(
    script: Script, gateway: Gateway
) -> None:
    gateway.nodes.position = 5
    beat = await script.beat()
    await script.news.put(told(1, beat.beat, (things(), 5, 1), whole=True))
    await gateway.following.ready(Deadline.after(20))
    served = gateway.mirror.resolve("default", "c1")
    assert served.assure is not None
    gateway.database.counter = StorageUnavailable("away")
    await served.assure(Deadline.after(1))  # nobody asks it while the lease lasts
    gateway.now_s += LEASE_S
    with pytest.raises(StorageUnavailable):
        await served.assure(Deadline.after(1))
    gateway.database.counter = 6
    with pytest.raises(Unavailable):
        await served.assure(Deadline.after(1))
    gateway.nodes.attached[0].position = 6
    await served.assure(Deadline.after(1))


async def test_whether_a_write_is_visible_is_asked_until_somebody_says(
    script: Script, gateway: Gateway
) -> None:
    script.refusals = [Unavailable("busy"), Unavailable("busy")]
    assert await gateway.following.visible(things(), {"log-1": 7}, Deadline.after(20))
    assert script.asked == 3 * [{"log-1": 7}]
    script.refusals = 1_000 * [Unavailable("busy")]
    assert not await gateway.following.visible(things(), {"log-1": 8}, Deadline.after(0.3))


async def test_what_the_head_refuses_is_refused_as_it_said(script: Script, gateway: Gateway) -> None:
    with pytest.raises(NotFound) as refused:
        await gateway.following.hand_on("CollectionService", "Create", "me", b"", Deadline.after(20))
    assert (refused.value.kind, refused.value.name) == ("collection", "me")
