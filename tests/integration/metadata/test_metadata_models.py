"""The registry of models: one version of a name is live, and a rollback knows what came before."""

import asyncio
from uuid import uuid4

import pytest

from services.metadata.models import ModelState
from services.metadata.store import Store
from shard_router.errors import AlreadyExists, NotFound, PreconditionFailed

STAGED, LIVE, RETIRED = ModelState.STAGED, ModelState.LIVE, ModelState.RETIRED


async def register(store: Store, name: str, *versions: str) -> None:
    for version in versions:
        await store.models.register(name=name, version=version, artifact=f"/a/{version}", manifest="{}")


async def states(store: Store, name: str) -> dict[str, ModelState]:
    return {m.version: m.state for m in await store.models.all() if m.name == name}


@pytest.fixture
def name() -> str:
    return f"model-{uuid4().hex[:8]}"


async def test_a_version_is_registered_once(store: Store, name: str) -> None:
    made = await store.models.register(name=name, version="1", artifact="/a", manifest='{"x": 1}')
    assert (made.state, made.artifact, made.manifest) == (STAGED, "/a", '{"x": 1}')
    assert made.registered_at_us > 0
    assert made in await store.models.all()
    with pytest.raises(AlreadyExists, match=f"{name}@1"):
        await register(store, name, "1")


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
