"""Versions of models, which of them is live, and which a canary beside it."""

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


class ModelKind(StrEnum):
    """What a version does; all versions of a name do the same."""

    EMBEDDING = "embedding"
    RANKER = "ranker"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One registered version. `manifest` is the model's own, as JSON; `artifact` is where it came from.

    `traffic_percent`: a canary's share of its name's traffic, 1 to 100; 0 for any other.
    """

    name: str
    version: str
    kind: ModelKind
    state: ModelState
    traffic_percent: int
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
                ModelVersion(name, version, ModelKind(kind), ModelState(state), *rest)
                for name, version, kind, state, *rest in await cursor.fetchall()
            ]

    async def register(
        self, *, name: str, version: str, kind: ModelKind, artifact: str, manifest: str
    ) -> ModelVersion:
        """A new version, staged; AlreadyExists, also for a name that is of another kind."""
        values = {"name": name, "version": version, "kind": kind, "artifact": artifact, "manifest": manifest}
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            # Whoever registers the first version of a name has nothing to lock but the table.
            await connection.execute(bare_statement("lock_models"))
            cursor = await connection.execute(bare_statement("model_kind"), {"name": name})
            known = await cursor.fetchone()
            if known is not None and known[0] != kind:
                raise AlreadyExists(known[0], name)
            cursor = await connection.execute(bare_statement("register_model"), values)
            row = await cursor.fetchone()
        if row is None:
            raise AlreadyExists("model", f"{name}@{version}")
        return ModelVersion(name, version, kind, ModelState.STAGED, 0, artifact, manifest, row[0])

    async def promote(self, name: str, version: str) -> None:
        """Make a version the live one of its name; what was live is retired, a canary ends. NotFound."""
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            states = await _states(connection, name, version)
            if states[version] != ModelState.LIVE:
                await connection.execute(bare_statement("end_canary"), {"name": name})
                await connection.execute(bare_statement("retire_model"), {"name": name})
                await connection.execute(bare_statement("promote_model"), {"name": name, "version": version})

    async def set_traffic(self, name: str, version: str, percent: int) -> None:
        """Make a version the canary of its name with this share of the traffic; 0 ends it.

        PreconditionFailed for the live version, and while another is the canary. NotFound.
        """
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            states = await _states(connection, name, version)
            if states[version] == ModelState.LIVE:
                raise PreconditionFailed(f"{name}@{version} is live: it has what no canary takes")
            others = [v for v, state in states.items() if state == ModelState.CANARY and v != version]
            if percent and others:
                raise PreconditionFailed(f"{name}@{others[0]} is the canary: end it first, or promote it")
            if percent:
                values = {"name": name, "version": version, "percent": percent}
                await connection.execute(bare_statement("begin_canary"), values)
            elif states[version] == ModelState.CANARY:
                await connection.execute(bare_statement("end_canary"), {"name": name})

    async def rollback(self, name: str, *, to_none: bool) -> None:
        """Take back the last step of a name: its canary ends, or else what was live before is so again.

        The version that was live is retired then. Where nothing was before it, none is live with `to_none`;
        otherwise, and where none is live, PreconditionFailed. NotFound for a name without versions.
        """
        await self._ownership.require(REGAIN_WAIT_S)
        async with self._database.connection() as connection, connection.transaction():
            rows = await _locked(connection, name)
            if not rows:
                raise NotFound("model", name, "name")
            if any(state == ModelState.CANARY for _, state, _ in rows):
                await connection.execute(bare_statement("end_canary"), {"name": name})
                return
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


async def _states(connection: Connection, name: str, version: str) -> dict[str, str]:
    """The states of a name's versions, locked; NotFound where `version` is none of them."""
    states = {v: state for v, state, _ in await _locked(connection, name)}
    if version not in states:
        raise NotFound("model", f"{name}@{version}", "version" if states else "name")
    return states
