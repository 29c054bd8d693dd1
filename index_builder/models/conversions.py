"""An FP32 graph in fewer bits: half floats for GPUs, bytes for CPUs. For graphs of any encoder."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from index_builder.models.codes import to_codes
from index_builder.models.graph import MICROSOFT
from index_builder.models.per_token import PerToken

#: Weights that share one scale. Smaller blocks are more accurate, larger ones faster; at 128 the runtime
#: sums in an order that depends on the batch (worst cosine 0.9993), at 64 it does not.
BLOCK = 64
#: The runtime quantizes activations to bytes as well, a block of a row at a time.
INT8_ACTIVATIONS = 4
#: Tables with fewer rows are not worth a scale a row.
LEAST_TABLE_ROWS = 1_024


class NothingToConvert(ValueError):
    """The graph has no weights of the kind that the conversion is about."""


def half(graph: bytes) -> bytes:
    """The graph with weights and arithmetic in FP16; its inputs and outputs stay as they are."""
    # Part of the runtime's wheel, and slow to import.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load_from_string(graph), keep_io_types=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def weight_only(graph: bytes) -> bytes:
    """The graph with 8-bit weights: products by block, lookup tables by row. Other constants stay.

    A constant that has other readers too stays as well. NothingToConvert where no product has one.
    """
    return _converted(onnx.load_from_string(graph), _product)


def int8_per_token(graph: bytes, *, weight_bits: int = 8) -> bytes:
    """The graph in INT8: products of bytes whose range is found for each token, lookup tables by row.

    `weight_bits` as of PerToken; what stays, and NothingToConvert, as of `weight_only`.
    """
    model = onnx.load_from_string(graph)
    [opset] = [entry.version for entry in model.opset_import if not entry.domain]
    return _converted(model, PerToken(weight_bits=weight_bits, opset=opset).product)


Converted = tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]


def _converted(
    model: onnx.ModelProto, product: Callable[[onnx.NodeProto, str, np.ndarray], Converted]
) -> bytes:
    """The model with what `product` makes of its products, and with lookup tables of bytes."""
    opsets = {entry.domain for entry in model.opset_import}
    if MICROSOFT not in opsets:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    constants = {constant.name: constant for constant in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    nodes: list[onnx.NodeProto] = []
    gone: set[str] = set()
    products = 0
    for node in model.graph.node:
        name = _weight_of(node)
        constant = constants.get(name)
        if constant is None or readers[name] > 1 or len(constant.dims) != 2 or constant.data_type != 1:
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(constant)
        if node.op_type == "MatMul":
            new, made = product(node, name, weight)
            products += 1
        elif len(weight) >= LEAST_TABLE_ROWS:
            new, made = _lookup(node, name, weight)
        else:
            nodes.append(node)
            continue
        nodes.extend(new)
        constants.update(made)
        gone.add(name)
    if not products:
        raise NothingToConvert("the graph multiplies by no constant matrix of its own")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend(c for name, c in constants.items() if name not in gone)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _weight_of(node: onnx.NodeProto) -> str:
    """Name of what a product or a lookup takes its weights from; empty for other nodes."""
    if node.op_type == "MatMul":
        return str(node.input[1])
    if node.op_type == "Gather" and all(a.i == 0 for a in node.attribute if a.name == "axis"):
        return str(node.input[0])
    return ""


def _product(node: onnx.NodeProto, name: str, weight: np.ndarray) -> Converted:
    inner, outputs = weight.shape
    padded = np.zeros((outputs, -(-inner // BLOCK) * BLOCK), np.float32)
    padded[:, :inner] = weight.T
    codes, scales = to_codes(padded.reshape(outputs, -1, BLOCK))
    made = {
        f"{name}.codes": (codes.astype(np.int16) + 128).astype(np.uint8),
        f"{name}.scales": scales.reshape(-1),
    }
    new = helper.make_node(
        "MatMulNBits",
        [node.input[0], *made],
        list(node.output),
        domain=MICROSOFT,
        K=inner,
        N=outputs,
        bits=8,
        block_size=BLOCK,
        accuracy_level=INT8_ACTIVATIONS,
    )
    return [new], _constants(made)


def _lookup(node: onnx.NodeProto, name: str, table: np.ndarray) -> Converted:
    codes, scales = to_codes(table)
    made = {f"{name}.codes": codes, f"{name}.scales": scales[:, None]}
    ids, output = node.input[1], node.output[0]
    new = [
        helper.make_node("Gather", [f"{name}.codes", ids], [f"{output}.codes"], axis=0),
        helper.make_node("Gather", [f"{name}.scales", ids], [f"{output}.scales"], axis=0),
        helper.make_node("Cast", [f"{output}.codes"], [f"{output}.floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{output}.floats", f"{output}.scales"], [output]),
    ]
    return new, _constants(made)


def _constants(made: dict[str, np.ndarray]) -> dict[str, onnx.TensorProto]:
    return {name: numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in made.items()}
