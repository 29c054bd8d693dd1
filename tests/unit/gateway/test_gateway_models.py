"""Models are loaded once, when first asked for; idle ones make room, those in use do not."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from index_builder.models.manifest import Agreement, ModelManifest
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.embedder.profiling import Profile
from services.gateway import models as models_module
from services.gateway.embeddings import Vectors
from services.gateway.models import Models, require_dimension, space_at
from services.metadata.models import ModelKind, ModelState, ModelVersion
from shard_router.errors import (
    DeadlineExceeded,
    EmbedderUnavailable,
    InvalidField,
    NotFound,
    Overloaded,
    PreconditionFailed,
    SpaceMismatch,
)
from shard_router.model import Collection, Metric

MANIFEST = ModelManifest(
    name="default", version="1", precision="int8", space="space-0", variant="variant-0", dim=8, max_tokens=16,
    prompts={}, files={"model.onnx": "0", "tokenizer.json": "0"}, agreement=Agreement(1, 1, 1), recipe=1,
    directory=Path("/nowhere"),
)  # fmt: skip
GRAPH_BYTES = 100


class Fake:
    """An embedder, and the cache before it; a vector says whose it is."""

    def __init__(
        self, manifest: ModelManifest, hold: asyncio.Event | None = None, entered: Callable[[], None] = int
    ) -> None:
        self.manifest = manifest
        self.closed = False
        self._hold, self._entered = hold, entered

    async def close(self) -> None:
        self.closed = True

    async def embed(
        self, texts: Sequence[str], input_type: InputType, deadline: Deadline, *, use_cache: bool, lease: bool
    ) -> Vectors:
        assert not self.closed
        if self._hold:
            self._entered()
            await self._hold.wait()
        assert not self.closed, "given up while in use"
        none = np.zeros(len(texts), np.int32)
        number = float(self.manifest.space.removeprefix("space-"))
        return Vectors(np.full((len(texts), 8), number, np.float32), none, none, none)

    async def profile(self, seconds: float) -> Profile:
        if self._hold:
            await self._hold.wait()
        assert not self.closed, "given up while it is profiled"
        return Profile(int(seconds), b"")


class Setting:
    """Registered models m1@1 to m4@1, and what was loaded of them."""

    def __init__(self, directory: Path, max_bytes: int = 2 * GRAPH_BYTES) -> None:
        self.loaded: list[str] = []
        self.embedders: dict[str, Fake] = {}
        self.hold: asyncio.Event | None = None
        self.both_busy = asyncio.Event()
        self._busy = 0
        self.failure: Exception | None = None
        self.models = Models(
            cast(Any, Fake(MANIFEST)),
            directory,
            load=cast(Any, self._load),
            cached=cast(Any, lambda embedder: embedder),
            max_bytes=max_bytes,
        )
        self.versions = [self.version(i) for i in range(1, 5)]
        self.models.know(self.versions)

    def version(
        self, i: int, *, state: ModelState = ModelState.STAGED, number: str = "1", percent: int = 0
    ) -> ModelVersion:
        manifest = msgspec.structs.replace(
            MANIFEST, name=f"m{i}", version=number, space=f"space-{i}", variant=f"variant-{i}-{number}"
        )
        return ModelVersion(
            f"m{i}", number, ModelKind.EMBEDDING, state, percent, "/artifact", manifest.encode().decode(), 1
        )

    async def _load(self, manifest: ModelManifest) -> Fake:
        if self.failure:
            raise self.failure
        self.loaded.append(manifest.model)
        self.embedders[manifest.model] = Fake(manifest, self.hold, self._entered)
        return self.embedders[manifest.model]

    def _entered(self) -> None:
        self._busy += 1
        if self._busy == 2:
            self.both_busy.set()

    async def embed(self, model: str, seconds: float = 5) -> float:
        made = await self.models.embed(
            self.models.resolve(model), ["a"], InputType.QUERY, Deadline.after(seconds)
        )
        return float(made.vectors[0, 0])


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Files that are there and sound."""

    def load(directory: Path) -> ModelManifest:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.onnx").write_bytes(bytes(GRAPH_BYTES))
        number = directory.parent.name[1]
        return msgspec.structs.replace(
            MANIFEST, name=f"m{number}", space=f"space-{number}", directory=directory
        )

    monkeypatch.setattr(models_module.ModelManifest, "load", staticmethod(load))
    return Setting(tmp_path)


