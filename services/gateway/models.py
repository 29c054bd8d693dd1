"""The embedding models this gateway can use: named, loaded when first asked for, given up when idle.

The default model is always loaded. Others are loaded beside it, each with its own queue and threads, up to
a bound on the bytes of their graphs; the one that was idle longest makes room for the next.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import msgspec

from index_builder.models.artifact import ArtifactRefused, fetch
from index_builder.models.manifest import GRAPH_FILE, ModelCorrupt, ModelManifest
from index_builder.models.reduction import Reduction, truncated
from services.deadline import Deadline
from services.embedder.embedder import InputType
from services.embedder.images import EmbeddedImages
from services.embedder.profiling import Profile
from services.gateway.embeddings import Embeddings, Vectors
from services.gateway.endpoints import EmbedderEndpoint, ImageEmbedderEndpoint
from services.gateway.traffic import Canary
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
from shard_router.model import Collection

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered version and its manifest, whose directory is where its files lie or are fetched to."""

    version: ModelVersion
    manifest: ModelManifest


@dataclass(slots=True)
class _Held:
    """A loaded model."""

    embedder: EmbedderEndpoint | ImageEmbedderEndpoint
    #: The cache before an embedder of texts; pictures are not cached.
    embeddings: Embeddings | None
    graph_bytes: int
    #: Calls under way; it is not given up while there are any.
    in_use: int = 0


