"""The registry of models: one version of a name is live, and a rollback knows what came before."""

import asyncio
from uuid import uuid4

import pytest

from services.metadata.models import ModelKind, ModelState
from services.metadata.store import Store
from shard_router.errors import AlreadyExists, NotFound, PreconditionFailed

STAGED, CANARY, LIVE, RETIRED = ModelState.STAGED, ModelState.CANARY, ModelState.LIVE, ModelState.RETIRED


async def register(store: Store, name: str, *versions: str, kind: ModelKind = ModelKind.EMBEDDING) -> None:
    for version in versions:
        await store.models.register(
            name=name, version=version, kind=kind, artifact=f"/a/{version}", manifest="{}"
        )


async def states(store: Store, name: str) -> dict[str, ModelState]:
    return {m.version: m.state for m in await store.models.all() if m.name == name}


@pytest.fixture
def name() -> str:
    return f"model-{uuid4().hex[:8]}"


async def test_a_version_is_registered_once(store: Store, name: str) -> None:
    made = await store.models.register(
        name=name, version="1", kind=ModelKind.RANKER, artifact="/a", manifest='{"x": 1}'
    )
    assert (made.kind, made.state, made.traffic_percent) == (ModelKind.RANKER, STAGED, 0)
    assert (made.artifact, made.manifest) == ("/a", '{"x": 1}')
    assert made.registered_at_us > 0
    assert made in await store.models.all()
    with pytest.raises(AlreadyExists, match=f"{name}@1"):
        await register(store, name, "1", kind=ModelKind.RANKER)
    with pytest.raises(AlreadyExists, match=f"ranker '{name}' already exists"):
        await register(store, name, "2")


async def test_one_version_is_live_and_rollbacks_walk_back(store: Store, name: str) -> None:
    await register(store, name, "1", "2", "3")
    for version in ("1", "2", "3"):
        await store.models.promote(name, version)
    assert await states(store, name) == {"1": RETIRED, "2": RETIRED, "3": LIVE}
    await store.models.rollback(name, to_none=False)
    assert await states(store, name) == {"1": RETIRED, "2": LIVE, "3": RETIRED}
    await store.models.rollback(name, to_none=False)
    assert await states(store, name) == {"1": LIVE, "2": RETIRED, "3": RETIRED}
    with pytest.raises(PreconditionFailed, match="was live before"):
        await store.models.rollback(name, to_none=False)
    await store.models.promote(name, "3")
    await store.models.rollback(name, to_none=False)
    assert (await states(store, name))["1"] is LIVE, "what was live before the new turn"


async def test_the_first_can_be_rolled_back_to_none(store: Store, name: str) -> None:
    await register(store, name, "1")
    await store.models.promote(name, "1")
    await store.models.rollback(name, to_none=True)
    assert await states(store, name) == {"1": RETIRED}
    with pytest.raises(PreconditionFailed, match="is live"):
        await store.models.rollback(name, to_none=True)


async def test_promoting_what_is_live_changes_nothing(store: Store, name: str) -> None:
    await register(store, name, "1", "2")
    for version in ("1", "2", "2"):
        await store.models.promote(name, version)
    await store.models.rollback(name, to_none=False)
    assert (await states(store, name))["1"] is LIVE


async def test_what_is_not_there_is_told(store: Store, name: str) -> None:
    with pytest.raises(NotFound) as missing:
        await store.models.promote(name, "1")
    assert missing.value.field == "name"
    await register(store, name, "1")
    with pytest.raises(NotFound) as missing:
        await store.models.promote(name, "2")
    assert missing.value.field == "version"
    with pytest.raises(NotFound):
        await store.models.rollback(f"{name}-other", to_none=False)


async def test_promotions_at_once_leave_one_live(store: Store, name: str) -> None:
    versions = [str(i) for i in range(8)]
    await register(store, name, *versions)
    await asyncio.gather(*(store.models.promote(name, version) for version in versions))
    found = list((await states(store, name)).values())
    assert found.count(LIVE) == 1
    assert found.count(RETIRED) == 7


async def shares(store: Store, name: str) -> dict[str, tuple[ModelState, int]]:
    return {m.version: (m.state, m.traffic_percent) for m in await store.models.all() if m.name == name}


async def test_a_canary_has_a_share_until_it_ends(store: Store, name: str) -> None:
    await register(store, name, "1", "2", "3")
    await store.models.promote(name, "1")
    for percent in (10, 50):
        await store.models.set_traffic(name, "2", percent)
        assert await shares(store, name) == {"1": (LIVE, 0), "2": (CANARY, percent), "3": (STAGED, 0)}
    with pytest.raises(PreconditionFailed, match=f"{name}@2 is the canary"):
        await store.models.set_traffic(name, "3", 10)
    with pytest.raises(PreconditionFailed, match=f"{name}@1 is live"):
        await store.models.set_traffic(name, "1", 10)
    with pytest.raises(NotFound) as missing:
        await store.models.set_traffic(name, "4", 10)
    assert missing.value.field == "version"
    await store.models.set_traffic(name, "3", 0)
    assert (await shares(store, name))["2"] == (CANARY, 50), "the end of no canary"
    await store.models.set_traffic(name, "2", 0)
    assert await shares(store, name) == {"1": (LIVE, 0), "2": (STAGED, 0), "3": (STAGED, 0)}


async def test_a_promotion_and_a_rollback_end_the_canary(store: Store, name: str) -> None:
    await register(store, name, "1", "2", "3")
    await store.models.promote(name, "1")
    await store.models.set_traffic(name, "2", 10)
    await store.models.promote(name, "2")
    assert await shares(store, name) == {"1": (RETIRED, 0), "2": (LIVE, 0), "3": (STAGED, 0)}
    await store.models.set_traffic(name, "1", 5)
    await store.models.rollback(name, to_none=False)
    assert await shares(store, name) == {"1": (RETIRED, 0), "2": (LIVE, 0), "3": (STAGED, 0)}
    await store.models.set_traffic(name, "3", 5)
    await store.models.promote(name, "1")
    assert await shares(store, name) == {"1": (LIVE, 0), "2": (RETIRED, 0), "3": (STAGED, 0)}
    await store.models.rollback(name, to_none=False)
    assert (await shares(store, name))["2"] == (LIVE, 0)
