"""Graphs in fewer bits compute nearly the same, and graphs with a reduction what it says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from index_builder.models import gate
from index_builder.models.conversions import BLOCK, NothingToConvert, half, int8_per_token, weight_only
from index_builder.models.engine import Engine
from index_builder.models.export import Float32, encoder
from index_builder.models.reduction import (
    Reduction,
    ReductionImpossible,
    principal_axes,
    reduced,
    truncated,
)
from index_builder.models.source import ModelSource
from index_builder.models.tokenizer import Tokenizer, padded

TEXTS = ("red fox", "green foxes a b c", "z", "a b c d e f g h i j k l m n o p", "fox", "green green")


@pytest.fixture(scope="module")
def exact(tiny_source: Path) -> bytes:
    """The tiny model in float32."""
    return encoder(ModelSource.open(tiny_source), Float32())


@pytest.fixture(scope="module")
def tokenizer(tiny_source: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer(tiny_source / "tokenizer.json", max_tokens=32)


def test_half_floats_halve_the_graph_and_keep_its_inputs(exact: bytes, tokenizer: Tokenizer) -> None:
    converted = half(exact)
    assert len(converted) < 0.7 * len(exact)
    found = gate.agreement(
        gate.vectors_of(converted, tokenizer, TEXTS), gate.vectors_of(exact, tokenizer, TEXTS)
    )
    assert 0.9999 < found.worst < 1.000001
    assert half(exact) == converted


@pytest.mark.parametrize(
    ("convert", "product"), [(weight_only, "MatMulNBits"), (int8_per_token, "MatMulIntegerToFloat")]
)
def test_eight_bits_keep_the_vectors_and_do_not_see_the_batch(
    exact: bytes, tokenizer: Tokenizer, convert: Callable[[bytes], bytes], product: str
) -> None:
    converted = convert(exact)
    ops = [node.op_type for node in onnx.load_from_string(converted).graph.node]
    before = [node.op_type for node in onnx.load_from_string(exact).graph.node]
    assert ops.count("MatMul") == 1, "the mean of a text's tokens has no weights"
    assert ops.count(product) == before.count("MatMul") - 1 >= 8
    alone = gate.vectors_of(converted, tokenizer, TEXTS)
    assert 0.995 < gate.agreement(alone, gate.vectors_of(exact, tokenizer, TEXTS)).worst < 1
    ids, mask = padded(tokenizer.encode(TEXTS).ids)
    crowd = Engine.load(converted, threads=1).run({"input_ids": ids, "attention_mask": mask})
    assert gate.agreement(alone, crowd).worst > 0.99999
    assert convert(exact) == converted


def test_weights_of_seven_bits_stay_within_them(exact: bytes) -> None:
    constants = onnx.load_from_string(int8_per_token(exact, weight_bits=7)).graph.initializer
    largest = [
        int(np.abs(numpy_helper.to_array(each).astype(int)).max())
        for each in constants
        if each.name.endswith(".codes") and each.data_type == TensorProto.INT8
    ]
    assert set(largest) == {63}


def test_what_several_products_read_is_coded_once() -> None:
    rng = np.random.default_rng(5)
    weights = {name: rng.normal(size=(24, width)).astype(np.float32) for name, width in (("a", 8), ("b", 16))}
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}.out"]) for name in weights]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Concat", ["a.out", "b.out"], ["vectors"], axis=-1)],
        "fork",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", 24])],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", "t", 24])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    converted = int8_per_token(model.SerializeToString())
    ops = [node.op_type for node in onnx.load_from_string(converted).graph.node]
    assert (ops.count("QuantizeLinear"), ops.count("MatMulIntegerToFloat")) == (1, 2)
    # Tokens of very different sizes, of one sign, of one value, and of nothing.
    x = rng.normal(size=(2, 4, 24)).astype(np.float32)
    x[0] *= np.float32([[1e-6], [1], [1e3], [1e6]])
    x[1, 0], x[1, 1], x[1, 2] = np.abs(x[1, 0]) + 50, 7, 0
    made = Engine.load(converted, threads=1).run({"x": x})
    wanted = x @ np.concatenate(list(weights.values()), axis=1)
    errors = np.linalg.norm(made - wanted, axis=-1)
    assert (errors <= 0.02 * np.linalg.norm(wanted, axis=-1)).all()
    assert not made[1, 2].any()


def _lookup_and_product(rows: int, inner: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """vectors = table[input_ids] @ weight, as other exporters write it, and its two matrices."""
    rng = np.random.default_rng(3)
    table = rng.normal(size=(rows, inner)).astype(np.float32)
    weight = rng.normal(size=(inner, 16)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("MatMul", ["rows", "weight"], ["vectors"]),
        ],
        "two",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString(), table, weight


@pytest.mark.parametrize(("rows", "inner"), [(2_000, BLOCK), (2_000, BLOCK + 7), (10, 3 * BLOCK)])
@pytest.mark.parametrize("convert", [weight_only, int8_per_token])
def test_lookup_tables_and_products_of_any_size_are_converted(
    rows: int, inner: int, convert: Callable[[bytes], bytes]
) -> None:
    graph, table, weight = _lookup_and_product(rows, inner)
    converted = convert(graph)
    ids = np.array([0, 7, 9], np.int64)
    made = Engine.load(converted, threads=1).run({"input_ids": ids})
    wanted = table[ids] @ weight
    assert np.abs(made - wanted).max() < 0.03 * np.abs(wanted).max()
    assert len(converted) < len(graph) * (0.4 if rows > 1_000 else 0.8)


def test_a_graph_without_products_is_not_pretended_to_be_converted() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["vectors"])],
        "none",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", 4])],
    )
    with pytest.raises(NothingToConvert):
        weight_only(helper.make_model(graph).SerializeToString())


def test_a_pca_keeps_angles_better_than_cutting() -> None:
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 64)) + 0.05 * rng.normal(size=(500, 64))
    vectors = (hidden / np.linalg.norm(hidden, axis=1, keepdims=True)).astype(np.float32)
    axes = principal_axes(vectors[:300], 8)
    assert np.allclose(axes.T @ axes, np.eye(8), atol=1e-5)
    held_aside = vectors[300:]
    kept = gate.overlap(held_aside @ axes, held_aside)
    assert kept > 0.9 > gate.overlap(truncated(held_aside, 8), held_aside)


@pytest.mark.parametrize(
    ("dim", "texts", "what"), [(0, 99, "0 axes"), (64, 99, "64 axes of vectors of 64"), (20, 19, "19 texts")]
)
def test_axes_that_nothing_tells_are_refused(dim: int, texts: int, what: str) -> None:
    with pytest.raises(ReductionImpossible, match=what):
        principal_axes(np.ones((texts, 64), np.float32), dim)


def test_a_reduction_is_the_last_step_of_the_graph(exact: bytes, tokenizer: Tokenizer) -> None:
    whole = gate.vectors_of(exact, tokenizer, TEXTS)
    axes = principal_axes(np.random.default_rng(1).normal(size=(90, 64)).astype(np.float32), 6)
    projected = whole @ axes
    wanted = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    made = gate.vectors_of(reduced(exact, Reduction("pca", 6, "x"), axes), tokenizer, TEXTS)
    assert np.allclose(made, wanted, atol=1e-5)
    made = gate.vectors_of(reduced(exact, Reduction("matryoshka", 16)), tokenizer, TEXTS)
    assert np.allclose(made, truncated(whole, 16), atol=1e-5)


@pytest.mark.parametrize("opset", [17, 18])
def test_rounding_speaks_the_operators_of_its_graph(opset: int) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["vectors"])],
        "any",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["n", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    rows = np.array([[1.27, -0.02, 0.604, 0], [0, 0, 0, 0]], np.float32)
    made = Engine.load(reduced(model.SerializeToString(), Reduction("int8", 4)), threads=1).run({"x": rows})
    assert np.allclose(made, [[1.27, -0.02, 0.60, 0], [0, 0, 0, 0]], atol=1e-6)


def test_rounded_vectors_are_bytes_times_a_step(exact: bytes, tokenizer: Tokenizer) -> None:
    made = gate.vectors_of(reduced(exact, Reduction("int8", 64)), tokenizer, TEXTS)
    codes = made / (np.abs(made).max(axis=1, keepdims=True) / 127)
    assert np.allclose(codes, np.rint(codes), atol=1e-3)
    assert gate.agreement(made, gate.vectors_of(exact, tokenizer, TEXTS)).worst > 0.999


def test_every_reduction_makes_a_space_of_its_own() -> None:
    reductions = [
        Reduction("int8", 64),
        *(Reduction("pca", dim, matrix) for dim, matrix in ((32, "a"), (32, "b"), (16, "a"))),
        Reduction("matryoshka", 32),
    ]
    spaces = {reduction.space_of("0123456789abcdef") for reduction in reductions}
    assert len(spaces | {"0123456789abcdef"}) == 6
    assert Reduction("int8", 64).space_of("another") not in spaces
