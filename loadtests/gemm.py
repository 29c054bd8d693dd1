"""How fast this host multiplies bytes at best: the bound of every INT8 encoder on it."""

import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from index_builder.models.source import ModelSource

#: Inputs and outputs of the encoder's largest products.
INPUTS, OUTPUTS = 384, 1536


def int8_products(rows: int) -> Callable[[], float]:
    """A side to be timed: operations a second of one thread, `rows` at a time, the best of a few tries."""
    weights = np.random.default_rng(1).integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "weights"], ["products"])],
        "gemm",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, [rows, INPUTS])],
        [helper.make_tensor_value_info("products", TensorProto.INT32, [rows, OUTPUTS])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx.ModelProto.SerializeToString(model), options, providers=["CPUExecutionProvider"]
    )
    operand = np.random.default_rng(2).integers(0, 256, (rows, INPUTS)).astype(np.uint8)

    def once() -> float:
        began = time.thread_time()
        session.run(None, {"rows": operand})
        return time.thread_time() - began

    return lambda: 2 * rows * INPUTS * OUTPUTS / min(once() for _ in range(20))


def operations_per_token(source: ModelSource) -> int:
    """Multiplications and additions of the linear layers for one token; attention comes on top."""
    products = (
        weight.size
        for name, weight in source.weights.items()
        if name.startswith("encoder.layer.") and weight.ndim == 2
    )
    return 2 * sum(products)
