"""What the gateway asks of a shard's replica and of an embedder, wherever they run.

In one process the parts themselves answer; over several, `remote_shard.py` and `remote_embedder.py` carry
the same calls to the nodes that host them. tests/congruence runs the same cases against both.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from index_builder.models.manifest import ModelManifest
from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort
from services.deadline import Deadline
from services.embedder.embedder import Embedded, InputType
from services.embedder.images import EmbeddedImages
from services.embedder.profiling import Profile
from services.shard.layout import SegmentStatus
from services.shard.rendering import RenderedHits
from services.shard.replica import ShardAnswer
from shard_router.filters import Filter
from shard_router.model import HOME, Collection, Hit, Include, LogDelta, Version


class ShardEndpoint(Protocol):
    """One replica of a shard; `services.shard.replica.Replica` says what each call promises."""

    #: Set once the replica is down for good: it has to be opened anew.
    fell: asyncio.Event

    @property
    def endpoint(self) -> str:
        """Where it runs, as people are told."""

    @property
    def position(self) -> int:
        """What of the log it has applied, as far as is known here."""

    def followed(self) -> frozenset[int]:
        """The slots whose writes it applies, as far as is known here."""

    async def backfill(self, slots: Sequence[int]) -> None:
        """Have it follow these slots too; returns when all of their documents are there."""

    async def serve(self, epoch: int, slots: Sequence[int]) -> None:
        """Have it answer for exactly these slots from that epoch on; ValueError where it lacks one."""

    async def release(self, slots: Sequence[int]) -> None:
        """Have it follow these slots no more."""

    def offer(self, delta: LogDelta) -> bool:
        """Hand a whole committed batch over; False where the replica has to read the log instead."""

    def wake(self) -> None:
        """There is something new in the log."""

    async def wait_for(self, position: int, deadline: Deadline) -> bool:
        """Whether everything up to `position` is applied before the deadline."""

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool = False,
        effort: Effort = DEFAULT_EFFORT,
        include: Include = Include(),  # noqa: B008 - immutable
        exclude: frozenset[str] = frozenset(),
        epoch: int | None = None,
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[list[Hit]]]:
        """The best k documents of each query."""

    def search_rendered(
        self,
        queries: np.ndarray,
        k: int,
        *,
        filter: Filter | None,
        exact: bool = False,
        effort: Effort = DEFAULT_EFFORT,
        include: Include = Include(),  # noqa: B008 - immutable
        exclude: frozenset[str] = frozenset(),
        epoch: int | None = None,
        deadline: Deadline,
    ) -> Awaitable[ShardAnswer[RenderedHits]]:
        """The same, as it goes on the wire."""

    async def count(self, filter: Filter | None, *, epoch: int | None = None) -> int:
        """How many live documents pass."""

    async def matching(
        self, filter: Filter | None, limit: int, *, epoch: int | None = None
    ) -> list[tuple[str, Version]]:
        """Ids and versions of at most `limit` that pass."""

    async def vectors(self, ids: Sequence[str], *, epoch: int | None = None) -> Mapping[str, np.ndarray]:
        """The vectors of those documents that are here, float32 [dim]."""

    async def close(self) -> None:
        """Ask it nothing more."""

    def describe(self) -> Mapping[str, float]:
        """What people are told, in figures."""

    def condition(self) -> tuple[str, str]:
        """`serving`, or what else is the matter, and why."""

    def segments(self) -> Sequence[SegmentStatus]:
        """What its segments are."""

    def stats(self) -> Mapping[str, float]:
        """Figures for the metrics."""


class Shards(Protocol):
    """Where replicas are opened."""

    async def open(
        self,
        collection: Collection,
        shard: int,
        replica: int,
        *,
        database: str = HOME,
        slots: Sequence[int],
        epoch: int,
        log_id: str,
    ) -> ShardEndpoint:
        """A replica that has these slots of a database's log and answers for them at `epoch`."""

    async def forget(self, collection: Collection, shard: int, replica: int, *, database: str = HOME) -> None:
        """Remove the files of a closed replica that will not be opened again."""

    async def forget_all(self, collection: Collection) -> None:
        """Remove every file of a collection that is gone."""

    async def keep_only(self, collections: Iterable[tuple[int, int]]) -> None:
        """Remove the files of every collection but those of these (uid, generation)."""


class EmbedderEndpoint(Protocol):
    """One model of texts; `services.embedder.embedder.Embedder` says what each call promises."""

    @property
    def manifest(self) -> ModelManifest:
        """What is being run."""

    async def embed(self, texts: Sequence[str], input_type: InputType, deadline: Deadline) -> Embedded:
        """A vector for each text, in order."""

    async def profile(self, seconds: float) -> Profile:
        """Which operators take the time of its next batches."""

    async def close(self) -> None:
        """Ask it nothing more."""

    def stats(self) -> Mapping[str, float]:
        """Figures for the metrics."""


class ImageEmbedderEndpoint(Protocol):
    """One model of pictures; `services.embedder.images.ImageEmbedder` says what each call promises."""

    manifest: ModelManifest

    async def embed(self, images: Sequence[bytes], deadline: Deadline) -> EmbeddedImages:
        """A vector for each encoded picture, in order."""

    async def profile(self, seconds: float) -> Profile:
        """Which operators take the time of its next batches."""

    async def close(self) -> None:
        """Ask it nothing more."""
