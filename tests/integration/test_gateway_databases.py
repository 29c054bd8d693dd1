"""One collection over two databases, asked as users ask: every call, also while one database is away."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psycopg
import pytest
from second_postgres import SecondPostgres

from protos.ringfort import v1 as pb
from services.cache.tier import CacheTier
from services.config import Limits
from services.deadline import Deadline
from services.gateway.answers import Answers
from services.gateway.catalog import Catalog, Served
from services.gateway.documents import Documents
from services.gateway.fanout import FanOut
from services.gateway.ingest import Ingest
from services.gateway.models import Models
from services.gateway.recall_audit import RecallAudit
from services.gateway.retrieval import Retrieval
from services.metadata.store import Store
from services.shard.local_shards import LocalShards
from shard_router.databases import databases_of
from shard_router.errors import ShardUnavailable, StorageUnavailable, Unavailable, UnknownLog
from shard_router.model import HOME, AttributeType, Metric

DIM, SLOTS = 8, 16
PATIENCE_S = 60.0
IDS = [f"d{i}" for i in range(80)]


class Service:
    """What of a service a collection needs, over databases by name."""

    def __init__(self, store: Store, catalog: Catalog, ingest: Ingest, retrieval: Retrieval) -> None:
        self.store, self.catalog, self.ingest, self.retrieval = store, catalog, ingest, retrieval
        self.documents = Documents(catalog, Limits())

    @property
    def served(self) -> Served:
        return self.catalog.resolve("default", "notes")

    async def create(self, *, shards: int = 2, replicas: int = 1) -> None:
        await self.catalog.create(
            tenant="default", name="notes", dim=DIM, metric=Metric.L2, schema={"rank": AttributeType.INT},
            model=None, slots=SLOTS, shards=shards, replicas=replicas, index="auto", max_staleness_ms=0,
            space=f"vectors:{DIM}",
        )  # fmt: skip

    async def upsert(
        self,
        ranks: Mapping[str, int],
        *,
        wait: "pb.Wait.ValueType" = pb.VISIBLE,
        within_s: float = PATIENCE_S,
    ) -> pb.UpsertResponse:
        request = pb.UpsertRequest(
            collection="notes",
            documents=[pb.Document(id=id, attributes={"rank": pb.Value(int=r)}) for id, r in ranks.items()],
            vectors=pb.Matrix(data=vectors(ranks).tobytes(), rows=len(ranks), dim=DIM),
            wait=wait,
        )
        return await self.ingest.upsert(request, "default", Deadline.after(within_s))

    async def patch(self, ranks: Mapping[str, int]) -> pb.PatchResponse:
        patches = [pb.Patch(id=id, attributes={"rank": pb.Value(int=rank)}) for id, rank in ranks.items()]
        request = pb.PatchRequest(collection="notes", patches=patches, wait=pb.VISIBLE)
        return await self.ingest.patch(request, "default", Deadline.after(PATIENCE_S))

    async def delete(self, *ids: str, filter: str = "") -> pb.DeleteResponse:
        request = pb.DeleteRequest(collection="notes", ids=ids, wait=pb.VISIBLE)
        if filter:
            request.filter.text = filter
        return await self.ingest.delete(request, "default", Deadline.after(PATIENCE_S))

    async def get(self, *ids: str) -> pb.GetResponse:
        request = pb.GetRequest(collection="notes", ids=ids)
        return await self.documents.get(request, "default", Deadline.after(PATIENCE_S))

    async def scan(self, size: int, filter: str = "") -> list[str]:
        ids: list[str] = []
        request = pb.ScanRequest(collection="notes", page_size=size)
        if filter:
            request.filter.text = filter
        while True:
            page = await self.documents.scan(request, "default", Deadline.after(PATIENCE_S))
            ids += [document.id for document in page.documents]
            if not page.next_page_token:
                return ids
            request.page_token = page.next_page_token

    async def count(self, filter: str = "") -> int:
        request = pb.CountRequest(collection="notes")
        if filter:
            request.filter.text = filter
        return (await self.documents.count(request, "default", Deadline.after(PATIENCE_S))).count

    async def search(
        self, *, filter: str = "", k: int = 1_000, read_after: Mapping[str, int] | None = None, **more: Any
    ) -> pb.SearchResponse:
        """What is nearest to rank 0, all of it where no k is given."""
        query = np.zeros((1, DIM), np.float32)
        request = pb.SearchRequest(
            collection="notes", k=k, vector=pb.Matrix(data=query.tobytes(), rows=1, dim=DIM)
        )
        if filter:
            request.filter.text = filter
        if read_after is not None:
            request.read_after.CopyFrom(pb.WriteToken(positions=read_after))
        for name, value in more.items():
            setattr(request, name, value)
        body = await self.retrieval.search(request, "default", Deadline.after(PATIENCE_S))
        return pb.SearchResponse.FromString(body)

    def of(self, database: str) -> list[str]:
        """The ids whose documents lie there."""
        return [IDS[place] for place in databases_of(self.served.collection).cut(IDS)[database]]


def vectors(ranks: Mapping[str, int]) -> np.ndarray:
    """One a rank, so that the order of ranks is the order of distances from 0."""
    return np.array([np.full(DIM, rank, np.float32) for rank in ranks.values()], np.float32).reshape(-1, DIM)


@asynccontextmanager
async def service(urls: Mapping[str, str], directory: Path) -> AsyncIterator[Service]:
    async with AsyncExitStack() as stack:
        partitions = {name: url for name, url in urls.items() if name != HOME}
        store = await Store.open(urls[HOME], partitions=partitions)
        stack.push_async_callback(store.close)
        threads = stack.enter_context(ThreadPoolExecutor(1))
        shards = LocalShards(
            directory, store.follow, search_threads=threads, memtable_rows=32, graph_rows=50_000, poll_ms=20,
            device="cpu",
        )  # fmt: skip
        catalog = Catalog(store, shards)
        stack.push_async_callback(catalog.close)
        await catalog.load()
        ingest = Ingest(catalog, cast(Models, None), Limits())  # nothing is embedded
        stack.push_async_callback(ingest.close)
        models = cast(Models, SimpleNamespace(variant=lambda collection: "none"))
        fanout = FanOut(random.Random(1))
        audit = RecallAudit(fanout, every_s=0)
        answers = Answers(CacheTier(l1_bytes=1_000_000, redis_url=None), ttl_s=60)
        stack.push_async_callback(answers.close)
        yield Service(store, catalog, ingest, Retrieval(catalog, models, fanout, answers, Limits(), audit))


@pytest.fixture
def urls(make_database: Callable[..., str]) -> dict[str, str]:
    return {HOME: make_database(), "east": make_database()}


@pytest.fixture
def second(data_path: Path) -> Iterator[SecondPostgres]:
    with SecondPostgres(data_path) as server:
        yield server


def found(answer: pb.SearchResponse) -> list[str]:
    return [hit.id for hit in answer.hits]


def whole(answer: pb.SearchResponse) -> bool:
    return answer.coverage.shards_answered == answer.coverage.shards_asked


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@dataclass
class Dictionary:
    """The documents that there should be: ranks by id."""

    service: Service
    ranks: dict[str, int] = field(default_factory=dict)

    async def compare(self) -> None:
        """By every way of asking."""
        service, ranks = self.service, self.ranks
        nearest = sorted(ranks, key=lambda id: (ranks[id] ** 2, id))
        assert found(await service.search()) == nearest
        assert found(await service.search(k=7)) == nearest[:7]
        low = [id for id in nearest if ranks[id] < 40]
        assert found(await service.search(filter="rank < 40")) == low
        assert await service.count() == len(ranks)
        assert await service.count("rank < 40") == len(low)
        assert sorted(await service.scan(9)) == sorted(ranks)
        assert sorted(await service.scan(2_000, "rank < 40")) == sorted(low)
        got = await service.get(*IDS)
        assert {document.id: document.attributes["rank"].int for document in got.documents} == ranks
        assert [document.id for document in got.documents] == [id for id in IDS if id in ranks]
        assert list(got.missing) == [id for id in IDS if id not in ranks]


@pytest.mark.parametrize("seed", range(3))
async def test_every_call_is_exact_over_two_databases(
    urls: dict[str, str], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    async with service(urls, tmp_path) as running:
        await running.create(shards=1 + seed, replicas=1 + seed % 2)
        known = Dictionary(running)
        for step in range(24):
            ids = rng.sample(IDS, rng.randrange(1, 30))
            match rng.choice(["upsert", "upsert", "patch", "delete", "filter"]):
                case "upsert":
                    new = {id: rng.randrange(100) for id in ids}
                    done = await running.upsert(new)
                    assert [status.code for status in done.statuses] == [0] * len(ids)
                    assert done.visible
                    known.ranks |= new
                case "patch":
                    new = {id: rng.randrange(100) for id in ids if id in known.ranks}
                    if new:
                        assert (await running.patch(new)).visible
                        # Its vector stays, and so would its distance: written anew for `compare`.
                        assert (await running.upsert(new)).visible
                        known.ranks |= new
                case "delete":
                    gone = await running.delete(*ids)
                    assert gone.visible
                    assert gone.deleted == len(set(ids) & known.ranks.keys())
                    known.ranks = {id: rank for id, rank in known.ranks.items() if id not in ids}
                case "filter":
                    low = rng.randrange(100)
                    gone = await running.delete(filter=f"rank >= {low} and rank < {low + 10}")
                    assert gone.visible
                    left = {id: rank for id, rank in known.ranks.items() if not low <= rank < low + 10}
                    assert gone.deleted == len(known.ranks) - len(left)
                    known.ranks = left
            if step % 4 == 3:
                await known.compare()
        await known.compare()
        for _, replica in running.served.copies():
            replica.validate_state()  # type: ignore[attr-defined]  # a Replica
    async with service(urls, tmp_path) as again:
        await Dictionary(again, known.ranks).compare()


async def test_one_bad_document_fails_alone_wherever_it_lies(urls: dict[str, str], tmp_path: Path) -> None:
    async with service(urls, tmp_path) as running:
        await running.create()
        done = await running.upsert({id: i for i, id in enumerate(IDS)})
        versions = {status.id: status.version for status in done.statuses}
        request = pb.UpsertRequest(
            collection="notes",
            documents=[pb.Document(id=id, if_version=versions[id]) for id in IDS],
            vectors=pb.Matrix(data=np.ones((len(IDS), DIM), np.float32).tobytes(), rows=len(IDS), dim=DIM),
        )
        stale = (running.of(HOME)[1], running.of("east")[2])
        for document in request.documents:
            if document.id in stale:
                document.if_version.seq += 1_000
        answer = await running.ingest.upsert(request, "default", Deadline.after(PATIENCE_S))
        refused = {status.id: status for status in answer.statuses if status.code}
        assert refused.keys() == set(stale)
        for id, status in refused.items():
            assert status.field == f"documents[{IDS.index(id)}].if_version"
        assert len(answer.token.positions) == 2


async def test_a_token_has_the_logs_that_were_written_and_any_part_of_it_can_be_waited_for(
    urls: dict[str, str], tmp_path: Path
) -> None:
    async with service(urls, tmp_path) as running:
        await running.create()
        logs = {database: running.store.log_id_of(database) for database in urls}
        await running.upsert({id: i for i, id in enumerate(IDS)})
        for database in urls:
            id = running.of(database)[0]
            token = (await running.upsert({id: 0}, wait=pb.DURABLE)).token.positions
            assert list(token) == [logs[database]]
            answer = await running.search(read_after=token)
            assert answer.served_from == pb.INDEX
            assert id in found(answer)[:3]
        both = (await running.upsert(dict.fromkeys(IDS, 1), wait=pb.DURABLE)).token.positions
        assert both.keys() == set(logs.values())
        assert len(found(await running.search(read_after=both))) == len(IDS)
        beyond = {logs["east"]: both[logs["east"]] + 1}
        with pytest.raises(UnknownLog):
            await running.search(read_after=beyond)
        with pytest.raises(UnknownLog):
            await running.search(read_after={logs[HOME]: 1, "no-such-log": 1})


async def test_a_kept_answer_is_served_until_either_database_is_written(
    urls: dict[str, str], tmp_path: Path
) -> None:
    async with service(urls, tmp_path) as running:
        await running.create()
        await running.upsert({id: i + 1 for i, id in enumerate(IDS)})
        for database in urls:
            await running.search(k=1)
            assert (await running.search(k=1)).served_from == pb.L1
            id = running.of(database)[-1]
            await running.upsert({id: 0})
            answer = await running.search(k=1)
            assert (answer.served_from, found(answer)) == (pb.INDEX, [id])
            await running.delete(id)
        stale = await running.search(k=1, max_staleness_ms=60_000)
        assert stale.served_from == pb.L1
        token = (await running.upsert({running.of("east")[1]: 0}, wait=pb.DURABLE)).token.positions
        fresh = await running.search(k=1, max_staleness_ms=60_000, read_after=token)
        assert found(fresh) == [running.of("east")[1]]


async def test_a_database_that_is_killed_takes_its_own_documents_writes_and_nothing_else(
    urls: dict[str, str], second: SecondPostgres, tmp_path: Path
) -> None:
    urls["east"] = second.url
    async with service(urls, tmp_path / "segments") as running:
        await running.create()
        await running.upsert({id: i for i, id in enumerate(IDS)})
        home, east = running.of(HOME), running.of("east")
        second.kill()
        # Searches and counts are answered whole, and from the cache, too.
        for _ in range(2):
            answer = await running.search()
            assert (found(answer), whole(answer)) == (IDS, True)
        assert answer.served_from == pb.L1
        assert await running.count("rank < 40") == 40
        # Of one call, what lies elsewhere is written, and visible to whoever brings the token.
        mixed = await running.upsert({id: 100 + i for i, id in enumerate(IDS)})
        for i, status in enumerate(mixed.statuses):
            if status.id in home:
                assert status.code == 0
                assert status.version.seq
            else:
                assert (status.code, status.field) == (14, f"documents[{i}]")
                assert "'east' is away" in status.message
        assert mixed.visible
        assert list(mixed.token.positions) == [running.store.log_id]
        moved = await running.search(read_after=mixed.token.positions)
        assert set(found(moved)[: len(east)]) == set(east)
        # What is about its documents alone is refused, and says where.
        with pytest.raises(StorageUnavailable, match="'east'") as refused:
            await running.upsert(dict.fromkeys(east, 5))
        assert refused.value.field == "documents[0]"
        with pytest.raises(StorageUnavailable, match="'east'") as refused:
            await running.get(home[0], east[0])
        assert refused.value.field == "ids[1]"
        assert [document.id for document in (await running.get(*home)).documents] == home
        with pytest.raises(StorageUnavailable, match="'east'"):
            await running.scan(10)
        with pytest.raises(StorageUnavailable, match="'east'") as refused:
            await running.delete(home[0], east[0])
        assert refused.value.field == "ids[1]"
        with pytest.raises(StorageUnavailable, match="'east'"):
            await running.delete(filter="rank >= 0")
        assert (await running.delete(*home[:3])).deleted == 2
        assert running.store.databases["east"]
        assert not running.store.databases[HOME]
        second.start()
        # It is back by itself: nothing that was acknowledged is lost, and everything is exact again.
        ranks = {id: 100 + IDS.index(id) for id in home[3:]} | {id: IDS.index(id) for id in east}

        async def writable() -> bool:
            try:
                return (await running.upsert({east[0]: ranks[east[0]]})).visible
            except Unavailable:
                return False

        await until(writable)
        await Dictionary(running, ranks).compare()


async def test_a_service_that_starts_without_a_database_says_what_it_lacks_and_gets_it_later(
    urls: dict[str, str], second: SecondPostgres, tmp_path: Path
) -> None:
    urls["east"] = second.url
    async with service(urls, tmp_path / "segments") as running:
        await running.create()
        await running.upsert({id: i for i, id in enumerate(IDS)})
        home, east = running.of(HOME), running.of("east")
        token = {running.store.log_id_of("east"): 1}
    second.kill()
    async with service(urls, tmp_path / "segments") as running:
        answer = await running.search()
        assert (found(answer), answer.coverage.shards_answered) == (home, 0)
        assert (await running.search()).served_from == pb.INDEX, "what is not whole is not kept"
        with pytest.raises(ShardUnavailable):
            await running.search(min_coverage=0.5)
        with pytest.raises(Unavailable):
            await running.count()
        with pytest.raises(Unavailable):
            await running.search(read_after=token)
        done = await running.upsert({home[0]: 500, east[0]: 500})
        assert [status.code for status in done.statuses] == [0, 14]
        assert done.visible
        with pytest.raises(StorageUnavailable, match="'east'"):
            await running.catalog.create(
                tenant="default", name="more", dim=DIM, metric=Metric.L2, schema={}, model=None, slots=SLOTS,
                shards=1, replicas=1, index="auto", max_staleness_ms=0, space=f"vectors:{DIM}",
            )  # fmt: skip
        second.start()

        async def there() -> bool:
            return whole(await running.search())

        await until(there)
        assert found(await running.search(read_after=token))
        await Dictionary(running, {id: i for i, id in enumerate(IDS)} | {home[0]: 500}).compare()


async def test_a_database_that_was_restored_is_followed_anew_and_its_old_tokens_are_refused(
    urls: dict[str, str], make_database: Callable[..., str], tmp_path: Path
) -> None:
    async with service(urls, tmp_path) as running:
        await running.create()
        await running.upsert({id: i for i, id in enumerate(IDS)})
    backup = make_database(copy_of=urls["east"])
    async with service(urls, tmp_path) as running:
        later = {id: 100 + i for i, id in enumerate(IDS)}
        done = await running.upsert(later)
        east = running.of("east")
        await running.delete(*east[:2])
    async with service({**urls, "east": backup}, tmp_path) as running:
        assert running.served.logs["east"].log_id not in done.token.positions
        ranks = later | {id: IDS.index(id) for id in east}
        await Dictionary(running, ranks).compare()
        with pytest.raises(UnknownLog):
            await running.search(read_after=done.token.positions)
        again = await running.upsert({east[0]: 300})
        assert again.statuses[0].version.term > 1
        assert (await running.search(read_after=again.token.positions)).hits


async def test_a_log_that_is_exchanged_under_a_running_service_is_left_at_once(
    urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(urls, tmp_path) as running:
        await running.create()
        await running.upsert({id: i for i, id in enumerate(IDS)})
        old = running.served.logs["east"]
        ownership = running.store._all["east"].ownership
        with psycopg.connect(urls["east"], autocommit=True) as connection:
            # As on another server: what is claimed next is another log.
            connection.execute("UPDATE ringfort.logs SET identity = 'elsewhere'")
        before = ownership.claim.log_id
        ownership.doubt("a test")
        async with asyncio.timeout(PATIENCE_S):
            while ownership.claim.log_id == before:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert running.served.logs["east"] is not old

        async def there() -> bool:
            return whole(await running.search())

        await until(there)
        assert running.served.logs["east"].log_id == ownership.claim.log_id
        assert running.served.logs[HOME].log_id == running.store.log_id
        await Dictionary(running, {id: i for i, id in enumerate(IDS)}).compare()
        assert all(replica.fell.is_set() for _, replica in old.copies())


async def test_collections_of_one_database_and_of_two_live_side_by_side(
    urls: dict[str, str], tmp_path: Path
) -> None:
    async with service({HOME: urls[HOME]}, tmp_path) as running:
        await running.create()
        await running.upsert({id: i for i, id in enumerate(IDS)})
    async with service(urls, tmp_path) as running:
        assert list(running.served.logs) == [HOME]
        await Dictionary(running, {id: i for i, id in enumerate(IDS)}).compare()
        await running.catalog.delete("default", "notes")
        await running.create()
        assert list(running.served.logs) == [HOME, "east"]
        await Dictionary(running).compare()
        await running.catalog.delete("default", "notes")
    assert not list(tmp_path.glob("*/*"))  # noqa: ASYNC240
