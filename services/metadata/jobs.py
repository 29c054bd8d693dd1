"""Long operations on collections, as they are remembered."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import psycopg

from services.metadata.database import Database
from services.metadata.ownership import REGAIN_WAIT_S, Ownership
from services.metadata.statements import bare_statement
from shard_router.errors import NotFound, PreconditionFailed
from shard_router.model import Collection


class JobState(StrEnum):
    """Where a job stands."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job; `argument` is the shard, the number of replicas or the generation it is about."""

    id: str
    collection_uid: int
    kind: str
    state: JobState
    argument: int
    message: str
    started_at_us: int
    ended_at_us: int | None
    #: What it has found out, by name.
    figures: Mapping[str, float]


class Jobs:
    """The list of jobs. Every method raises what the store raises."""

    def __init__(self, database: Database, ownership: Ownership) -> None:
        self._database = database
        self._ownership = ownership

    async def begin(self, collection: Collection, kind: str, argument: int) -> JobRecord:
        """A new job, running; PreconditionFailed while another of the collection does, NotFound."""
        await self._ownership.require(REGAIN_WAIT_S)
        values = {"id": uuid.uuid4(), "uid": collection.uid, "kind": kind, "argument": argument}
        try:
            async with self._database.connection() as connection:
                cursor = await connection.execute(bare_statement("begin_job"), values)
                row = await cursor.fetchone()
        except psycopg.errors.UniqueViolation:
            raise PreconditionFailed(f"another job of collection {collection.name} is running") from None
        except psycopg.errors.ForeignKeyViolation:
            raise NotFound("collection", collection.name) from None
        assert row is not None, "it was inserted"
        return _record(row)

    async def end(
        self, id: str, state: JobState, message: str, figures: Mapping[str, float] | None = None
    ) -> JobRecord | None:
        """A running job has ended so; None where it is not there, or is not running."""
        await self._ownership.require(REGAIN_WAIT_S)
        values = {
            "id": uuid.UUID(id),
            "state": state.value,
            "message": message,
            "figures": json.dumps(figures or {}),
        }
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("end_job"), values)
            row = await cursor.fetchone()
        return None if row is None else _record(row)

    async def all(self, uids: list[int]) -> list[JobRecord]:
        """The jobs of these collections, the latest first."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("jobs"), {"uids": uids})
            return [_record(row) for row in await cursor.fetchall()]

    async def running(self) -> list[JobRecord]:
        """The jobs of every collection that are running, or were when the service stopped."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(bare_statement("running_jobs"))
            return [_record(row) for row in await cursor.fetchall()]


def _record(row: tuple[Any, ...]) -> JobRecord:
    id, uid, kind, state, *rest = row
    return JobRecord(str(id), uid, kind, JobState(state), *rest)
