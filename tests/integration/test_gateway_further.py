"""A head and a further gateway over real copies, a real database and real ports."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from google.protobuf.message import Message
from psycopg.conninfo import make_conninfo

from index_builder.segments.index_spec import DEFAULT_EFFORT
from protos.ringfort import v1 as pb
from protos.ringfort.internal.v1 import shard_node_pb2, siblings_pb2
from services.config import Limits
from services.deadline import Deadline
from services.gateway.catalog import Catalog
from services.gateway.comparison import Comparison
from services.gateway.directory import Directory
from services.gateway.fanout import FanOut
from services.gateway.following import Following
from services.gateway.handing import WatchedJobs, carry_out
from services.gateway.ingest import Ingest
from services.gateway.jobs import Jobs
from services.gateway.mirror import Mirror
from services.gateway.reindexer import Reindexer
from services.gateway.remote_shards import RemoteShards
from services.gateway.resharder import Resharder
from services.gateway.served import Served
from services.gateway.servicers import Call, IndexService
from services.gateway.siblings import Siblings
from services.metadata.ownership import BorrowedClaim
from services.metadata.store import Store
from services.peers import Port
from services.shard.local_shards import LocalShards
from services.shard.node import ShardNode
from shard_router.errors import NotFound, StorageUnavailable, Unavailable
from shard_router.model import HOME, Include, Metric

DIM, TOKEN = 4, "only-here"
#: Short, so that tests can wait for its end.
LEASE_S = 1.0
NODE = shard_node_pb2.DESCRIPTOR.services_by_name["ShardNode"]
SIBLINGS = siblings_pb2.DESCRIPTOR.services_by_name["Siblings"]


@pytest.fixture(params=[1, 2], ids=["one database", "two"])
def urls(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[dict[str, str]]:
    """The home and, the second time, another database by its side."""
    names = {name: f"further_{uuid4().hex}" for name in (HOME, "east")[: request.param]}
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for each in names.values():
            connection.execute(f"CREATE DATABASE {each}".encode())
        yield {name: make_conninfo(postgres_url, dbname=each) for name, each in names.items()}
        for each in names.values():
            connection.execute(f"DROP DATABASE {each} WITH (FORCE)".encode())


async def borrow(urls: dict[str, str], claims: dict[str, BorrowedClaim]) -> Store:
    """The store for who was told these claims."""
    partitions = {name: (url, claims[name]) for name, url in urls.items() if name != HOME}
    return await Store.borrow(urls[HOME], claims[HOME], partitions=partitions, pool_size=4)


def told_by(head: Store, claims: dict[str, BorrowedClaim]) -> dict[str, BorrowedClaim]:
    """The claims, as the head holds them now."""
    for name, claim in {HOME: head.claim, **head.claims}.items():
        claims.setdefault(name, BorrowedClaim()).tell(claim)
    return claims


class Node:
    """A process that holds copies, but for being one."""

    def __init__(self, name: str, directory: Path, urls: dict[str, str], head: Store) -> None:
        self.name, self._directory, self._urls, self._head = name, directory, urls, head
        self.address = ""

    async def start(self) -> None:
        self._stack = AsyncExitStack()
        store = await borrow(self._urls, told_by(self._head, {}))
        self._stack.push_async_callback(store.close)
        threads = self._stack.enter_context(ThreadPoolExecutor(1))
        shards = LocalShards(
            self._directory / self.name, store.follow, search_threads=threads, memtable_rows=64,
            graph_rows=50_000, poll_ms=50, device="cpu",
        )  # fmt: skip
        node = ShardNode(shards)
        self._stack.push_async_callback(node.close)
        port = Port({NODE: node}, TOKEN)
        self._stack.push_async_callback(port.stop, 0)
        self._stack.callback(node.leave)
        self.address = await port.start()

    async def stop(self) -> None:
        await self._stack.aclose()


class House:
    """A head with its gateway, two nodes, and a further gateway `mirror`."""

    def __init__(self, urls: dict[str, str], directory: Path) -> None:
        self._urls, self._directory = urls, directory
        self.stack = AsyncExitStack()
        self.learnt = 0
        #: What the further gateway's clock is ahead of the head's.
        self.ahead_s = 0.0

    async def start(self) -> None:
        partitions = {name: url for name, url in self._urls.items() if name != HOME}
        self.store = await Store.open(self._urls[HOME], partitions=partitions)
        self.stack.push_async_callback(self.store.close)
        self.nodes = [Node(f"node-{i}", self._directory, self._urls, self.store) for i in range(2)]
        for node in self.nodes:
            await node.start()
            self.stack.push_async_callback(node.stop)
        self.shards = self._connected()
        self.catalog = Catalog(self.store, self.shards)
        await self.catalog.load()
        self.stack.push_async_callback(self.catalog.close)
        self.jobs = Jobs(self.catalog)
        self.resharder = Resharder(self.catalog, self.jobs)
        models = cast("Any", None)  # nothing is embedded
        comparison = Comparison(self.store, models, FanOut(random.Random()))
        self.reindexer = Reindexer(self.catalog, self.jobs, models, comparison)
        self.stack.push_async_callback(self.reindexer.close)
        self.stack.push_async_callback(self.jobs.close)
        self.siblings = Siblings(
            self.catalog, self._carry_out, self._load, clock=time.monotonic, lease_s=LEASE_S
        )
        self.stack.push_async_callback(self.siblings.close)
        await self.reindexer.open()
        await self.jobs.open()
        self.address = "127.0.0.1:0"
        await self.speak()
        self.stack.push_async_callback(self.silence)
        self.ingest = Ingest(self.catalog, cast("Any", None), Limits(), self.siblings.visible)
        self.stack.push_async_callback(self.ingest.close)
        await self.join()

    async def speak(self) -> None:
        """Let the head be heard."""
        self._port = Port({SIBLINGS: self.siblings}, TOKEN)
        self.address = await self._port.start(self.address)

    async def silence(self) -> None:
        """Let the head not be heard any more, by anybody but its own gateway."""
        await self._port.stop(0)

    async def join(self) -> None:
        """A further gateway; one that was there before is not this one."""
        self.claims = told_by(self.store, {})
        borrowed = await borrow(self._urls, self.claims)
        self.stack.push_async_callback(borrowed.close)
        self.following = Following(
            self.address, TOKEN, borrowed, clock=lambda: time.monotonic() + self.ahead_s, lease_s=LEASE_S
        )
        self.mirror_shards = self._connected()
        self.mirror = Mirror(borrowed, self.mirror_shards, self.following.assure)
        self.stack.push_async_callback(self.mirror.close)
        self.stack.push_async_callback(self.following.close)
        self.following.begin(self.mirror, self._learn)
        await self.following.ready(Deadline.after(30))
        self.mirror_ingest = Ingest(self.mirror, cast("Any", None), Limits(), self.following.visible)
        self.stack.push_async_callback(self.mirror_ingest.close)

    def _connected(self) -> RemoteShards:
        shards = RemoteShards([node.name for node in self.nodes], TOKEN)
        for node in self.nodes:
            shards.move(node.name, node.address)
        self.stack.push_async_callback(shards.close)
        return shards

    async def _learn(self) -> None:
        self.learnt += 1

    async def _load(self, model: str, deadline: Deadline) -> None:
        raise NotFound("model", model)

    async def _carry_out(
        self, service: str, method: str, tenant: str, request: bytes, deadline: Deadline
    ) -> bytes:
        servicers = {"IndexService": (IndexService(self.catalog, self.jobs, self.reindexer),)}
        return await carry_out(servicers, service, method, tenant, request, deadline)

    async def create(self, name: str, *, replicas: int = 1) -> Served:
        return await self.catalog.create(
            tenant="default", name=name, dim=DIM, metric=Metric.COSINE, schema={}, model=None, slots=8,
            shards=2, replicas=replicas, index="auto", max_staleness_ms=0, space=f"vectors:{DIM}",
        )  # fmt: skip


@pytest.fixture
async def house(urls: dict[str, str], tmp_path: Path) -> AsyncIterator[House]:
    house = House(urls, tmp_path)
    async with house.stack:
        await house.start()
        yield house


def request(*ids: str, wait: "pb.Wait.ValueType" = pb.VISIBLE) -> pb.UpsertRequest:
    vectors = np.ones((len(ids), DIM), np.float32)
    return pb.UpsertRequest(
        collection="notes",
        documents=[pb.Document(id=id) for id in ids],
        vectors=pb.Matrix(data=vectors.tobytes(), rows=len(ids), dim=DIM),
        wait=wait,
    )


async def found(served: Served, within_s: float = 20) -> set[str]:
    answer = await FanOut(random.Random(1)).search(
        served, np.ones((1, DIM), np.float32), 100, filter=None, exact=True, effort=DEFAULT_EFFORT,
        include=Include(), min_coverage=1.0, deadline=Deadline.after(within_s),
    )  # fmt: skip
    return {hit.id for hit in answer.hits[0]}


async def until(condition: Callable[[], bool], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_is_created_at_the_head_is_written_and_found_anywhere_at_once(house: House) -> None:
    served = await house.create("notes")
    mirrored = house.mirror.resolve("default", "notes")
    assert mirrored.collection == served.collection
    written = await house.mirror_ingest.upsert(request("a", "b"), "default", Deadline.after(20))
    assert written.visible
    assert await found(served) == await found(mirrored) == {"a", "b"}
    assert house.following.known(mirrored) == served.positions
    written = await house.ingest.upsert(request("c"), "default", Deadline.after(20))
    assert written.visible
    assert await found(mirrored) == {"a", "b", "c"}
    assert house.following.known(mirrored) == served.positions


async def test_what_was_there_before_is_there_for_who_comes(house: House) -> None:
    await house.create("notes")
    await house.ingest.upsert(request("a"), "default", Deadline.after(20))
    await house.following.close()
    await house.join()
    assert await found(house.mirror.resolve("default", "notes")) == {"a"}
    assert house.learnt >= 2


async def test_aliases_and_collections_go_everywhere(house: House) -> None:
    served = await house.create("notes")
    await house.catalog.set_alias("default", "memos", "notes")
    assert house.mirror.resolve("default", "memos") is house.mirror.resolve("default", "notes")
    await house.catalog.set_alias("default", "memos", None)
    with pytest.raises(NotFound):
        house.mirror.resolve("default", "memos")
    await house.catalog.delete("default", "notes")
    assert house.mirror.of(served.collection.uid) is None
    again = await house.create("notes")
    assert house.mirror.resolve("default", "notes").collection.uid == again.collection.uid


async def test_who_was_stopped_for_longer_than_its_lease_takes_nothing_for_exact(house: House) -> None:
    await house.create("notes")
    mirrored = house.mirror.resolve("default", "notes")
    assert house.following.known(mirrored) is not None
    house.ahead_s = 2 * LEASE_S
    assert house.following.known(mirrored) is None
    await until(lambda: house.following.known(mirrored) is not None)


async def test_who_does_not_hear_the_head_searches_and_delays_a_write_by_no_more_than_its_lease(
    house: House,
) -> None:
    served = await house.create("notes")
    mirrored = house.mirror.resolve("default", "notes")
    await house.silence()
    written = await house.ingest.upsert(request("a"), "default", Deadline.after(20))
    assert written.visible
    assert house.following.known(mirrored) is None
    assert await found(mirrored) == await found(served) == {"a"}
    await house.speak()
    await until(lambda: house.following.known(mirrored) == served.positions)


async def test_who_has_no_lease_reads_where_the_log_stands_before_it_searches(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.create("notes")
    mirrored = house.mirror.resolve("default", "notes")
    await house.silence()
    await until(lambda: not house.following.leased)
    written = await house.mirror_ingest.upsert(request("a", wait=pb.DURABLE), "default", Deadline.after(20))
    assert written.token.positions
    assert await found(mirrored) == {"a"}

    async def away(*_: object) -> dict[str, int]:
        raise StorageUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(house.mirror.store, "positions", away)
        with pytest.raises(StorageUnavailable):
            await found(mirrored)
        await house.speak()
        await until(lambda: house.following.leased)
        assert await found(mirrored) == {"a"}


async def test_a_write_while_the_head_is_away_is_committed_and_not_called_visible(house: House) -> None:
    served = await house.create("notes")
    await house.silence()
    written = await house.mirror_ingest.upsert(request("a"), "default", Deadline.after(1.5))
    assert [each.code for each in written.statuses] == [0]
    assert not written.visible
    await house.speak()
    written = await house.mirror_ingest.upsert(request("b"), "default", Deadline.after(20))
    assert written.visible
    assert await found(served) == {"a", "b"}


async def test_a_write_by_a_claim_that_is_no_longer_held_is_refused_until_the_new_one_is_told(
    house: House,
) -> None:
    await house.create("notes")
    former = {name: claim.claim for name, claim in house.claims.items()}
    for each in house.store._all.values():
        each.ownership.doubt("the test says so")  # it is taken again, and is another one then
    await until(lambda: not {HOME: house.store.claim, **house.store.claims}.items() & former.items())
    with pytest.raises(StorageUnavailable):
        await house.mirror_ingest.upsert(request("a"), "default", Deadline.after(5))
    told_by(house.store, house.claims)
    written = await house.mirror_ingest.upsert(request("a"), "default", Deadline.after(20))
    assert written.visible


async def test_a_copy_that_falls_and_comes_back_is_asked_again_everywhere(house: House) -> None:
    served = await house.create("notes", replicas=2)
    await house.ingest.upsert(request("a"), "default", Deadline.after(20))
    mirrored = house.mirror.resolve("default", "notes")
    assert sum(1 for _ in mirrored.copies()) == 4 * len(mirrored.logs)
    node = house.nodes[0]
    await node.stop()
    for shards in (house.shards, house.mirror_shards):
        shards.move(node.name, "")
    written = await house.mirror_ingest.upsert(request("b"), "default", Deadline.after(20))
    assert written.visible
    assert await found(mirrored) == {"a", "b"}
    await node.start()
    for shards in (house.shards, house.mirror_shards):
        shards.move(node.name, node.address)
    house.catalog.hurry()
    await until(
        lambda: sum(not each.fell.is_set() for _, each in mirrored.copies()) == 4 * len(mirrored.logs), 40
    )
    written = await house.ingest.upsert(request("c"), "default", Deadline.after(20))
    assert written.visible
    for _ in range(8):
        assert await found(mirrored) == await found(served) == {"a", "b", "c"}


async def test_shards_are_added_while_both_read_and_write(house: House) -> None:
    served = await house.create("notes")
    mirrored = house.mirror.resolve("default", "notes")
    written: set[str] = set()
    over = asyncio.Event()

    async def write(ingest: Ingest, prefix: str) -> None:
        number = 0
        while not over.is_set():
            id = f"{prefix}{number}"
            told = await ingest.upsert(request(id), "default", Deadline.after(20))
            assert told.visible
            written.add(id)
            number += 1
            if number >= 40:
                await asyncio.sleep(0.02)

    async def read(of: Served) -> None:
        while not over.is_set():
            before = set(written)
            assert before <= await found(of)

    busy = [
        asyncio.create_task(each)
        for each in (write(house.ingest, "h"), write(house.mirror_ingest, "m"), read(served), read(mirrored))
    ]
    hand_on = house.following.hand_on
    listed = await hand_on("IndexService", "ListJobs", "default", b"", Deadline.after(20))
    assert not pb.ListJobsResponse.FromString(listed).jobs
    begun = await house.resharder.add_shard(served)
    told = [
        each
        async for each in WatchedJobs(hand_on).WatchJob(
            pb.WatchJobRequest(id=begun.record.id), Call("default", Deadline.after(60))
        )
    ]
    over.set()
    await asyncio.gather(*busy)
    assert told[-1].state == pb.Job.SUCCEEDED
    assert mirrored.state == served.state
    assert served.shard_map.shards == (0, 1, 2)
    assert await found(mirrored) == written


async def test_generations_are_exchanged_everywhere_under_writes_and_reads(house: House) -> None:
    await house.create("notes")
    written: set[str] = set()
    over = asyncio.Event()

    async def write(ingest: Ingest, prefix: str) -> None:
        number = 0
        while not over.is_set():
            id = f"{prefix}{number % 40}"
            told = await ingest.upsert(request(id), "default", Deadline.after(20))
            assert not told.statuses[0].code, told.statuses[0]
            assert told.visible
            written.add(id)
            number += 1

    async def read(directory: Directory) -> None:
        while not over.is_set():
            before = set(written)
            assert before <= await found(directory.resolve("default", "notes"))

    async def asked(method: str, message: Message) -> bytes:
        return await house.following.hand_on(
            "IndexService", method, "default", message.SerializeToString(), Deadline.after(60)
        )

    def generations() -> tuple[int, int]:
        head, mirrored = (each.resolve("default", "notes") for each in (house.catalog, house.mirror))
        return head.collection.generation, mirrored.collection.generation

    busy = [
        asyncio.create_task(each)
        for each in (
            write(house.ingest, "h"), write(house.mirror_ingest, "m"), read(house.catalog), read(house.mirror)
        )
    ]  # fmt: skip
    try:
        wanted = pb.ReindexRequest(collection="notes", index=pb.IndexSpec(kind="flat"))
        begun = pb.Job.FromString(await asked("Reindex", wanted))
        watched = WatchedJobs(house.following.hand_on).WatchJob(
            pb.WatchJobRequest(id=begun.id), Call("default", Deadline.after(60))
        )
        told = [job async for job in watched]
        assert (told[-1].state, told[-1].generation) == (pb.Job.SUCCEEDED, 2), told[-1]
        live = pb.ActivateResponse.FromString(await asked("Activate", pb.ActivateRequest(collection="notes")))
        assert (live.generation, generations()) == (2, (2, 2))
        back = pb.ActivateResponse.FromString(await asked("Rollback", pb.RollbackRequest(collection="notes")))
        assert (back.generation, generations()) == (1, (1, 1))
    finally:
        over.set()
        await asyncio.gather(*busy)
    assert await found(house.mirror.resolve("default", "notes")) == written
    assert await found(house.catalog.resolve("default", "notes")) == written
    await house.catalog.delete("default", "notes")
    assert not house.mirror.all()


async def test_a_head_that_is_away_hands_on_nothing(house: House) -> None:
    await house.silence()
    with pytest.raises(Unavailable, match="the head is away"):
        await house.following.hand_on("IndexService", "ListJobs", "default", b"", Deadline.after(5))
