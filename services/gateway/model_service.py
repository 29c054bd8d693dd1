"""ModelService: versions of embedding models and rankers come, are tried, become live, and go back."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from index_builder.models.artifact import ArtifactRefused, fetch, peek, read
from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from services import wire
from services.gateway.models import Models, Registered
from services.gateway.rankers import RESERVED, Rankers, RegisteredRanker
from services.gateway.servicers import Call
from services.metadata.models import ModelKind, ModelState, ModelVersions
from services.ranker.manifest import RankerManifest, RankerRefused
from shard_router.errors import AlreadyExists, InvalidField, NotFound, PreconditionFailed, SpaceMismatch

NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,127}")
VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
STATES = {
    ModelState.STAGED: pb.Model.STAGED,
    ModelState.CANARY: pb.Model.CANARY,
    ModelState.LIVE: pb.Model.LIVE,
    ModelState.RETIRED: pb.Model.RETIRED,
}


class ModelService:
    """The registry of models and rankers, kept in Postgres, with models' files in the data directory.

    The default model is not registered: it comes with the release and is built where it is not there.
    """

    def __init__(self, models: Models, rankers: Rankers, versions: ModelVersions, directory: Path) -> None:
        self._models = models
        self._rankers = rankers
        self._versions = versions
        self._directory = directory
        #: Changes of the registry happen one at a time; fetching, which takes long, goes on beside them.
        self._changing = asyncio.Lock()
        #: NAME@VERSION of what is being fetched.
        self._registering: set[str] = set()
        #: Told of every change; whoever asked for it hears of it when all have been told.
        self.on_change: list[Callable[[], Awaitable[None]]] = []

    async def open(self) -> None:
        """Learn what is registered."""
        versions = await self._versions.all()
        self._models.know(versions)
        self._rankers.know(versions)

    async def Register(self, request: pb.RegisterModelRequest, call: Call) -> pb.Model:
        """Fetch, check and try a model; only one that runs is registered, and a failure leaves nothing."""
        if request.kind not in (pb.Model.EMBEDDING, pb.Model.RANKER):
            raise InvalidField("kind", f"{request.kind} is not a kind of model")
        artifact = _artifact(request.artifact)
        manifest: ModelManifest | RankerManifest
        try:
            if request.kind == pb.Model.RANKER:
                kind, manifest = ModelKind.RANKER, await self._ranker(request, artifact)
            else:
                kind, manifest = ModelKind.EMBEDDING, await self._model(request, artifact)
        except (ArtifactRefused, OSError) as error:
            raise InvalidField("artifact", str(error)) from error
        except RankerRefused as error:
            raise InvalidField("artifact", f"{artifact}: {error}") from error
        async with self._changing:
            await self._versions.register(
                name=manifest.name,
                version=manifest.version,
                kind=kind,
                artifact=artifact,
                manifest=manifest.encode().decode(),
            )
            return await self._now(manifest.model)

    async def _model(self, request: pb.RegisterModelRequest, artifact: str) -> ModelManifest:
        """An embedding model's manifest, its files in their place; AlreadyExists, PreconditionFailed."""
        manifest = await asyncio.to_thread(peek, artifact)
        _check_names(request, manifest)
        model = manifest.model
        if model == self._models.default.model or self._registered(model):
            raise AlreadyExists("model", model)
        if any(ranker.version.name == manifest.name for ranker in self._rankers.registered()):
            raise AlreadyExists("ranker", manifest.name)
        if model in self._registering:
            raise PreconditionFailed(f"model {model} is being registered already")
        self._registering.add(model)
        try:
            return await asyncio.to_thread(fetch, artifact, self._directory)
        finally:
            self._registering.discard(model)

    async def _ranker(self, request: pb.RegisterModelRequest, artifact: str) -> RankerManifest:
        """A ranker's manifest, which is all there is of it; AlreadyExists."""
        manifest = RankerManifest.of(await asyncio.to_thread(read, artifact))
        _check_names(request, manifest)
        if manifest.name in (*RESERVED, self._models.default.name):
            raise AlreadyExists("model", manifest.name)
        return manifest

    async def List(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        default, registered = self._models.default, self._models.registered()
        stands_in = all(
            known.version.name != default.name or known.version.state is not ModelState.LIVE
            for known in registered
        )
        own = self._own_message(pb.Model.LIVE if stands_in else pb.Model.STAGED)
        return pb.ListModelsResponse(models=[own, *map(self._message, self._all())])

    async def SetTraffic(self, request: pb.SetTrafficRequest, call: Call) -> pb.Model:
        """Make a version the canary beside the live one, or end it with 0.

        An embedding model has to be of the live one's space, and is loaded before it gets any traffic.
        """
        if request.percent > 100:
            raise InvalidField("percent", f"{request.percent} is more than 100")
        model = f"{request.name}@{request.version}"
        async with self._changing:
            self._require_registered(model)
            if request.percent:
                await self._require_comparable(model, call)
            await self._versions.set_traffic(request.name, request.version, request.percent)
            return await self._now(model)

    async def Promote(self, request: pb.PromoteModelRequest, call: Call) -> pb.Model:
        """Make a version the one that its bare name means; its name's canary, this or another, ends.

        Collections stay in the space they have, whatever becomes live.
        """
        model = f"{request.name}@{request.version}"
        async with self._changing:
            self._require_registered(model)
            await self._versions.promote(request.name, request.version)
            return await self._now(model)

    async def Rollback(self, request: pb.RollbackModelRequest, call: Call) -> pb.Model:
        """Take back the last step of a name: end its canary or else make live what was before.

        The answer is what is live then; it may be the release's own model.
        """
        async with self._changing:
            default = self._models.default
            await self._versions.rollback(request.name, to_none=request.name == default.name)
            await self._changed()
            for known in self._all():
                if known.version.name == request.name and known.version.state is ModelState.LIVE:
                    return self._message(known)
            return self._own_message(pb.Model.LIVE)

    async def _changed(self) -> None:
        await self.open()
        for tell in self.on_change:
            await tell()

    def _require_registered(self, model: str) -> None:
        """PreconditionFailed for the release's own model, whose state nobody sets."""
        if model == self._models.default.model:
            raise PreconditionFailed(
                f"{model} is the release's own; it stands in where no registered version is live"
            )

    async def _require_comparable(self, model: str, call: Call) -> None:
        """That a version can take a share of what is live; a version that is not there is told elsewhere."""
        known = self._registered(model)
        if known is None:
            return
        if isinstance(known, RegisteredRanker):
            self._rankers.require_live(known.version.name)
            return
        live = self._models.resolve(known.version.name, "name")
        if known.manifest.space != live.space:
            raise SpaceMismatch(known.manifest.space, live.space)
        await self._models.load(known.manifest, call.deadline)

    def _all(self) -> list[Registered | RegisteredRanker]:
        return [*self._models.registered(), *self._rankers.registered()]

    def _registered(self, model: str) -> Registered | RegisteredRanker | None:
        for known in self._all():
            if known.manifest.model == model:
                return known
        return None

    async def _now(self, model: str) -> pb.Model:
        """A version as it stands in the registry, which has changed."""
        await self._changed()
        known = self._registered(model)
        if known is None:
            raise NotFound("model", model, "name")
        return self._message(known)

    def _message(self, known: Registered | RegisteredRanker) -> pb.Model:
        version = known.version
        message = pb.Model(name=version.name, version=version.version, state=STATES[version.state])
        if isinstance(known, RegisteredRanker):
            message.kind, message.variant = pb.Model.RANKER, known.manifest.variant
        else:
            _describe(message, known.manifest)
        if version.state is ModelState.LIVE:
            message.traffic_percent = 100 - self._canary_percent(version.name)
        else:
            message.traffic_percent = version.traffic_percent
        message.registered_at.CopyFrom(wire.timestamp(version.registered_at_us))
        return message

    def _own_message(self, state: "pb.Model.State.ValueType") -> pb.Model:
        """The release's own model."""
        default = self._models.default
        message = pb.Model(name=default.name, version=default.version, state=state)
        if state == pb.Model.LIVE:
            message.traffic_percent = 100 - self._canary_percent(default.name)
        _describe(message, default)
        return message

    def _canary_percent(self, name: str) -> int:
        """What a canary takes of a name's traffic."""
        return sum(each.version.traffic_percent for each in self._all() if each.version.name == name)


def _artifact(address: str) -> str:
    """An absolute path or a URL, without a slash at its end; InvalidField."""
    if "://" not in address and not Path(address).is_absolute():
        raise InvalidField("artifact", f"{address!r} is neither an absolute path nor a URL")
    return address.rstrip("/")


def _check_names(request: pb.RegisterModelRequest, manifest: ModelManifest | RankerManifest) -> None:
    for field, pattern, asked, said in (
        ("name", NAME, request.name, manifest.name),
        ("version", VERSION, request.version, manifest.version),
    ):
        if not pattern.fullmatch(said):
            raise InvalidField(
                "artifact", f"the manifest's {field} {said!r} is not letters, digits, . _ and -"
            )
        if asked not in ("", said):
            raise InvalidField(field, f"is {asked!r}, the artifact's manifest says {said!r}")


def _describe(message: pb.Model, manifest: ModelManifest) -> None:
    """Say of a message what an embedding model's manifest says."""
    message.space, message.variant, message.precision = manifest.space, manifest.variant, manifest.precision
    message.dim, message.max_tokens = manifest.dim, manifest.max_tokens