class Models:
    """Every embedding model by name, and texts to vectors by any of them.

    `load` makes an embedder of a model; `cached` puts the embedding cache before it. At most
    `max_bytes` of graphs are loaded beside the default's.
    """

    def __init__(
        self,
        default: Embeddings,
        directory: Path,
        *,
        load: Callable[[ModelManifest], Awaitable[EmbedderEndpoint | ImageEmbedderEndpoint]],
        cached: Callable[[EmbedderEndpoint], Embeddings],
        max_bytes: int,
    ) -> None:
        self._default = default
        self._directory = directory
        self._load_embedder, self._cached = load, cached
        self._max_bytes = max_bytes
        #: By NAME@VERSION.
        self._registered: dict[str, Registered] = {}
        #: By name.
        self._live: dict[str, ModelManifest] = {}
        self._canaries: dict[str, tuple[Canary, ModelManifest]] = {}
        #: By NAME@VERSION, the one used last at the end.
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        #: Models are loaded one at a time, so that room made for one is not taken by another.
        self._making_room = asyncio.Lock()
        self._loads = self._evictions = self._failures = 0
        self._profiling = False

    @property
    def default(self) -> ModelManifest:
        """The model of requests that name none."""
        return self._default.manifest

    def registered(self) -> list[Registered]:
        """Every registered version, by name and version."""
        return [self._registered[name] for name in sorted(self._registered)]

    def know(self, versions: Sequence[ModelVersion]) -> None:
        """These are the versions there are now."""
        known: dict[str, Registered] = {}
        for version in versions:
            if version.kind is not ModelKind.EMBEDDING:
                continue
            model = f"{version.name}@{version.version}"
            seen = self._registered.get(model)
            if seen is not None:
                known[model] = replace(seen, version=version)
                continue
            try:
                facts = ModelManifest.of(version.manifest.encode(), self._directory)
            except ModelCorrupt as error:
                # As a newer release may have written it; the other models can do without.
                log.error("model cannot be used model=%s: %s", model, error)
                continue
            known[model] = Registered(version, _placed(facts, self._directory))
        self._registered = known
        self._live = {
            each.version.name: each.manifest
            for each in known.values()
            if each.version.state is ModelState.LIVE
        }
        self._canaries = {
            each.version.name: (Canary(model, each.version.traffic_percent), each.manifest)
            for model, each in known.items()
            if each.version.state is ModelState.CANARY
        }

    def resolve(self, name: str, field: str = "model") -> ModelManifest:
        """The model of NAME@VERSION, the live version of NAME, or the default for no name at all.

        NotFound; PreconditionFailed for a name of which no version is live.
        """
        if name in ("", self.default.model):
            return self.default
        if (found := self._registered.get(name)) is not None:
            return found.manifest
        if (live := self._live.get(name)) is not None:
            return live
        if name == self.default.name:
            return self.default
        if any(known.version.name == name for known in self._registered.values()):
            raise PreconditionFailed(f"no version of model {name!r} is live: promote one, or name it in full")
        raise NotFound("model", name, field)

    def routed(self, manifest: ModelManifest, tenant: str, key: bytes, *, dim: int = 0) -> ModelManifest:
        """The canary beside a model, for the keys that are its share and at a length that both have.

        Without one, and where the two are of different spaces, the model itself.
        """
        if (found := self._canaries.get(manifest.name)) is None:
            return manifest
        canary, other = found
        return other if _stands_in(other, manifest, dim) and canary.takes(tenant, key) else manifest

    def for_queries(self, collection: Collection, key: bytes) -> ModelManifest:
        """What embeds a collection's queries of this key: its model, or the canary beside it; see `of`."""
        return self.routed(self.of(collection), collection.tenant, key, dim=collection.dim)

    def of(self, collection: Collection) -> ModelManifest:
        """The model of a collection: of the version it is bound to or, in the same space, the live one.

        Raises unless what it makes may be compared with what is stored.
        """
        if collection.model is None:
            raise PreconditionFailed(f"collection {collection.name!r} has no model: bring a vector")
        manifest = self._find(collection.model)
        if manifest is None:
            raise PreconditionFailed(
                f"model {collection.model} of collection {collection.name!r} is not registered here"
            )
        space = space_at(manifest, collection.dim)
        if collection.space != space:
            raise SpaceMismatch(space, collection.space)
        return self._current(manifest, collection.dim)

    def variant(self, collection: Collection) -> str:
        """How the collection's texts are embedded now; empty without a model, or where it is gone."""
        manifest = self._find(collection.model) if collection.model else None
        return self._current(manifest, collection.dim).variant if manifest else ""

    def check_texts(self, texts: Sequence[str], field: str, *, truncate: bool) -> list[str]:
        """Texts within the byte limit; see Embeddings."""
        return self._default.check_texts(texts, field, truncate=truncate)

    def check_text(self, text: str, field: str, *, truncate: bool) -> str:
        """One text within the byte limit; see Embeddings."""
        return self._default.check_text(text, field, truncate=truncate)

    async def embed(
        self,
        manifest: ModelManifest,
        texts: Sequence[str],
        input_type: InputType,
        deadline: Deadline,
        *,
        dim: int = 0,
        use_cache: bool = True,
        lease: bool = False,
    ) -> Vectors:
        """A vector for every text, in order, by a model that is loaded where it is not yet.

        `dim` is a length that the model declares, 0 its own; `lease` as of Embeddings. Overloaded where
        neither the queue nor the memory has room; EmbedderUnavailable where the model's files are gone;
        DeadlineExceeded.
        """
        if manifest.image is not None:
            raise InvalidField("texts", f"model {manifest.model} takes images")
        if manifest.variant == self.default.variant:
            made = await self._default.embed(texts, input_type, deadline, use_cache=use_cache, lease=lease)
        else:
            held = await self._hold(manifest, deadline)
            assert held.embeddings is not None, "a model of texts has a cache before it"
            held.in_use += 1
            try:
                made = await held.embeddings.embed(
                    texts, input_type, deadline, use_cache=use_cache, lease=lease
                )
            finally:
                held.in_use -= 1
        if dim in (0, manifest.dim):
            return made
        return replace(made, vectors=truncated(made.vectors, dim))

    async def embed_images(
        self, manifest: ModelManifest, images: Sequence[bytes], deadline: Deadline
    ) -> EmbeddedImages:
        """A vector for every encoded picture, in order; the errors of `embed`, and InvalidField."""
        if manifest.image is None:
            raise InvalidField("images", f"model {manifest.model} takes texts")
        held = await self._hold(manifest, deadline)
        embedder = cast("ImageEmbedderEndpoint", held.embedder)
        held.in_use += 1
        try:
            return await embedder.embed(images, deadline)
        finally:
            held.in_use -= 1

    async def embed_for(
        self,
        collection: Collection,
        texts: Sequence[str],
        input_type: InputType,
        deadline: Deadline,
        *,
        use_cache: bool = True,
    ) -> Vectors:
        """Vectors of texts in a collection's space; see `of` and `embed`."""
        return await self.embed(
            self.of(collection), texts, input_type, deadline, dim=collection.dim, use_cache=use_cache
        )

    async def profile(self, manifest: ModelManifest, seconds: float, deadline: Deadline) -> Profile:
        """Which operators take the time of the next batches of a model, for so long at most.

        Its graph is loaded once more for that: Overloaded where there is no room for it beside what is in
        use. PreconditionFailed while one is profiled already; the errors of `embed`.
        """
        if self._profiling:
            raise PreconditionFailed("a model is being profiled already")
        self._profiling = True
        try:
            if manifest.variant == self.default.variant:
                await self._make_room_for(self.default)
                return await self._default.embedder.profile(seconds)
            held = await self._hold(manifest, deadline)
            held.in_use += 1
            try:
                await self._make_room_for(manifest)
                return await held.embedder.profile(seconds)
            finally:
                held.in_use -= 1
        finally:
            self._profiling = False

    async def load(self, manifest: ModelManifest, deadline: Deadline) -> None:
        """Have a model loaded before anybody waits for it; the errors of `embed`."""
        if manifest.variant != self.default.variant:
            await self._hold(manifest, deadline)

    async def forget(self, model: str) -> None:
        """A loaded model's processes have gone; the next call that needs it has it loaded again."""
        if (held := self._held.pop(model, None)) is not None:
            await held.embedder.close()

    async def close(self) -> None:
        """Give every model up but the default, which is its maker's."""
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        # At once: on Ray each takes its seconds.
        await asyncio.gather(*(held.embedder.close() for held in self._held.values()))
        self._held.clear()

    def stats(self) -> dict[str, float]:
        """What is known and loaded, the default aside."""
        return {
            "registered": len(self._registered),
            "loaded": len(self._held),
            "loaded_bytes": sum(held.graph_bytes for held in self._held.values()),
            "loads_total": self._loads,
            "failed_loads_total": self._failures,
            "evictions_total": self._evictions,
        }

    def stats_of_each(self) -> dict[str, Mapping[str, float]]:
        """What every loaded model of texts has done, by NAME@VERSION."""
        loaded = {model: held.embeddings for model, held in self._held.items()}
        every = {self.default.model: self._default, **loaded}
        return {model: each.embedder.stats() for model, each in every.items() if each is not None}

    def _find(self, model: str) -> ModelManifest | None:
        if model == self.default.model:
            return self.default
        known = self._registered.get(model)
        return known.manifest if known else None

    def _current(self, bound: ModelManifest, dim: int) -> ModelManifest:
        """The live version of a model's name where it makes the same vectors, else the model."""
        live = self._live.get(bound.name)
        return live if live is not None and _stands_in(live, bound, dim) else bound

    async def _hold(self, manifest: ModelManifest, deadline: Deadline) -> _Held:
        """The loaded model; whoever comes first loads it, and a caller who leaves does not stop that."""
        model = manifest.model
        # Again and again, as it may have made room for another before this caller's turn came.
        while (held := self._held.get(model)) is None:
            loading = self._loading.get(model)
            if loading is None:
                loading = self._loading[model] = asyncio.create_task(self._load(manifest))
                loading.add_done_callback(lambda task: self._loading.pop(model) and task.exception())
            try:
                async with asyncio.timeout(deadline.require("loading the model")):
                    await asyncio.shield(loading)
            except TimeoutError:
                raise DeadlineExceeded("loading the model") from None
        self._held.move_to_end(model)
        return held

    async def _load(self, manifest: ModelManifest) -> None:
        try:
            async with self._making_room:
                manifest = await asyncio.to_thread(self._present, manifest)
                graph_bytes = (manifest.directory / GRAPH_FILE).stat().st_size
                await self._make_room(graph_bytes)
                embedder = await self._load_embedder(manifest)
                texts = manifest.image is None
                embeddings = self._cached(cast("EmbedderEndpoint", embedder)) if texts else None
                self._held[manifest.model] = _Held(embedder, embeddings, graph_bytes)
        except (ArtifactRefused, OSError) as error:
            self._failures += 1
            raise EmbedderUnavailable(manifest.model, str(error)) from error
        except Exception:
            self._failures += 1
            raise
        self._loads += 1
        log.info("model loaded model=%s bytes=%d", manifest.model, graph_bytes)

    def _present(self, manifest: ModelManifest) -> ModelManifest:
        """The manifest of files that are there and sound, fetched again where they are not. On a thread."""
        try:
            return ModelManifest.load(manifest.directory)
        except ModelCorrupt as error:
            artifact = self._registered[manifest.model].version.artifact
            log.warning("model will be fetched again from %s: %s", artifact, error)
            fetched = fetch(artifact, self._directory)
            if fetched.variant != manifest.variant:
                raise ArtifactRefused(f"{artifact}: holds another model than was registered") from None
            return fetched

    async def _make_room_for(self, manifest: ModelManifest) -> None:
        async with self._making_room:
            await self._make_room((manifest.directory / GRAPH_FILE).stat().st_size)

    async def _make_room(self, graph_bytes: int) -> None:
        """Give up idle models until there is room; Overloaded where those in use leave too little."""
        in_use = sum(held.graph_bytes for held in self._held.values() if held.in_use)
        if in_use + graph_bytes > self._max_bytes:
            raise Overloaded("memory for models, in bytes,", self._max_bytes, retry_after_ms=1_000)
        for model, held in list(self._held.items()):
            if sum(h.graph_bytes for h in self._held.values()) + graph_bytes <= self._max_bytes:
                return
            if not held.in_use:
                del self._held[model]
                self._evictions += 1
                log.info("model given up model=%s", model)
                await held.embedder.close()


def _stands_in(other: ModelManifest, manifest: ModelManifest, dim: int) -> bool:
    """Whether the vectors of two models, at a length, may be compared."""
    return other.space == manifest.space and dim in (0, other.dim, *other.dimensions)


def space_at(manifest: ModelManifest, dim: int) -> str:
    """The space of a model's vectors at a length: its own, or that of the first `dim` values."""
    if dim in (0, manifest.dim):
        return manifest.space
    return Reduction("matryoshka", dim).space_of(manifest.space)


def require_dimension(manifest: ModelManifest, dim: int, field: str) -> int:
    """The length asked for, the model's own for 0; InvalidField for one that it does not declare."""
    if dim in (0, manifest.dim):
        return manifest.dim
    if dim not in manifest.dimensions:
        others = ", ".join(map(str, manifest.dimensions)) or "no other"
        raise InvalidField(field, f"{dim}: model {manifest.model} has {manifest.dim} and declares {others}")
    return dim


def _placed(manifest: ModelManifest, models: Path) -> ModelManifest:
    """The manifest with the directory in which a registered model lies."""
    directory = models / manifest.model / manifest.precision
    return msgspec.structs.replace(manifest, directory=directory)
