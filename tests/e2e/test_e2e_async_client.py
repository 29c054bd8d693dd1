"""The awaited client against the same service: the same answers and the same errors."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from scrape import Scrape
from up import Up

from ringfort import AsyncClient, Client
from ringfort.documents import Document
from ringfort.errors import InvalidArgument, NotFound, Unimplemented


@pytest.fixture
async def awaited(service: Up) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(service.grpc) as awaited:
        yield awaited


async def test_both_clients_see_the_same(
    awaited: AsyncClient, client: Client, collection: str, scrape: Scrape
) -> None:
    async def documents() -> AsyncIterator[Document]:
        for i in range(300):
            yield Document(f"a{i}", f"text {i % 20}", attributes={"rank": i})

    written = await awaited.upsert(collection, documents(), batch=50)
    assert (written.written, written.visible, written.failures) == (300, True, ())
    assert await awaited.count(collection, filter="rank < 100") == 100
    ours = await awaited.search(collection, text="text 7", k=20)
    theirs = client.search(collection, text="text 7", k=20)
    assert ours.hits == theirs.hits
    assert len(scrape.gateways) > 1 or theirs.served_from == "L1"
    assert [d.id async for d in awaited.scan(collection)] == [d.id for d in client.scan(collection)]
    liked = await awaited.recommend(collection, like=["a7"], k=5)
    assert liked.hits == client.recommend(collection, like=["a7"], k=5).hits


async def test_equal_questions_at_once_have_one_answer(awaited: AsyncClient, collection: str) -> None:
    await awaited.upsert(collection, [{"id": f"a{i}", "text": f"text {i}"} for i in range(50)])
    found = await asyncio.gather(*(awaited.search(collection, text="the same") for _ in range(100)))
    assert all(result.hits == found[0].hits for result in found)


async def test_errors_are_the_same(awaited: AsyncClient, collection: str) -> None:
    with pytest.raises(NotFound) as missing:
        await awaited.search("no-such", text="x")
    assert (missing.value.field, missing.value.reason) == ("collection", "NOT_FOUND")
    with pytest.raises(Unimplemented) as unimplemented:
        await awaited.search(collection, text="x", mode="LEXICAL")
    assert unimplemented.value.field == "mode"


async def test_embeddings_asked_for_together_are_those_asked_for_alone(
    service: Up, client: Client, scrape: Scrape
) -> None:
    texts = [f"together or alone, {n} " + "word " * (n % 30) for n in range(64)]

    def calls() -> float:
        counted = "ringfort_rpc_seconds_count{"
        found = scrape.samples()
        return sum(value for name, value in found.items() if name.startswith(counted) and '"Embed"' in name)

    before = calls()
    async with AsyncClient(service.grpc, embed_together=16) as awaited:
        refused, *found = await asyncio.gather(
            *(awaited.embed([text]) for text in ("x" * (1 << 20), *texts)), return_exceptions=True
        )
    together = calls() - before
    assert isinstance(refused, InvalidArgument)
    assert refused.field == "texts[0]"
    for text, vectors in zip(texts, found, strict=True):
        assert not isinstance(vectors, BaseException)
        assert vectors.tobytes() == client.embed([text]).tobytes()
    # The long one alone, the others by sixteen.
    assert together == 5