async def test_a_model_is_loaded_once_by_whoever_comes_first(setting: Setting) -> None:
    assert await asyncio.gather(*(setting.embed("m1@1") for _ in range(5))) == [1.0] * 5
    assert setting.loaded == ["m1@1"]
    assert await setting.embed("") == 0.0
    await setting.models.close()
    assert setting.embedders["m1@1"].closed


async def test_the_one_idle_longest_makes_room(setting: Setting) -> None:
    for model in ("m1@1", "m2@1", "m1@1", "m3@1"):
        await setting.embed(model)
    assert setting.embedders["m2@1"].closed
    assert not setting.embedders["m1@1"].closed
    assert setting.models.stats()["loaded_bytes"] == 2 * GRAPH_BYTES
    assert await setting.embed("m2@1") == 2.0, "and is loaded again when it is asked for"
    assert setting.loaded == ["m1@1", "m2@1", "m3@1", "m2@1"]


async def test_models_in_use_stay_and_the_next_is_refused(setting: Setting) -> None:
    setting.hold = asyncio.Event()
    busy = [asyncio.create_task(setting.embed(model)) for model in ("m1@1", "m2@1")]
    async with asyncio.timeout(5):
        await setting.both_busy.wait()
    with pytest.raises(Overloaded, match="memory for models"):
        await setting.embed("m3@1")
    setting.hold.set()
    assert await asyncio.gather(*busy) == [1.0, 2.0]
    assert await setting.embed("m3@1") == 3.0


async def test_one_model_at_a_time_is_profiled_and_only_where_there_is_room(setting: Setting) -> None:
    setting.hold = asyncio.Event()
    models, soon = setting.models, Deadline.after(5)
    profiling = asyncio.create_task(models.profile(models.resolve("m1@1"), 3, soon))
    while "m1@1" not in setting.embedders:  # noqa: ASYNC110 - a thread does it
        await asyncio.sleep(0.005)
    with pytest.raises(PreconditionFailed, match="profiled already"):
        await models.profile(models.resolve("m2@1"), 3, soon)
    await asyncio.sleep(0)
    setting.hold.set()
    assert (await profiling).runs == 3
    setting.hold.clear()
    busy = [asyncio.create_task(setting.embed(model)) for model in ("m1@1", "m2@1")]
    await setting.both_busy.wait()
    with pytest.raises(Overloaded):
        await models.profile(models.resolve("m1@1"), 3, soon)
    setting.hold.set()
    await asyncio.gather(*busy)


async def test_a_model_that_does_not_load_fails_its_callers_and_is_tried_again(setting: Setting) -> None:
    setting.failure = EmbedderUnavailable("m1@1", "no device")
    for _ in range(2):
        with pytest.raises(EmbedderUnavailable, match="no device"):
            await setting.embed("m1@1")
    setting.failure = None
    assert await setting.embed("m1@1") == 1.0
    assert setting.models.stats()["failed_loads_total"] == 2


async def test_whoever_has_no_time_left_does_not_wait(setting: Setting) -> None:
    with pytest.raises(DeadlineExceeded):
        await setting.embed("m1@1", seconds=0)
    assert setting.loaded == []


def test_names_resolve_to_versions(setting: Setting) -> None:
    models = setting.models
    assert models.resolve("").model == models.resolve("default").model == "default@1"
    assert models.resolve("m1@1").model == "m1@1"
    with pytest.raises(PreconditionFailed, match="no version of model 'm1' is live"):
        models.resolve("m1")
    with pytest.raises(NotFound) as missing:
        models.resolve("m9", "somewhere")
    assert missing.value.field == "somewhere"
    models.know([*setting.versions[1:], setting.version(1, state=ModelState.LIVE, number="2")])
    assert models.resolve("m1").model == "m1@2"
    with pytest.raises(NotFound):
        models.resolve("m1@1")


