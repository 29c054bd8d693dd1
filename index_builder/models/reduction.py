"""Shorter or coarser vectors: a last step of the graph that belongs to the space.

Vectors that were reduced may be compared with each other, and never with those that were not.
"""

from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from index_builder.models.space import reduced_space_id

VECTORS = "vectors"


class ReductionImpossible(ValueError):
    """The reduction does not fit the model or the texts it is to be fitted on; the message says why."""


class Reduction(msgspec.Struct, frozen=True):
    """What became of a model's own vectors. `dim` is what is left of them.

    pca: projected on `dim` axes, whose matrix has that SHA-256, and normalised again. matryoshka: cut after
    `dim` and normalised again. int8: each rounded to 255 levels of its own.
    """

    kind: Literal["pca", "matryoshka", "int8"]
    dim: int
    matrix_sha256: str = ""

    def space_of(self, space: str) -> str:
        """The space of vectors of `space` after this."""
        return reduced_space_id(space=space, kind=self.kind, dim=self.dim, matrix_sha256=self.matrix_sha256)


def truncated(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` values of unit vectors as unit vectors, float32 [n, dim]."""
    head = vectors[:, :dim]
    lengths = np.linalg.norm(head, axis=1, keepdims=True)
    cut: np.ndarray = head / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cut


def principal_axes(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The `dim` directions along which unit vectors are longest, float32 [d, dim], columns orthonormal.

    Not centred: a search compares vectors by their angles at the origin, which the mean is part of.
    ReductionImpossible for more axes than vectors or values.
    """
    n, d = vectors.shape
    if not 1 <= dim < d:
        raise ReductionImpossible(f"{dim} axes of vectors of {d}: fewer are meant, and one at least")
    if n < dim:
        raise ReductionImpossible(f"{n} texts do not tell {dim} axes; give at least as many")
    moments = vectors.T.astype(np.float64) @ vectors.astype(np.float64)
    _, axes = np.linalg.eigh(moments)
    return np.ascontiguousarray(axes[:, ::-1][:, :dim].astype(np.float32))


def reduced(graph: bytes, reduction: Reduction, axes: np.ndarray | None = None) -> bytes:
    """The graph with the reduction as its last step; `axes` is the matrix of a PCA."""
    model = onnx.load_from_string(graph)
    whole = f"{VECTORS}.whole"
    for node in model.graph.node:
        node.output[:] = [whole if name == VECTORS else name for name in node.output]
        node.input[:] = [whole if name == VECTORS else name for name in node.input]
    if reduction.kind == "pca":
        if axes is None:
            raise ReductionImpossible("a PCA needs its axes")
        _append(model, {f"{VECTORS}.axes": axes})
        nodes = [
            helper.make_node("MatMul", [whole, f"{VECTORS}.axes"], [f"{VECTORS}.cut"]),
            helper.make_node("LpNormalization", [f"{VECTORS}.cut"], [VECTORS], axis=-1, p=2),
        ]
    elif reduction.kind == "matryoshka":
        bounds = {"from": [0], "to": [reduction.dim], "axis": [1]}
        _append(model, {f"{VECTORS}.{name}": np.array(value, np.int64) for name, value in bounds.items()})
        nodes = [
            helper.make_node("Slice", [whole, *(f"{VECTORS}.{name}" for name in bounds)], [f"{VECTORS}.cut"]),
            helper.make_node("LpNormalization", [f"{VECTORS}.cut"], [VECTORS], axis=-1, p=2),
        ]
    else:
        nodes = _rounded(model, whole)
    model.graph.node.extend(nodes)
    shape = model.graph.output[0].type.tensor_type.shape.dim
    shape[-1].Clear()
    shape[-1].dim_value = reduction.dim
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _rounded(model: onnx.ModelProto, whole: str) -> list[onnx.NodeProto]:
    """Nodes that leave each vector the codes -127 to 127 of a step of its own."""
    levels = {"level": np.array(1 / 127, np.float32), "tiny": np.array(1e-30, np.float32)}
    _append(model, {f"{VECTORS}.{name}": value for name, value in levels.items()})
    step, peak = f"{VECTORS}.step", f"{VECTORS}.peak"
    # The axes became an input with operator set 18.
    if next(entry.version for entry in model.opset_import if not entry.domain) >= 18:
        _append(model, {f"{VECTORS}.last": np.array([-1], np.int64)})
        find_peak = helper.make_node("ReduceMax", [f"{VECTORS}.size", f"{VECTORS}.last"], [peak], keepdims=1)
    else:
        find_peak = helper.make_node("ReduceMax", [f"{VECTORS}.size"], [peak], axes=[-1], keepdims=1)
    return [
        helper.make_node("Abs", [whole], [f"{VECTORS}.size"]),
        find_peak,
        helper.make_node("Mul", [peak, f"{VECTORS}.level"], [f"{VECTORS}.step.least"]),
        helper.make_node("Max", [f"{VECTORS}.step.least", f"{VECTORS}.tiny"], [step]),
        helper.make_node("Div", [whole, step], [f"{VECTORS}.steps"]),
        helper.make_node("Round", [f"{VECTORS}.steps"], [f"{VECTORS}.codes"]),
        helper.make_node("Mul", [f"{VECTORS}.codes", step], [VECTORS]),
    ]


def _append(model: onnx.ModelProto, constants: dict[str, np.ndarray]) -> None:
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
