"""INT8 arithmetic whose result for a text does not depend on the texts beside it."""

import numpy as np

from index_builder.models.graph import MICROSOFT, GraphWriter

#: Levels of an activation byte above its lowest.
LEVELS = 255


class Int8PerToken:
    """Products of bytes: every token has a range of its own, found as it comes, every output its own scale.

    A scale over the whole batch, as the usual dynamic quantization has it, would make a text's vector depend
    on its neighbours. A token's range runs from its least to its greatest value, not between equal ends:
    that halves the error twice over. With codes u and zero point z per token, (u - z) W = u W - z (ones W);
    the second product rides along in the first, as extra columns that all hold z and extra weight rows that
    sum to -(ones W), so it is exact and costs no pass over the result.

    `weight_bits` 7 is for CPUs whose byte products overflow at 8 (x86 without VNNI).
    """

    def __init__(self, weight_bits: int = 8) -> None:
        self._largest = 2 ** (weight_bits - 1) - 1

    def rows_of(self, graph: GraphWriter, name: str, table: np.ndarray, ids: str) -> str:
        codes, scales = _codes(table, 127)
        rows = graph.node("Gather", [graph.constant(name, codes), ids], axis=0)
        scale = graph.node("Gather", [graph.constant(f"{name}.scale", scales), ids], axis=0)
        return graph.node("DequantizeLinear", [rows, scale], axis=0)

    def products(self, graph: GraphWriter, rows: str, weights: dict[str, np.ndarray]) -> list[str]:
        zero = graph.constant("zero", np.array(0, np.float32))
        least = graph.node("Min", [graph.node("ReduceMin", [rows], axes=[-1], keepdims=0), zero])
        span = graph.node("Sub", [graph.node("ReduceMax", [rows], axes=[-1], keepdims=0), least])
        scale = graph.node("Mul", [span, graph.constant("level", np.array(1 / LEVELS, np.float32))])
        # Rounds, saturates and casts in one operator.
        zero_point = graph.node("QuantizeLinear", [graph.node("Neg", [least]), scale], axis=0)
        codes = graph.node("QuantizeLinear", [rows, scale, zero_point], axis=0)
        column = graph.constant("column", np.array([-1, 1], np.int64))
        scale, zero_point = (graph.node("Reshape", [each, column]) for each in (scale, zero_point))
        quantized = {name: _codes(weight, self._largest) for name, weight in weights.items()}
        extra = max(_rows_to_cancel(weight, self._largest) for weight, _ in quantized.values())
        columns = graph.constant(f"extra_{extra}", np.array([1, extra], np.int64))
        codes = graph.node("Concat", [codes, graph.node("Expand", [zero_point, columns])], axis=1)
        return [
            graph.node("Mul", [self._product(graph, codes, name, *weight, extra), scale])
            for name, weight in quantized.items()
        ]

    def _product(
        self, graph: GraphWriter, codes: str, name: str, weight: np.ndarray, scales: np.ndarray, extra: int
    ) -> str:
        stretched = np.concatenate([weight, _cancelling(weight, extra)], axis=1)
        unit = graph.constant("unit", np.array(1, np.float32))
        inputs = [codes, graph.constant(name, stretched.T), unit, graph.constant(f"{name}.scale", scales)]
        return graph.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)


def _codes(rows: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row as int8 codes in [-largest, largest], and its float32 scale."""
    peaks = np.maximum(np.abs(rows).max(axis=1), np.finfo(np.float32).tiny)
    scales = (peaks / np.float32(largest)).astype(np.float32)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def _rows_to_cancel(weight: np.ndarray, largest: int) -> int:
    """Extra codes needed to cancel the greatest sum of an output; a multiple of four, as kernels like."""
    most = int(np.abs(weight.sum(axis=1, dtype=np.int64)).max())
    return -(-most // (4 * largest)) * 4


def _cancelling(weight: np.ndarray, extra: int) -> np.ndarray:
    """int8 [out, extra] whose rows sum to minus those of `weight`, spread as evenly as integers go."""
    sums = weight.sum(axis=1, dtype=np.int64)
    share, rest = np.divmod(np.abs(sums), extra)
    spread = share[:, None] + (np.arange(extra) < rest[:, None])
    cancelling: np.ndarray = (-np.sign(sums)[:, None] * spread).astype(np.int8)
    return cancelling
