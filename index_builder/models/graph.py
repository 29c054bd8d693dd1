"""Writes ONNX graphs a node at a time, and the same bytes each time for the same calls."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Attention by lengths came with 24; ONNX Runtime's own operators carry what the standard lacks.
STANDARD_OPSET, IR_VERSION = 24, 11
MICROSOFT = "com.microsoft"


class GraphWriter:
    """A graph under construction: every method adds to it and answers the names of what it added."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._exposed: list[str] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        """`value` as part of the model; the same name again means the same value."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def node(self, op: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        """One operator with one result; the name of the result."""
        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def rename(self, output: str, name: str) -> None:
        """Give a result the name that callers of the model know it by."""
        self._nodes.append(helper.make_node("Identity", [output], [name]))

    def expose(self, *results: str) -> None:
        """Let float results be asked for by their own names."""
        self._exposed += results

    def serialize(
        self, inputs: dict[str, Sequence[str | int]], outputs: dict[str, Sequence[str | int]]
    ) -> bytes:
        """The finished model: int64 `inputs` and float32 `outputs`, each with its shape."""
        graph = helper.make_graph(
            self._nodes,
            "encoder",
            [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()]
            + [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._exposed],
            list(self._constants.values()),
        )
        opsets = [helper.make_opsetid("", STANDARD_OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph, producer_name="ringfort", opset_imports=opsets, ir_version=IR_VERSION
        )
        data: bytes = model.SerializeToString(deterministic=True)
        return data
