"""Embeddings are kept in Redis while that pays: a sample where nothing is asked again, all where it is."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pytest
from cache_tiers import eventually, opened

from index_builder.models.manifest import Agreement, ModelManifest
from services.cache.keys import embedding_key
from services.cache.tier import CacheTier
from services.cache.worth import SAMPLE_EVERY
from services.deadline import Deadline
from services.embedder.embedder import Embedded, InputType
from services.gateway.embeddings import MANY_TEXTS, Embeddings

DIM = 4
PATIENT_MS = 5_000
#: Beyond what is looked for in good faith.
NEW_TEXTS = 120 * SAMPLE_EVERY


class Counting:
    """An embedder that says how many texts it was asked for."""

    def __init__(self, manifest: ModelManifest) -> None:
        self.manifest = manifest
        self.texts = 0
        self.go = asyncio.Event()
        self.go.set()

    async def embed(self, texts: Sequence[str], input_type: InputType, deadline: Deadline) -> Embedded:
        self.texts += len(texts)
        await self.go.wait()
        vectors = np.array([[len(text), 1, 2, 3] for text in texts], np.float32)
        return Embedded(vectors, np.full(len(texts), 3, np.int32), np.zeros(len(texts), bool), 0, 0, 0)


@pytest.fixture
async def tier(valkey_url: str) -> AsyncIterator[CacheTier]:
    async with opened(valkey_url, PATIENT_MS) as tier:
        yield tier


@pytest.fixture
def manifest(request: pytest.FixtureRequest) -> ModelManifest:
    """A model whose entries no other test has, and every run of this one."""
    return ModelManifest(
        name="m", version="1", precision="int8", space="s", variant=request.node.name, dim=DIM, max_tokens=16,
        prompts={}, files={}, agreement=Agreement(1, 1, 1), recipe=1, directory=Path("/nowhere"),
    )  # fmt: skip


class Gateway:
    """One gateway's way to a model, text by text."""

    def __init__(self, tier: CacheTier, manifest: ModelManifest) -> None:
        self.tier = tier
        self.embedder = Counting(manifest)
        self._embeddings = Embeddings(cast(Any, self.embedder), tier, ttl_s=60, max_text_bytes=1_000)

    async def ask(self, texts: Sequence[str], at_once: int = 1) -> int:
        """How many of the texts, asked for so many a call, had to be embedded."""
        before = self.embedder.texts
        for start in range(0, len(texts), at_once):
            asked = texts[start : start + at_once]
            made = await self._embeddings.embed(asked, InputType.QUERY, Deadline.after(60))
            assert made.vectors.tolist() == [[len(text), 1, 2, 3] for text in asked]
        await self._written()
        return self.embedder.texts - before

    async def ask_as_embed(self, texts: Sequence[str]) -> list[bool]:
        """As the Embed call does; which rows had been made by others."""
        made = await self._embeddings.embed(texts, InputType.QUERY, Deadline.after(60), lease=True)
        assert made.vectors.tolist() == [[len(text), 1, 2, 3] for text in texts]
        assert made.tokens.tolist() == [3] * len(texts)
        cached: list[bool] = made.cached.tolist()
        return cached

    async def ask_new(self) -> None:
        """Ask so often for what nobody has asked for that nothing more is kept but the sample."""
        await self.ask([f"new {i}" for i in range(NEW_TEXTS)])

    async def _written(self) -> None:
        """Until all that was to be kept is: writes keep their order."""
        last = uuid4().bytes
        self.tier.put_many([(last, b"last")])
        async with asyncio.timeout(30):
            while (await self.tier.get_many([last]))[0] is None:  # noqa: ASYNC110 - a server sets no event
                await asyncio.sleep(0.005)


def sample(manifest: ModelManifest, texts: Sequence[str]) -> int:
    keys = [embedding_key(manifest.variant, "query", DIM, True, text) for text in texts]
    return sum(key[-1] % SAMPLE_EVERY == 0 for key in keys)


