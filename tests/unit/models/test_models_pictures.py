"""Pictures are prepared as the manifest says, and what is none is refused before it costs anything."""

import io
import struct
import sys
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("PIL", reason="the extra `images` is not here")

from image_model import PREPARATION, SIDE, picture, pixels_of, vector_of, write_graph
from PIL import Image

from index_builder.models.engine import Engine
from index_builder.models.image_release import release_images
from index_builder.models.manifest import ImageInput, ModelManifest
from index_builder.models.pictures import MAX_PIXELS, PictureRefused, prepared
from index_builder.models.release import ReleaseRefused
from index_builder.models.source import ModelMissing, ModelUnsupported

PLAIN = ImageInput(input="x", width=SIDE, height=SIDE, scale=1)


def saying(**facts: object) -> ImageInput:
    return msgspec.structs.replace(PLAIN, **facts)


def stripes(width: int, height: int) -> bytes:
    """Left third red, middle green, right blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        pixels[:, width * channel // 3 : width * (channel + 1) // 3, channel] = 255
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "PNG")
    return made.getvalue()


def test_channels_layout_and_scale_are_the_manifests() -> None:
    data, wanted = picture(1), pixels_of(1).astype(np.float32)
    assert np.array_equal(prepared(data, saying(layout="HWC")), wanted)
    assert np.array_equal(prepared(data, PLAIN), wanted.transpose(2, 0, 1))
    assert np.array_equal(prepared(data, saying(layout="HWC", channels="BGR")), wanted[:, :, ::-1])
    shifted = prepared(data, saying(layout="HWC", channels="BGR", mean=(3, 2, 1), std=(1, 2, 4)))
    assert np.allclose(shifted, (wanted[:, :, ::-1] - (3, 2, 1)) / (1, 2, 4))


def test_sizes_are_stretched_cut_or_padded() -> None:
    data = stripes(96, 32)
    stretched = prepared(data, saying(resize="stretch", layout="HWC"))
    assert stretched[:, 0].mean(axis=0).argmax() == 0
    assert stretched[:, -1].mean(axis=0).argmax() == 2
    cut = prepared(data, saying(resize="crop", layout="HWC"))
    assert (cut.argmax(axis=2)[:, 1:-1] == 1).all(), "only the middle is left"
    padded = prepared(data, saying(resize="pad", layout="HWC"))
    assert (padded[[0, -1]] == 0).all()
    assert padded[SIDE // 2].sum() > 0
    near = prepared(data, saying(resize="crop", shorter_side=4 * SIDE, layout="HWC"))
    assert np.array_equal(near[:, :, 1], np.full((SIDE, SIDE), 255.0))
    for made in (stretched, cut, padded, near):
        assert made.shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_usual_kinds_of_pictures_are_read(kind: str, mode: str) -> None:
    if mode == "P" and kind in ("JPEG", "WEBP"):
        pytest.skip("there is no such picture")
    made = prepared(picture(3, 40, 30, kind, mode), PLAIN)
    assert made.shape == (3, SIDE, SIDE)
    assert made.std() > 0


def bomb() -> bytes:
    """A PNG of 30,000 by 30,000 pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (picture(1, 64, 64)[:-40], "cannot be decoded"),
        (picture(1, 64, 64, "JPEG")[:400], "cannot be decoded"),
        (bomb(), "pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a kind known here"),
    ],
    ids=["empty", "text", "half a PNG", "half a JPEG", "a bomb", "EPS"],
)
def test_what_is_no_picture_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(PictureRefused, match=what):
        prepared(data, PLAIN)


def test_a_picture_just_too_large_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    from index_builder.models import pictures

    monkeypatch.setattr(pictures, "MAX_PIXELS", 99)
    with pytest.raises(PictureRefused, match="10 by 10 pixels; at most 99"):
        prepared(picture(1, 10, 10), PLAIN)
    assert MAX_PIXELS == 32 * 1024 * 1024


def test_a_published_graph_becomes_an_image_model(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "projection.onnx")
    made = release_images(graph, tmp_path / "out", "projection@1", "features", PREPARATION)
    assert made.directory == tmp_path / "out" / "projection@1" / "fp32"
    assert (made.dim, made.image, made.max_tokens) == (16, PREPARATION, 0)
    assert ModelManifest.load(made.directory) == made
    engine = Engine.load(made.directory / "model.onnx", threads=1)
    vectors = engine.run({"pixels": np.stack([prepared(picture(i), PREPARATION) for i in range(3)])})
    assert np.allclose(vectors, [vector_of(i) for i in range(3)], atol=1e-5)
    with pytest.raises(ReleaseRefused, match="is released already"):
        release_images(graph, tmp_path / "out", "projection@1", "features", PREPARATION)
    other = release_images(graph, tmp_path / "out", "projection@2", "classes", PREPARATION)
    stretched = msgspec.structs.replace(PREPARATION, resize="stretch")
    third = release_images(graph, tmp_path / "out", "projection@3", "features", stretched)
    assert len({made.space, other.space, third.space}) == 3


def test_graphs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "projection.onnx")

    def make(path: Path = graph, output: str = "features", **facts: object) -> None:
        release_images(path, tmp_path / "out", "p@1", output, msgspec.structs.replace(PREPARATION, **facts))

    with pytest.raises(ModelMissing, match=r"none\.onnx"):
        make(tmp_path / "none.onnx")
    with pytest.raises(ModelUnsupported, match="has no input 'pictures'"):
        make(input="pictures")
    with pytest.raises(ModelUnsupported, match="computes no 'vector'"):
        make(output="vector")
    with pytest.raises(ModelUnsupported, match="cannot be run on 9 by 8"):
        make(width=9)
    (tmp_path / "text.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelUnsupported, match="not an ONNX graph"):
        make(tmp_path / "text.onnx")
    assert not list(tmp_path.glob("out/*/*"))


def test_the_decoder_is_not_imported_without_need() -> None:
    import subprocess

    code = (
        "import sys, services.embedded, index_builder.models.release;"
        "assert not {'PIL', 'torch'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
