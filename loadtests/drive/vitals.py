"""What a service holds, sampled while it works: memory, handles, threads, connections, queues."""

import threading
import time
from collections.abc import Mapping
from types import TracebackType

import psutil

from loadtests.drive.growth import Bound, Growth, growth
from loadtests.service import Service
from ringfort.scrape import Scrape, fetch

#: What may be held at the end beyond the beginning.
BOUNDS: Mapping[str, Bound] = {
    # Beyond what bounded caches say they hold; one of 8 MiB, of rendered rows, does not say.
    "memory_bytes": Bound(24 * 2**20, 0.05),
    # Segments come with every seal and go with every merge of eight, so their number swings.
    "segments": Bound(8),
    "handles": Bound(8),
    "threads": Bound(4),
    "connections": Bound(4),
    "queued": Bound(32),
}
#: Handles of an open segment: its files are mapped.
_SEGMENT_HANDLES = 3
_CACHES = ("ringfort_cache_l1_bytes", "ringfort_shard_filter_cache_bytes")
_QUEUES = (
    "ringfort_embedder_queue_texts",
    "ringfort_shard_waiting_queries",
    "ringfort_metadata_waiting_batches",
    "ringfort_metadata_pool_waiting",
    "ringfort_cache_redis_writes_pending",
    "ringfort_shard_frozen_memtables",
)


class Vitals:
    """Samples a service every so often, in a thread; a context manager."""

    def __init__(self, service: Service, *, every_s: float) -> None:
        self._service, self._every_s = service, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vitals", daemon=True)
        self._failed: Exception | None = None
        #: By second of the run.
        self.samples: list[tuple[float, dict[str, float]]] = []

    def growths(self) -> list[Growth]:
        """The trend of every figure, each within its bound or not."""
        if self._failed is not None:
            raise self._failed
        at_s = [at_s for at_s, _ in self.samples]
        return [
            growth(name, at_s, [figures[name] for _, figures in self.samples], bound)
            for name, bound in BOUNDS.items()
        ]

    def told(self) -> list[dict[str, float]]:
        """All samples as JSON values."""
        return [{"at_s": at_s, **figures} for at_s, figures in self.samples]

    def __enter__(self) -> "Vitals":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        began_s, process = time.monotonic(), psutil.Process(self._service.pid)
        try:
            while not self._stop.wait(self._every_s):
                figures = self._figures(process, fetch(self._service.http))
                self.samples.append((time.monotonic() - began_s, figures))
        except Exception as error:
            self._failed = error

    def _figures(self, process: psutil.Process, scrape: Scrape) -> dict[str, float]:
        segments = scrape.value("ringfort_shard_segments")
        return {
            # Of its own: pages of mapped segments are the system's to keep or take back.
            "memory_bytes": self._service.resident()["Pss_Anon"] - sum(map(scrape.value, _CACHES)),
            "segments": segments,
            "handles": process.num_fds() - _SEGMENT_HANDLES * segments,
            "threads": float(process.num_threads()),
            "connections": float(len(process.net_connections("tcp"))),
            "queued": sum(scrape.value(name) for name in _QUEUES),
        }