async def test_where_nothing_is_asked_again_a_sample_is_kept(
    tier: CacheTier, manifest: ModelManifest
) -> None:
    gateway = Gateway(tier, manifest)
    await gateway.ask_new()
    others = [f"other {i}" for i in range(20 * SAMPLE_EVERY)]
    assert await gateway.ask(others) == len(others)
    assert await Gateway(tier, manifest).ask(others) == len(others) - sample(manifest, others)


async def test_where_texts_come_back_all_are_kept_again(tier: CacheTier, manifest: ModelManifest) -> None:
    gateway = Gateway(tier, manifest)
    await gateway.ask_new()
    texts = [f"again {i}" for i in range(20 * SAMPLE_EVERY)]
    asked = [await gateway.ask(texts) for _ in range(4)]
    assert asked[0] == len(texts)
    assert asked[3] == 0, asked


async def test_many_texts_at_once_are_always_kept(tier: CacheTier, manifest: ModelManifest) -> None:
    gateway = Gateway(tier, manifest)
    await gateway.ask_new()
    texts = [f"many {i}" for i in range(MANY_TEXTS)]
    assert [await gateway.ask(texts, MANY_TEXTS) for _ in range(2)] == [len(texts), 0]


@pytest.fixture
async def two(valkey_url: str, manifest: ModelManifest) -> AsyncIterator[list[Gateway]]:
    """Two gateways that know of each other, and whose embedders end when told."""
    async with opened(valkey_url, PATIENT_MS) as one, opened(valkey_url, PATIENT_MS) as other:
        await one.exchange.turn()
        gateways = [Gateway(tier, manifest) for tier in (one, other)]
        for gateway in gateways:
            gateway.embedder.go.clear()
        yield gateways


def told(two: Sequence[Gateway], name: str) -> float:
    return sum(gateway.tier.stats()[name] for gateway in two)


async def test_a_crowd_over_two_gateways_embeds_a_text_once(two: list[Gateway]) -> None:
    text = f"lone {uuid4()}"
    crowd = [asyncio.create_task(gateway.ask_as_embed([text])) for _ in range(200) for gateway in two]
    await eventually(lambda: told(two, "lease_waiting"))
    for gateway in two:
        gateway.embedder.go.set()
    await asyncio.gather(*crowd)
    assert sum(gateway.embedder.texts for gateway in two) == 1
    assert told(two, "leases_total") == 1


async def test_what_calls_on_two_gateways_have_in_common_is_embedded_once(two: list[Gateway]) -> None:
    texts = [f"{'x' * i} {uuid4()}" for i in range(60)]
    one, other = texts[:40], texts[:19:-1]
    asked = [asyncio.create_task(two[0].ask_as_embed([*one, one[3]]))]
    await eventually(lambda: two[0].embedder.texts)
    asked.append(asyncio.create_task(two[1].ask_as_embed([*other, other[-1]])))
    await eventually(lambda: two[1].embedder.texts)
    two[1].embedder.go.set()
    await eventually(lambda: told(two, "lease_waiting"))
    two[0].embedder.go.set()
    first, second = await asyncio.gather(*asked)
    assert first == [False] * 41
    assert second == [False] * 20 + [True] * 21
    assert [gateway.embedder.texts for gateway in two] == [40, 20]


async def test_a_text_whose_gateway_gives_up_is_embedded_a_second_time(two: list[Gateway]) -> None:
    texts = [f"left {uuid4()}" for _ in range(20)]
    leaver = asyncio.create_task(two[0].ask_as_embed(texts))
    await eventually(lambda: two[0].embedder.texts)
    stayer = asyncio.create_task(two[1].ask_as_embed(texts))
    await eventually(lambda: two[1].tier.stats()["lease_waiting"])
    leaver.cancel()
    two[1].embedder.go.set()
    assert await stayer == [False] * 20
    assert [gateway.embedder.texts for gateway in two] == [20, 20]


async def test_where_redis_does_not_pay_no_lease_is_taken(
    two: list[Gateway], manifest: ModelManifest
) -> None:
    for gateway in two:
        gateway.embedder.go.set()
    await two[0].ask_new()
    texts = [text for text in (f"new again {i}" for i in range(200)) if not sample(manifest, [text])]
    for text in texts:
        await two[0].ask_as_embed([text])
    assert told(two, "leases_total") == 0
