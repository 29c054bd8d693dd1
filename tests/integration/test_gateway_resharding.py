"""Shards and replicas come and go under a mixed load: nothing is lost, missed or resurrected."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from index_builder.segments.index_spec import DEFAULT_EFFORT
from protos.ringfort import v1 as pb
from services import tasks
from services.config import Limits
from services.deadline import Deadline
from services.gateway.catalog import Catalog, Served
from services.gateway.fanout import FanOut
from services.gateway.ingest import Ingest
from services.gateway.jobs import Job, Jobs
from services.gateway.resharder import Resharder, _Change
from services.metadata.jobs import JobState
from services.metadata.store import Store
from services.shard.local_shards import LocalShards
from services.shard.replica import Replica
from shard_router.errors import NotFound, PreconditionFailed
from shard_router.model import HOME, Include, Metric
from shard_router.resharding import Event, Instruction
from shard_router.shard_map import Migrating, Retiring, Steady

DIM, SLOTS = 8, 16
#: Whatever the load of the machine.
PATIENCE_S = 60.0


@pytest.fixture(params=[1, 2], ids=["one database", "two"])
def urls(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[dict[str, str]]:
    """The home and, the second time, another database by its side."""
    names = {name: f"resharding_{uuid4().hex}" for name in (HOME, "east")[: request.param]}
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for each in names.values():
            connection.execute(f"CREATE DATABASE {each}".encode())
        yield {name: make_conninfo(postgres_url, dbname=each) for name, each in names.items()}
        for each in names.values():
            connection.execute(f"DROP DATABASE {each} WITH (FORCE)".encode())


class Service:
    """What of a service a collection needs."""

    def __init__(self, catalog: Catalog, jobs: Jobs, resharder: Resharder, ingest: Ingest) -> None:
        self.catalog, self.jobs, self.resharder, self.ingest = catalog, jobs, resharder, ingest
        self.fanout = FanOut(random.Random(1))

    @property
    def served(self) -> Served:
        return self.catalog.resolve("default", "notes")

    async def upsert(self, vectors: dict[str, np.ndarray], *, visible: bool = True) -> None:
        matrix = np.stack(list(vectors.values())).astype(np.float32)
        request = pb.UpsertRequest(
            collection="notes",
            documents=[pb.Document(id=id) for id in vectors],
            vectors=pb.Matrix(data=matrix.tobytes(), rows=len(vectors), dim=DIM),
            wait=pb.VISIBLE if visible else pb.DURABLE,
        )
        answer = await self.ingest.upsert(request, "default", Deadline.after(PATIENCE_S))
        assert not any(status.code for status in answer.statuses)
        assert answer.visible == visible

    async def delete(self, *ids: str) -> None:
        request = pb.DeleteRequest(collection="notes", ids=ids, wait=pb.VISIBLE)
        assert (await self.ingest.delete(request, "default", Deadline.after(PATIENCE_S))).visible

    async def all_hits(self) -> dict[str, int]:
        """Every document a search finds, and its position."""
        found = await self.fanout.search(
            self.served, np.ones((1, DIM), np.float32), 9_999, filter=None, exact=True, effort=DEFAULT_EFFORT,
            include=Include(), min_coverage=1.0, deadline=Deadline.after(PATIENCE_S),
        )  # fmt: skip
        ids = [hit.id for hit in found.hits[0]]
        assert len(ids) == len(set(ids))
        return {hit.id: hit.version.seq for hit in found.hits[0]}

    async def count(self) -> int:
        return sum(
            await self.served.each_shard(
                lambda replica, epoch: replica.count(None, epoch=epoch), Deadline.after(PATIENCE_S)
            )
        )

    async def ended(self, job: Job) -> JobState:
        async with asyncio.timeout(PATIENCE_S):
            async for told in self.jobs.watch([job.served], job.record.id):
                state = told.record.state
        return state


@asynccontextmanager
async def service(urls: dict[str, str], directory: Path) -> AsyncIterator[Service]:
    async with AsyncExitStack() as stack:
        partitions = {name: url for name, url in urls.items() if name != HOME}
        store = await Store.open(urls[HOME], partitions=partitions)
        stack.push_async_callback(store.close)
        threads = stack.enter_context(ThreadPoolExecutor(1))
        shards = LocalShards(
            directory, store.follow, search_threads=threads, memtable_rows=64, graph_rows=50_000, poll_ms=20,
            device="cpu",
        )  # fmt: skip
        catalog = Catalog(store, shards)
        stack.push_async_callback(catalog.close)
        await catalog.load()
        jobs = Jobs(catalog)
        resharder = Resharder(catalog, jobs)
        stack.push_async_callback(jobs.close)
        await jobs.open()
        ingest = Ingest(catalog, None, Limits())  # type: ignore[arg-type]  # nothing is embedded
        stack.push_async_callback(ingest.close)
        yield Service(catalog, jobs, resharder, ingest)


async def create(served_by: Service, *, shards: int = 2, replicas: int = 1) -> None:
    await served_by.catalog.create(
        tenant="default", name="notes", dim=DIM, metric=Metric.COSINE, schema={}, model=None, slots=SLOTS,
        shards=shards, replicas=replicas, index="auto", max_staleness_ms=0, space=f"vectors:{DIM}",
    )  # fmt: skip


class Load:
    """Writers and searchers who remember what they were promised."""

    def __init__(self, service: Service, seed: int) -> None:
        self._service = service
        self._rng = np.random.default_rng(seed)
        self._random = random.Random(seed)
        #: Acknowledged as visible.
        self.there: set[str] = set()
        #: On the way in or out.
        self._unsure: set[str] = set()
        #: All that ever came, in order: what comes and goes during one search may be found by it.
        self._came: list[str] = []
        self.searches = self.writes = 0
        self._number = 0
        self.stop = asyncio.Event()

    async def write(self) -> None:
        while not self.stop.is_set():
            if self.there and self._random.random() < 0.3:
                id = self._random.choice(sorted(self.there - self._unsure) or [""])
                if not id:
                    continue
                self._unsure.add(id)
                await self._service.delete(id)
                self.there.discard(id)
                self._unsure.discard(id)
            else:
                ids = {f"d{self._number + i}" for i in range(5)}
                self._number += 3  # the last two are written again next time
                ids -= self._unsure
                self._unsure |= ids
                self._came += ids
                await self._service.upsert({id: self._rng.standard_normal(DIM) for id in sorted(ids)})
                self.there |= ids
                self._unsure -= ids
            self.writes += 1

    async def search(self) -> None:
        seen: dict[str, int] = {}
        while not self.stop.is_set():
            before, unsure, begun = set(self.there), set(self._unsure), len(self._came)
            hits = await self._service.all_hits()
            unsure |= self._unsure
            after = self.there
            assert before - unsure - (before - after) <= hits.keys(), "a search misses a visible document"
            assert hits.keys() <= before | unsure | set(self._came[begun:]), (
                "a search finds a deleted document"
            )
            for id, seq in hits.items():
                assert seq >= seen.get(id, 0), f"{id} is older than it was"
                seen[id] = seq
            self.searches += 1

    async def during(self, work: Callable[[], Awaitable[None]]) -> None:
        async with asyncio.TaskGroup() as group:
            for one in (self.write, self.write, self.search, self.search):
                group.create_task(one())
            await work()
            # A little of each afterwards, too.
            until = self.searches + 3, self.writes + 3
            while self.searches < until[0] or self.writes < until[1]:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            self.stop.set()
        assert (await self._service.all_hits()).keys() == self.there
        assert await self._service.count() == len(self.there)


async def test_shards_and_replicas_come_and_go_under_load(urls: dict[str, str], tmp_path: Path) -> None:
    async with service(urls, tmp_path) as running:
        await create(running)
        await running.upsert({f"old{i}": np.random.default_rng(i).standard_normal(DIM) for i in range(500)})
        load = Load(running, 1)
        load.there |= {f"old{i}" for i in range(500)}
        resharder, served = running.resharder, running.served

        async def change() -> None:
            assert await running.ended(await resharder.add_shard(served)) is JobState.SUCCEEDED
            assert served.state.shards == (0, 1, 2)
            assert await running.ended(await resharder.set_replicas(served, 2)) is JobState.SUCCEEDED
            assert {copy.replica for copy, _ in served.copies()} == {0, 1}
            assert await running.ended(await resharder.drain_shard(served, 0)) is JobState.SUCCEEDED
            assert served.state.shards == (1, 2)
            assert await running.ended(await resharder.set_replicas(served, 1)) is JobState.SUCCEEDED
            assert len(list(served.copies())) == 2 * len(urls)

        await load.during(change)
        for _, replica in served.copies():
            replica.validate_state()
        assert served.state.epoch == 7
        kept = {f"shard-{shard}{of}" for shard in (1, 2) for of in ("", ".east")[: len(urls)]}
        assert {path.name for path in tmp_path.glob("*/*")} == kept  # noqa: ASYNC240


async def test_what_was_moved_is_there_after_a_restart(urls: dict[str, str], tmp_path: Path) -> None:
    async with service(urls, tmp_path) as running:
        await create(running)
        await running.upsert({f"d{i}": np.random.default_rng(i).standard_normal(DIM) for i in range(300)})
        await running.ended(await running.resharder.add_shard(running.served))
        await running.ended(await running.resharder.drain_shard(running.served, 1))
        await running.delete("d0")
        state = running.served.state
    async with service(urls, tmp_path) as again:
        assert again.served.state == state
        assert (await again.all_hits()).keys() == {f"d{i}" for i in range(1, 300)}
        await again.upsert({"d0": np.ones(DIM)})
        assert await again.count() == 300


@pytest.mark.parametrize("adds", [True, False], ids=["add", "drain"])
async def test_a_service_that_stops_at_any_step_goes_on_from_there(
    urls: dict[str, str], tmp_path: Path, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {f"d{i}" for i in range(200)}
    async with service(urls, tmp_path) as running:
        await create(running, shards=3)
        await running.upsert({id: np.random.default_rng(1).standard_normal(DIM) for id in expected})
    do, left, stopped = _Change._do, 0, asyncio.Event()

    async def counted(self: _Change, instruction: Instruction) -> Event | None:
        nonlocal left
        if not left:
            stopped.set()
            await asyncio.Event().wait()
        left -= 1
        return await do(self, instruction)

    monkeypatch.setattr(_Change, "_do", counted)
    # The service starts again and again, and each time its job takes one step more before it stops.
    states: list[type] = []
    for steps in range(30):
        left = steps
        stopped.clear()
        async with service(urls, tmp_path) as running:
            served = running.served
            states.append(type(served.state))
            jobs = await running.jobs.all([served])
            if not jobs:
                begin = (
                    running.resharder.add_shard(served) if adds else running.resharder.drain_shard(served, 1)
                )
                jobs = [await begin]
            ends = asyncio.create_task(running.ended(jobs[0]))
            stops = asyncio.create_task(stopped.wait())
            await asyncio.wait((ends, stops), return_when=asyncio.FIRST_COMPLETED)
            assert (await running.all_hits()).keys() == expected
            await running.upsert({f"new{steps}": np.ones(DIM)})
            expected.add(f"new{steps}")
            assert (await running.all_hits()).keys() == expected
            await tasks.end(stops)
            if ends.done():
                assert await ends is JobState.SUCCEEDED
                assert served.state.shards == ((0, 1, 2, 3) if adds else (0, 2))
                break
            await tasks.end(ends)
    assert {Steady, Migrating, Retiring} <= set(states)


async def test_a_change_can_be_cancelled_until_the_new_owners_answer(
    urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = asyncio.Event(), asyncio.Event()
    backfill = Replica.backfill

    async def slow(self: Replica, slots: Sequence[int]) -> None:
        if slots:
            reading.set()
            await go_on.wait()
        await backfill(self, slots)

    async with service(urls, tmp_path) as running:
        await create(running)
        served, resharder = running.served, running.resharder
        await running.upsert({f"d{i}": np.ones(DIM) for i in range(50)})
        monkeypatch.setattr(Replica, "backfill", slow)
        job = await resharder.add_shard(served)
        await reading.wait()
        with pytest.raises(PreconditionFailed, match="another job"):
            await resharder.set_replicas(served, 2)
        with pytest.raises(PreconditionFailed, match="being changed"):
            await resharder.drain_shard(served, 0)
        cancelled = await running.jobs.cancel([served], job.record.id, Deadline.after(PATIENCE_S))
        assert cancelled.record.state is JobState.CANCELLED
        assert served.state.shards == (0, 1)
        go_on.set()
        assert len(await running.all_hits()) == await running.count() == 50
        with pytest.raises(PreconditionFailed, match="not running"):
            await running.jobs.cancel([served], job.record.id, Deadline.after(PATIENCE_S))
        with pytest.raises(NotFound):
            await running.jobs.job([served], str(uuid4()))
        with pytest.raises(NotFound):
            await resharder.drain_shard(served, 7)
        assert await running.ended(await resharder.add_shard(served)) is JobState.SUCCEEDED
        assert len(await running.all_hits()) == 50


async def test_a_copy_that_is_down_is_not_asked_and_comes_back(urls: dict[str, str], tmp_path: Path) -> None:
    async with service(urls, tmp_path) as running:
        await create(running, replicas=2)
        served = running.served
        await running.upsert({f"d{i}": np.ones(DIM) for i in range(50)})
        for number in range(2):
            fallen = served.logs[HOME].replicas[0][number]
            fallen._follower.fall("a test")
            # Neither do searches miss anything, nor do writes wait for it.
            assert len(await running.all_hits()) == 50 + number
            await running.upsert({f"new{number}": np.ones(DIM)})
            async with asyncio.timeout(PATIENCE_S):
                while served.logs[HOME].replicas[0].get(number) in (None, fallen):
                    assert len(await running.all_hits()) == 51 + number
                    await asyncio.sleep(0.01)
        assert await running.count() == 52


async def test_a_collection_can_go_while_its_shards_change(urls: dict[str, str], tmp_path: Path) -> None:
    async with service(urls, tmp_path) as running:
        for _ in range(5):
            await create(running)
            await running.upsert({f"d{i}": np.ones(DIM) for i in range(50)})
            await running.resharder.add_shard(running.served)
            await asyncio.sleep(0)
            await running.catalog.delete("default", "notes")
        assert not list(tmp_path.glob("*"))  # noqa: ASYNC240
