"""Embeds pictures: decoded, prepared and run on threads, bounded like texts."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from index_builder.models.engine import Engine, EngineUnavailable
from index_builder.models.manifest import GRAPH_FILE, ImageInput, ModelManifest
from index_builder.models.pictures import INSTALL_COMMAND, PictureRefused, can_decode, prepared
from services.deadline import Deadline
from services.embedder.profiling import Profile, profile
from shard_router.errors import DeadlineExceeded, EmbedderUnavailable, InvalidField, Overloaded

#: Pictures of one call that are run together; a worker turns to the next call's after so many.
BATCH_IMAGES = 8


@dataclass(frozen=True, slots=True)
class EmbeddedImages:
    """Pictures as vectors, float32 [n, dim], in order; the times of parts that ran side by side add up."""

    vectors: np.ndarray
    queue_ms: float
    decode_ms: float
    inference_ms: float


class ImageEmbedder:
    """One image model for many callers; `workers` threads take a few pictures of a call at a time.

    At most `queue_images` wait or run.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        engine: Engine,
        image: ImageInput,
        *,
        workers: int,
        queue_images: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = manifest
        self._engine, self._image, self._clock = engine, image, clock
        self._queue_images = queue_images
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="images")
        #: Pictures that wait or run; touched on the event loop only.
        self._held = 0

    @classmethod
    def load(
        cls, manifest: ModelManifest, *, workers: int, queue_images: int, device: str = "cpu"
    ) -> "ImageEmbedder":
        """A loaded image model; EmbedderUnavailable where its runtime, decoder or device is missing."""
        if manifest.image is None:
            raise EmbedderUnavailable(manifest.model, "it is no image model")
        if not can_decode():
            raise EmbedderUnavailable(manifest.model, f"pictures need Pillow; run: {INSTALL_COMMAND}")
        try:
            engine = Engine.load(
                manifest.directory / GRAPH_FILE,
                threads=manifest.threads,
                device=device,
                precision=manifest.precision,
            )
        except EngineUnavailable as error:
            raise EmbedderUnavailable(manifest.model, str(error)) from error
        return cls(manifest, engine, manifest.image, workers=workers, queue_images=queue_images)

    async def embed(self, images: Sequence[bytes], deadline: Deadline) -> EmbeddedImages:
        """A vector for each encoded picture, in order.

        InvalidField names the first picture that cannot be decoded; Overloaded; DeadlineExceeded;
        EmbedderUnavailable where the model fails.
        """
        left_s = deadline.require("the queue for images")
        if self._held + len(images) > self._queue_images:
            raise Overloaded("the queue for images", self._queue_images)
        came_s = self._clock()
        gone = threading.Event()
        parts = [
            self._threads.submit(self._run, images[i : i + BATCH_IMAGES], i, came_s, came_s + left_s, gone)
            for i in range(0, len(images), BATCH_IMAGES)
        ]
        self._hold(parts, len(images))
        try:
            async with asyncio.timeout(left_s):
                done = await asyncio.gather(*map(asyncio.wrap_future, parts))
        except TimeoutError:
            raise DeadlineExceeded("embedding images") from None
        finally:
            gone.set()
            for part in parts:
                part.cancel()
        return EmbeddedImages(
            np.concatenate([part.vectors for part in done]),
            max(part.queue_ms for part in done),
            sum(part.decode_ms for part in done),
            sum(part.inference_ms for part in done),
        )

    async def profile(self, seconds: float) -> Profile:
        """Which operators take the time of the next batches, for so long at most; EmbedderUnavailable."""
        try:
            return await profile(self._engine, seconds)
        except EngineUnavailable as error:
            raise EmbedderUnavailable(self.manifest.model, str(error)) from error

    async def close(self) -> None:
        """Cancel what waits, finish what runs, end the threads."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def _hold(self, parts: "Sequence[Future[EmbeddedImages]]", count: int) -> None:
        """Count a call's pictures until its last part has ended, also where its caller left before."""
        self._held += count
        loop = asyncio.get_running_loop()
        left = len(parts)

        def release() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._held -= count

        def ended(_: "Future[EmbeddedImages]") -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(release)

        for part in parts:
            part.add_done_callback(ended)

    def _run(
        self, images: Sequence[bytes], first: int, came_s: float, until_s: float, gone: threading.Event
    ) -> EmbeddedImages:
        """Some pictures of a call, on a thread."""
        began_s = self._clock()
        if began_s >= until_s or gone.is_set():
            raise DeadlineExceeded("the queue for images")
        rows = []
        for i, data in enumerate(images, first):
            try:
                rows.append(prepared(data, self._image))
            except PictureRefused as error:
                raise InvalidField(f"images[{i}]", str(error)) from None
        decoded_s = self._clock()
        try:
            vectors = self._engine.run({self._image.input: np.stack(rows)})
        except Exception as error:  # the runtime raises plain Exceptions of its own making
            raise EmbedderUnavailable(self.manifest.model, str(error)) from error
        done_s = self._clock()
        return EmbeddedImages(
            vectors, (began_s - came_s) * 1e3, (decoded_s - began_s) * 1e3, (done_s - decoded_s) * 1e3
        )
