"""Pictures are embedded in order; one that is none fails its call and names itself; the queue is bounded."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the extra `images` is not here")

from image_model import PREPARATION, picture, vector_of, write_graph

from index_builder.models.image_release import release_images
from index_builder.models.manifest import ModelManifest
from services.deadline import Deadline
from services.embedder.images import BATCH_IMAGES, ImageEmbedder
from shard_router.errors import DeadlineExceeded, EmbedderUnavailable, InvalidField, Overloaded


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ModelManifest:
    directory = tmp_path_factory.mktemp("images")
    graph = write_graph(directory / "graph.onnx")
    return release_images(graph, directory, "projection@1", "features", PREPARATION)


def loaded(manifest: ModelManifest, queue_images: int = 64) -> ImageEmbedder:
    return ImageEmbedder.load(manifest, workers=2, queue_images=queue_images)


async def test_every_picture_gets_its_vector(manifest: ModelManifest) -> None:
    embedder = loaded(manifest)
    count = 2 * BATCH_IMAGES + 3
    made = await embedder.embed([picture(i) for i in range(count)], Deadline.after(30))
    assert np.allclose(made.vectors, [vector_of(i) for i in range(count)], atol=1e-5)
    assert made.decode_ms > 0
    assert made.inference_ms > 0
    await embedder.close()


async def test_what_is_no_picture_is_named(manifest: ModelManifest) -> None:
    embedder = loaded(manifest)
    images = [picture(i) for i in range(BATCH_IMAGES + 3)]
    images[BATCH_IMAGES + 1] = b"no picture"
    with pytest.raises(InvalidField) as refused:
        await embedder.embed(images, Deadline.after(30))
    assert refused.value.field == f"images[{BATCH_IMAGES + 1}]"
    assert len((await embedder.embed(images[:2], Deadline.after(30))).vectors) == 2
    await embedder.close()


class Held:
    """A model that runs when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = threading.Semaphore(0)

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.running.release()
        assert self.go.wait(10)
        return np.zeros((len(inputs["pixels"]), 16), np.float32)


async def test_a_full_queue_refuses_and_recovers(manifest: ModelManifest) -> None:
    model = Held()
    embedder = ImageEmbedder(manifest, cast(Any, model), PREPARATION, workers=1, queue_images=3)
    first = asyncio.create_task(embedder.embed([picture(1), picture(2)], Deadline.after(30)))
    await asyncio.to_thread(model.running.acquire)
    with pytest.raises(Overloaded):
        await embedder.embed([picture(3), picture(4)], Deadline.after(30))
    # It fits, waits for the one worker, and its caller has no time.
    with pytest.raises(DeadlineExceeded):
        await embedder.embed([picture(5)], Deadline.after(0.01))
    model.go.set()
    assert len((await first).vectors) == 2
    assert len((await embedder.embed([picture(i) for i in range(3)], Deadline.after(30))).vectors) == 3
    await embedder.close()


async def test_a_caller_who_leaves_gives_room_once_its_pictures_are_done(manifest: ModelManifest) -> None:
    model = Held()
    embedder = ImageEmbedder(manifest, cast(Any, model), PREPARATION, workers=1, queue_images=1)
    leaving = asyncio.create_task(embedder.embed([picture(1)], Deadline.after(30)))
    await asyncio.to_thread(model.running.acquire)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    with pytest.raises(Overloaded):
        await embedder.embed([picture(1)], Deadline.after(30))
    model.go.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert len((await embedder.embed([picture(1)], Deadline.after(30))).vectors) == 1
                break
            except Overloaded:
                await asyncio.sleep(0.001)
    await embedder.close()


async def test_a_model_that_fails_says_so(manifest: ModelManifest) -> None:
    class Broken:
        def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            raise RuntimeError("out of luck")

    embedder = ImageEmbedder(manifest, cast(Any, Broken()), PREPARATION, workers=1, queue_images=9)
    with pytest.raises(EmbedderUnavailable, match="out of luck"):
        await embedder.embed([picture(1)], Deadline.after(30))
    await embedder.close()


def test_a_missing_decoder_is_told_with_the_command(
    manifest: ModelManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.embedder import images

    monkeypatch.setattr(images, "can_decode", lambda: False)
    with pytest.raises(EmbedderUnavailable, match=r"pip install 'ringfort\[images\]'"):
        loaded(manifest)


def test_a_model_without_files_is_told(manifest: ModelManifest, tmp_path: Path) -> None:
    import msgspec

    with pytest.raises(EmbedderUnavailable, match=r"projection@1"):
        loaded(msgspec.structs.replace(manifest, directory=tmp_path))
