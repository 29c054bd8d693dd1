"""INT8 arithmetic whose result for a text does not depend on the texts beside it."""

from collections.abc import Mapping

import numpy as np

from index_builder.models.codes import to_codes
from index_builder.models.export import encoder
from index_builder.models.graph import MICROSOFT, GraphWriter
from index_builder.models.ranges import Range
from index_builder.models.rescale import Rescaled, rescale
from index_builder.models.source import ModelSource


def int8_encoder(source: ModelSource, ranges: Mapping[str, Range], *, weight_bits: int = 8) -> bytes:
    """The model in INT8 as ONNX. `weight_bits` 7 is for CPUs whose byte products overflow at 8 (no VNNI)."""
    rescaled = rescale(source, ranges)
    return encoder(rescaled.source, Int8Static(rescaled, weight_bits))


class Int8Static:
    """Products of bytes with steps fixed at the build, over a model rescaled so that every channel fits.

    Finding a range for each token as it comes costs ten operators a product, and one for the whole batch,
    as the usual dynamic quantization has it, makes a text's vector depend on its neighbours.
    """

    def __init__(self, rescaled: Rescaled, weight_bits: int) -> None:
        self._steps, self._factors = rescaled.steps, rescaled.factors
        self._largest = 2 ** (weight_bits - 1) - 1

    def rows_of(self, graph: GraphWriter, name: str, table: np.ndarray, ids: str) -> str:
        codes, scales = to_codes(table)
        rows = graph.node("Gather", [graph.constant(name, codes), ids], axis=0)
        scale = graph.node("Gather", [graph.constant(f"{name}.scale", scales), ids], axis=0)
        return graph.node("DequantizeLinear", [rows, scale], axis=0)

    def operand(self, graph: GraphWriter, site: str, rows: str) -> str:
        # Rounds, saturates and casts in one operator.
        return graph.node("QuantizeLinear", [rows, *self._step(graph, site)])

    def product(
        self, graph: GraphWriter, site: str, operand: str, weight: np.ndarray, bias: np.ndarray
    ) -> str:
        codes, scales = to_codes(weight, self._largest)
        size, zero = self._step(graph, site)
        inputs = [
            operand,
            graph.constant(f"{site}.weight", codes.T),
            size,
            graph.constant(f"{site}.scale", scales),
            zero,
            "",
            graph.constant(f"{site}.bias", bias),
        ]
        return graph.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)

    def gelu(self, graph: GraphWriter, rows: str) -> str:
        # By tanh: three quarters of the time, and off by less than a tenth of a step.
        return graph.node("Gelu", [rows], approximate="tanh")

    def summand(self, graph: GraphWriter, norm: str, rows: str) -> str:
        return graph.node("Mul", [rows, graph.constant(f"{norm}.factor", self._factors[norm])])

    def _step(self, graph: GraphWriter, site: str) -> tuple[str, str]:
        size, zero = self._steps[site]
        return (
            graph.constant(f"{site}.step", np.array(size, np.float32)),
            graph.constant(f"{site}.zero", np.array(zero, np.uint8)),
        )
