"""A model of pictures small enough to write down: a random projection of 8 by 8 pixels."""

import io
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from index_builder.models.manifest import ImageInput

SIDE, DIM = 8, 16
PREPARATION = ImageInput(
    input="pixels", width=SIDE, height=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


def weights() -> np.ndarray:
    """What the pixels of a picture are multiplied by, float32 [192, 16]."""
    return np.random.default_rng(2).normal(size=(3 * SIDE * SIDE, DIM)).astype(np.float32)


def write_graph(path: Path) -> Path:
    """The projection as an ONNX file: `pixels` [n, 3, 8, 8] to `features` [n, 16]."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["features"]),
            helper.make_node("Softmax", ["features"], ["classes"]),
        ],
        "projection",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("classes", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(weights(), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def picture(seed: int, width: int = SIDE, height: int = SIDE, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture of noise, encoded."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(made, kind)
    return made.getvalue()


def pixels_of(seed: int) -> np.ndarray:
    """The bytes of that picture at the model's own size, uint8 [8, 8, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def vector_of(seed: int) -> np.ndarray:
    """What the model makes of that picture, float32 [16], of length 1."""
    prepared = (pixels_of(seed).astype(np.float32) / 255 - 0.5) / 0.25
    made: np.ndarray = prepared.transpose(2, 0, 1).reshape(-1) @ weights()
    return made / np.linalg.norm(made)
