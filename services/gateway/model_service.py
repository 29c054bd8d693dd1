"""ModelService: versions of embedding models come, become live, and go back."""

import asyncio
import re
from pathlib import Path

from index_builder.models.artifact import ArtifactRefused, fetch, peek
from index_builder.models.manifest import ModelManifest
from protos.ringfort import v1 as pb
from services import wire
from services.gateway.models import Models, Registered
from services.gateway.servicers import Call
from services.metadata.models import ModelState, ModelVersions
from shard_router.errors import AlreadyExists, InvalidField, NotFound, NotImplementedHere, PreconditionFailed

NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,127}")
VERSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
STATES = {
    ModelState.STAGED: pb.Model.STAGED,
    ModelState.CANARY: pb.Model.CANARY,
    ModelState.LIVE: pb.Model.LIVE,
    ModelState.RETIRED: pb.Model.RETIRED,
}


class ModelService:
    """The registry of models, kept in Postgres, with their files in the data directory.

    The default model is not registered: it comes with the release and is built where it is not there.
    """

    def __init__(self, models: Models, versions: ModelVersions, directory: Path) -> None:
        self._models = models
        self._versions = versions
        self._directory = directory
        #: Changes of the registry happen one at a time; fetching, which takes long, goes on beside them.
        self._changing = asyncio.Lock()
        #: NAME@VERSION of what is being fetched.
        self._registering: set[str] = set()

    async def open(self) -> None:
        """Learn what is registered."""
        self._models.know(await self._versions.all())

    async def Register(self, request: pb.RegisterModelRequest, call: Call) -> pb.Model:
        """Fetch, check and try a model; only one that runs is registered, and a failure leaves nothing."""
        if request.kind == pb.Model.RANKER:
            raise NotImplementedHere("registering rankers", "kind")
        if request.kind != pb.Model.EMBEDDING:
            raise InvalidField("kind", f"{request.kind} is not a kind of model")
        artifact = _artifact(request.artifact)
        try:
            manifest = await asyncio.to_thread(peek, artifact)
            _check_names(request, manifest)
            model = manifest.model
            if self._known(model):
                raise AlreadyExists("model", model)
            if model in self._registering:
                raise PreconditionFailed(f"model {model} is being registered already")
            self._registering.add(model)
            try:
                manifest = await asyncio.to_thread(fetch, artifact, self._directory)
            finally:
                self._registering.discard(model)
        except (ArtifactRefused, OSError) as error:
            raise InvalidField("artifact", str(error)) from error
        async with self._changing:
            await self._versions.register(
                name=manifest.name,
                version=manifest.version,
                artifact=artifact,
                manifest=manifest.encode().decode(),
            )
            return await self._now(model)

    async def List(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        default, registered = self._models.default, self._models.registered()
        stands_in = all(
            known.version.name != default.name or known.version.state is not ModelState.LIVE
            for known in registered
        )
        state = pb.Model.LIVE if stands_in else pb.Model.STAGED
        return pb.ListModelsResponse(
            models=[_message(default, state), *(self._registered_message(known) for known in registered)]
        )

    async def Promote(self, request: pb.PromoteModelRequest, call: Call) -> pb.Model:
        """Make a version the one that its bare name means; collections stay with the version they have."""
        async with self._changing:
            if f"{request.name}@{request.version}" == self._models.default.model:
                raise PreconditionFailed(
                    f"{request.name}@{request.version} is the release's own; "
                    "it stands in where no registered version is live"
                )
            await self._versions.promote(request.name, request.version)
            return await self._now(f"{request.name}@{request.version}")

    async def Rollback(self, request: pb.RollbackModelRequest, call: Call) -> pb.Model:
        """Make live again what was before; where that was the release's own model, this one."""
        async with self._changing:
            default = self._models.default
            await self._versions.rollback(request.name, to_none=request.name == default.name)
            await self.open()
            live = self._models.resolve(request.name, "name")
            return _message(default, pb.Model.LIVE) if live is default else await self._now(live.model)

    def _known(self, model: str) -> bool:
        return model == self._models.default.model or any(
            known.manifest.model == model for known in self._models.registered()
        )

    async def _now(self, model: str) -> pb.Model:
        """A version as it stands in the registry."""
        await self.open()
        for known in self._models.registered():
            if known.manifest.model == model:
                return self._registered_message(known)
        raise NotFound("model", model, "name")

    @staticmethod
    def _registered_message(known: Registered) -> pb.Model:
        message = _message(known.manifest, STATES[known.version.state])
        message.registered_at.CopyFrom(wire.timestamp(known.version.registered_at_us))
        return message


def _artifact(address: str) -> str:
    """An absolute path or a URL, without a slash at its end; InvalidField."""
    if "://" not in address and not Path(address).is_absolute():
        raise InvalidField("artifact", f"{address!r} is neither an absolute path nor a URL")
    return address.rstrip("/")


def _check_names(request: pb.RegisterModelRequest, manifest: ModelManifest) -> None:
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


def _message(manifest: ModelManifest, state: "pb.Model.State.ValueType") -> pb.Model:
    return pb.Model(
        name=manifest.name,
        version=manifest.version,
        kind=pb.Model.EMBEDDING,
        state=state,
        traffic_percent=100 if state == pb.Model.LIVE else 0,
        space=manifest.space,
        variant=manifest.variant,
        dim=manifest.dim,
        max_tokens=manifest.max_tokens,
        precision=manifest.precision,
    )