def test_a_collection_keeps_its_model_and_its_space(setting: Setting) -> None:
    models = setting.models
    assert models.of(collection("m2@1", "space-2")).model == "m2@1"
    assert models.variant(collection("m2@1", "space-2")) == "variant-2-1"
    assert models.variant(collection(None, "vectors:8")) == ""
    with pytest.raises(PreconditionFailed, match="bring a vector"):
        models.of(collection(None, "vectors:8"))
    with pytest.raises(PreconditionFailed, match="m9@1 of collection 'c' is not registered"):
        models.of(collection("m9@1", "space-9"))
    with pytest.raises(SpaceMismatch):
        models.of(collection("m2@1", "space-3"))


def collection(model: str | None, space: str, dim: int = 8) -> Collection:
    return Collection(
        uid=1, tenant="t", name="c", dim=dim, metric=Metric.COSINE, schema={}, schema_version=1,
        model=model, slots=1, shards=1, replicas=1, index="auto", max_staleness_ms=0, generation=1,
        space=space, created_at_us=0,
    )  # fmt: skip


KEYS = [b"%d" % i for i in range(400)]


def test_a_canary_takes_its_share_of_a_name_and_of_its_collections(setting: Setting) -> None:
    models = setting.models
    models.know([
        setting.version(1, state=ModelState.LIVE),
        setting.version(1, state=ModelState.CANARY, number="2", percent=25),
    ])  # fmt: skip
    live = models.resolve("m1")
    taken = [key for key in KEYS if models.routed(live, "t", key).model == "m1@2"]
    assert 70 < len(taken) < 130
    queried = [key for key in KEYS if models.for_queries(collection("m1@1", "space-1"), key).model == "m1@2"]
    assert queried == taken
    assert models.of(collection("m1@1", "space-1")).model == "m1@1", "documents wait until it is live"
    assert models.routed(models.default, "t", taken[0]) is models.default


def test_the_default_model_has_canaries_too(setting: Setting) -> None:
    models = setting.models
    told = msgspec.structs.replace(MANIFEST, version="2", variant="variant-0-2")
    canary = replace(
        setting.version(1, state=ModelState.CANARY, percent=50),
        name="default",
        version="2",
        manifest=told.encode().decode(),
    )
    models.know([canary])
    met = {models.routed(models.resolve(name), "t", key).model for name in ("", "default") for key in KEYS}
    assert met == {"default@1", "default@2"}
    assert models.resolve("default").model == "default@1"


def test_a_canary_of_another_space_gets_nothing(setting: Setting) -> None:
    models = setting.models
    other = setting.version(2, state=ModelState.CANARY, number="2", percent=100)
    told = msgspec.structs.replace(MANIFEST, name="m1", version="2", space="space-2", variant="variant-2-2")
    other = replace(other, name="m1", manifest=told.encode().decode())
    models.know([setting.version(1, state=ModelState.LIVE), other])
    assert {models.for_queries(collection("m1@1", "space-1"), key).model for key in KEYS} == {"m1@1"}


def test_a_collection_follows_what_is_live_within_its_space(setting: Setting) -> None:
    models = setting.models
    models.know([
        setting.version(1, state=ModelState.RETIRED),
        setting.version(1, state=ModelState.LIVE, number="2"),
    ])  # fmt: skip
    bound = collection("m1@1", "space-1")
    assert (models.of(bound).model, models.variant(bound)) == ("m1@2", "variant-1-2")
    assert models.for_queries(bound, b"k").model == "m1@2"


def test_only_declared_lengths_may_be_asked_for() -> None:
    matryoshka = msgspec.structs.replace(MANIFEST, dimensions=(2, 4))
    assert [require_dimension(matryoshka, dim, "d") for dim in (0, 2, 4, 8)] == [8, 2, 4, 8]
    with pytest.raises(InvalidField, match=r"3: model default@1 has 8 and declares 2, 4"):
        require_dimension(matryoshka, 3, "d")
    with pytest.raises(InvalidField, match="declares no other"):
        require_dimension(MANIFEST, 4, "d")
    assert space_at(matryoshka, 8) == "space-0" != space_at(matryoshka, 4) != space_at(matryoshka, 2)
