"""Versions of models, and which of them is live."""

from dataclasses import dataclass
from enum import StrEnum

from services.metadata.database import Connection, Database
from services.metadata.ownership import REGAIN_WAIT_S, Ownership
from services.metadata.statements import bare_statement
from shard_router.errors import AlreadyExists, NotFound, PreconditionFailed


class ModelState(StrEnum):
    """What a version is to its name: a request that names no version gets the live one."""

    STAGED = "staged"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One registered version. `manifest` is the model's own, as JSON; `artifact` is where it came from."""

    name: str
    version: str
    state: ModelState
    artifact: str
    manifest: str
    registered_at_us: int


class ModelVersions:
    """The registry of models; one change of a name at a time, and by the one service that may.

    Every method raises StorageUnavailable, DeadlineExceeded, Overloaded.
    """

    def __init__(self, database: Database, ownership: Ownership) -> None:
        self._database = database
        self._ownership = ownership

    async def all(self) -> list[ModelVersion]:
        """Every version, by name and version."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("models"))
            return [
                ModelVersion(name, version, ModelState(state), artifact, manifest, registered_at_us)
                for name, version, state, artifact, manifest, registered_at_us in await cursor.fetchall()
            ]

    async def register(self, *, name: str, version: str, artifact: str, manifest: str) -> ModelVersion:
        """A new version, staged; AlreadyExists."""
        values = {"name": name, "version": version, "artifact": artifact, "manifest": manifest}
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("register_model"), values)
            row = await cursor.fetchone()
        if row is None:
            raise AlreadyExists("model", f"{name}@{version}")
        return ModelVersion(name, version, ModelState.STAGED, artifact, manifest, row[0])

    async def promote(self, name: str, version: str) -> None:
        """Make a version the live one of its name; what was live is retired. NotFound."""
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            states = {v: state for v, state, _ in await _locked(connection, name)}
            if version not in states:
                raise NotFound("model", f"{name}@{version}", "version" if states else "name")
            if states[version] != ModelState.LIVE:
                await connection.execute(bare_statement("retire_model"), {"name": name})
                await connection.execute(bare_statement("promote_model"), {"name": name, "version": version})

    async def rollback(self, name: str, *, to_none: bool) -> None:
        """Make live again what was before the live version of a name; that one is retired.

        Where nothing was before it, none is live with `to_none`; otherwise, and where none is live,
        PreconditionFailed. NotFound for a name without versions.
        """
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            rows = await _locked(connection, name)
            if not rows:
                raise NotFound("model", name, "name")
            turn = next((promotion for _, state, promotion in rows if state == ModelState.LIVE), None)
            if turn is None:
                raise PreconditionFailed(f"no version of model {name!r} is live")
            before = [
                (promotion, version)
                for version, state, promotion in rows
                if state == ModelState.RETIRED and promotion is not None and promotion < turn
            ]
            if not before and not to_none:
                raise PreconditionFailed(f"no version of model {name!r} was live before this one")
            await connection.execute(bare_statement("withdraw_model"), {"name": name})
            if before:
                values = {"name": name, "version": max(before)[1]}
                await connection.execute(bare_statement("restore_model"), values)


async def _locked(connection: Connection, name: str) -> list[tuple[str, str, int | None]]:
    """The versions of a name with state and turn, nobody else's to change until the transaction ends."""
    cursor = await connection.execute(bare_statement("lock_model"), {"name": name})
    return [(version, state, promotion) for version, state, promotion in await cursor.fetchall()]
