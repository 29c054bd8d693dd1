"""Reads what was not verified at the start, while searches are served already."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence

from index_builder.segments.segment import Segment
from shard_router.errors import SegmentCorrupt

log = logging.getLogger(__name__)

#: Reading faster would take the disk from searches and seals.
_BYTES_PER_S = 256 << 20


class _GivenUp(Exception):
    """The replica is closing."""


class Verification:
    """Compares every byte of some segments with its checksum, one segment after another, unhurriedly."""

    def __init__(self, segments: Sequence[Segment], on_corrupt: Callable[[str, str], None]) -> None:
        """`on_corrupt` is told the name of a damaged segment, and how; on the event loop."""
        self._segments, self._on_corrupt = segments, on_corrupt
        self._closing = threading.Event()
        self._read_bytes = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin reading."""
        self._task = asyncio.create_task(self._run(), name="verify segments")

    @property
    def unverified_bytes(self) -> int:
        """Bytes that no checksum vouches for yet."""
        return sum(segment.size_bytes for segment in self._segments) - self._read_bytes

    async def close(self) -> None:
        """Give up."""
        self._closing.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while self._segments:
            segment = self._segments[0]
            before_bytes = self._read_bytes
            try:
                await asyncio.to_thread(segment.verify, self._pace)
            except SegmentCorrupt as error:
                self._on_corrupt(segment.name, error.why)
            except _GivenUp:
                return
            except Exception:
                log.exception("segment %s could not be verified", segment.directory)
            self._read_bytes = before_bytes
            self._segments = self._segments[1:]

    def _pace(self, read_bytes: int) -> None:
        self._read_bytes += read_bytes
        if self._closing.wait(read_bytes / _BYTES_PER_S):
            raise _GivenUp
