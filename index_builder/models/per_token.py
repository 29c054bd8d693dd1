"""Products of bytes whose range is found for each token as it comes: INT8 for graphs of any encoder."""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from index_builder.models.codes import to_codes
from index_builder.models.graph import MICROSOFT

#: Codes of a token's values, above the least of them.
LEVELS = 255
#: Before it, what a reduction reduces was an attribute.
_REDUCED_BY_INPUT = 18


class PerToken:
    """Writes products of a graph anew, so that a token's result depends on no other token.

    A token's values are coded from the least to the largest of them in 255 steps; the product of codes is
    multiplied by the token's step and the weight's column scale, and gets back what the least value adds to
    every column. What several products read is coded once.
    """

    def __init__(self, *, weight_bits: int, opset: int) -> None:
        """`weight_bits` 7 is for CPUs whose byte products overflow at 8 (no VNNI)."""
        self._largest = 2 ** (weight_bits - 1) - 1
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._coded: dict[str, tuple[str, str, str, str]] = {}

    def product(
        self, node: onnx.NodeProto, name: str, weight: np.ndarray
    ) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
        """The operators in place of MatMul(values, `weight` [inner, outputs]), and their constants."""
        values, outputs = node.input[0], weight.shape[1]
        self._nodes, self._constants = [], {}
        if values not in self._coded:
            self._coded[values] = self._code(values, len(weight))
        coded, step, least, leading = self._coded[values]
        weights, scales = to_codes(weight.T, self._largest)
        sums = (weights.sum(axis=1) * scales).astype(np.float32)
        read = [
            coded,
            self._constant(f"{name}.codes", weights.T),
            self._constant("per_token.one", np.float32(1)),
            self._constant(f"{name}.scales", scales),
            self._constant("per_token.zero", np.uint8(0)),
        ]
        product = self._node("MatMulIntegerToFloat", read, f"{name}.product", domain=MICROSOFT)
        product = self._node("Mul", [product, step], f"{name}.scaled")
        shift = self._node("Mul", [least, self._constant(f"{name}.sums", sums)], f"{name}.shift")
        product = self._node("Add", [product, shift], f"{name}.rows")
        width = self._constant(f"{name}.width", np.array([outputs], np.int64))
        shape = self._node("Concat", [leading, width], f"{name}.shape", axis=0)
        self._node("Reshape", [product, shape], node.output[0])
        return self._nodes, self._constants

    def _code(self, values: str, inner: int) -> tuple[str, str, str, str]:
        """Names of the codes [tokens, inner], each token's step and least value [tokens, 1], and what stands
        before the last axis of the values' shape.
        """
        name = f"{values}.per_token"
        row = self._constant(f"{name}.row", np.array([-1, inner], np.int64))
        rows = self._node("Reshape", [values, row], f"{name}.values")
        least, largest = (self._reduced(op, rows, f"{name}.{op}") for op in ("ReduceMin", "ReduceMax"))
        span = self._node("Sub", [largest, least], f"{name}.span")
        tiny = self._constant("per_token.tiny", np.float32(1e-12))
        span = self._node("Max", [span, tiny], f"{name}.positive")
        step = self._node(
            "Div", [span, self._constant("per_token.levels", np.float32(LEVELS))], f"{name}.step"
        )
        steps = self._node("Squeeze", [step, self._axis()], f"{name}.steps")
        zero = numpy_helper.from_array(np.zeros(1, np.uint8))
        zeros = self._node("Shape", [steps], f"{name}.tokens")
        zeros = self._node("ConstantOfShape", [zeros], f"{name}.zeros", value=zero)
        above = self._node("Sub", [rows, least], f"{name}.above")
        # Rounds, saturates and casts in one operator.
        coded = self._node("QuantizeLinear", [above, steps, zeros], f"{name}.codes", axis=0)
        shape = self._node("Shape", [values], f"{name}.shape")
        first, last = (self._constant(f"per_token.{n}", np.array([n], np.int64)) for n in (0, -1))
        leading = self._node("Slice", [shape, first, last], f"{name}.leading")
        return coded, step, least, leading

    def _reduced(self, op: str, rows: str, name: str) -> str:
        if self._opset < _REDUCED_BY_INPUT:
            return self._node(op, [rows], name, axes=[1], keepdims=1)
        return self._node(op, [rows, self._axis()], name, keepdims=1)

    def _axis(self) -> str:
        return self._constant("per_token.axis", np.array([1], np.int64))

    def _constant(self, name: str, value: Any) -> str:
        self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output
