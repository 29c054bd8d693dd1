"""A BERT sentence encoder as an ONNX graph, straight from its weights."""

from typing import Protocol

import numpy as np

from index_builder.models.graph import MICROSOFT, GraphWriter
from index_builder.models.source import ModelSource

#: Below any score, and finite: exp() of it is exactly zero, so padding cannot touch a text's vector.
MASKED = -3.0e38


class Arithmetic(Protocol):
    """How the encoder multiplies: its two implementations are Float32 and Int8PerToken."""

    def rows_of(self, graph: GraphWriter, name: str, table: np.ndarray, ids: str) -> str:
        """Rows `ids` of an embedding table, float32 [m, hidden]."""

    def products(self, graph: GraphWriter, rows: str, weights: dict[str, np.ndarray]) -> list[str]:
        """Float rows [m, in] times each weight [out, in] transposed: float32 [m, out] each, in order."""


class Float32:
    """Plain float32 products."""

    def rows_of(self, graph: GraphWriter, name: str, table: np.ndarray, ids: str) -> str:
        return graph.node("Gather", [graph.constant(name, table), ids], axis=0)

    def products(self, graph: GraphWriter, rows: str, weights: dict[str, np.ndarray]) -> list[str]:
        return [
            graph.node("MatMul", [rows, graph.constant(name, weight.T)]) for name, weight in weights.items()
        ]


def encoder(source: ModelSource, arithmetic: Arithmetic) -> bytes:
    """The model as ONNX: ids and mask int64 [n, t], right-padded, to unit vectors float32 [n, hidden].

    Tokens are packed: everything but attention runs on the real tokens of the batch, [m, hidden], so
    padding costs next to nothing. A text's vector does not depend on the texts beside it.
    """
    graph, shape, weights = GraphWriter(), source.architecture, source.weights
    minus_one = graph.constant("minus_one", np.array([-1], np.int64))
    axis_0 = graph.constant("axis_0", np.array(0, np.int64))
    one = graph.constant("one", np.array(1, np.int64))

    def norm(rows: str, name: str) -> str:
        scale, bias = (
            graph.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")
        )
        return graph.node("LayerNormalization", [rows, scale, bias], axis=-1, epsilon=shape.norm_epsilon)

    def products(rows: str, *names: str) -> list[str]:
        return arithmetic.products(graph, rows, {name: weights[f"{name}.weight"] for name in names})

    def bias(name: str) -> str:
        return graph.constant(f"{name}.bias", weights[f"{name}.bias"])

    # Where each real token lies in the padded batch, and which packed row each padded place reads:
    # padding reads the row of the token before it, and is masked wherever it could matter.
    size = graph.node("Shape", ["input_ids"])
    longest = graph.node("Gather", [size, one], axis=0)
    flat_mask = graph.node("Reshape", ["attention_mask", minus_one])
    real = graph.node("Reshape", [graph.node("NonZero", [flat_mask]), minus_one])
    spread = graph.node("Sub", [graph.node("CumSum", [flat_mask, axis_0]), one])
    ids = graph.node("Gather", [graph.node("Reshape", ["input_ids", minus_one]), real], axis=0)
    positions = graph.node("Mod", [real, longest])
    padded_size = graph.node(
        "Concat", [size, graph.constant("hidden", np.array([shape.hidden], np.int64))], axis=0
    )
    key_mask = graph.node("Cast", ["attention_mask"], to=6)

    def unpack(rows: str) -> str:
        return graph.node("Reshape", [graph.node("Gather", [rows, spread], axis=0), padded_size])

    def pack(rows: str) -> str:
        flat = graph.node("Reshape", [rows, graph.constant("rows", np.array([-1, shape.hidden], np.int64))])
        return graph.node("Gather", [flat, real], axis=0)

    tables = "embeddings.{}_embeddings.weight"
    words = arithmetic.rows_of(graph, tables.format("word"), weights[tables.format("word")], ids)
    # One text is one segment, so its type row is part of every position's.
    places = weights[tables.format("position")][: source.max_tokens] + weights[tables.format("token_type")][0]
    placed = graph.node("Gather", [graph.constant("positions", places), positions], axis=0)
    hidden = norm(graph.node("Add", [words, placed]), "embeddings.LayerNorm")

    for layer in range(shape.layers):
        at = f"encoder.layer.{layer}"
        heads = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = [unpack(rows) for rows in products(hidden, *heads)]
        qkv_bias = np.concatenate([weights[f"{name}.bias"] for name in heads])
        attended = graph.node(
            "MultiHeadAttention",
            [*qkv, graph.constant(f"{at}.attention.bias", qkv_bias), key_mask],
            domain=MICROSOFT,
            num_heads=shape.heads,
            mask_filter_value=MASKED,
        )
        # Add, Add, LayerNormalization beats the fused SkipLayerNormalization on CPUs.
        name = f"{at}.attention.output"
        [mixed] = products(pack(attended), f"{name}.dense")
        mixed = graph.node("Add", [graph.node("Add", [mixed, bias(f"{name}.dense")]), hidden])
        hidden = norm(mixed, f"{name}.LayerNorm")
        name = f"{at}.intermediate.dense"
        [wide] = products(hidden, name)
        wide = graph.node("BiasGelu", [wide, bias(name)], domain=MICROSOFT)
        name = f"{at}.output"
        [narrow] = products(wide, f"{name}.dense")
        narrow = graph.node("Add", [graph.node("Add", [narrow, bias(f"{name}.dense")]), hidden])
        hidden = norm(narrow, f"{name}.LayerNorm")

    # The mean is a product with the mask; its length is divided out by the normalisation.
    weights_of_tokens = graph.node(
        "Unsqueeze", [graph.node("Cast", ["attention_mask"], to=1), graph.constant("axis_1", np.array([1]))]
    )
    summed = graph.node("MatMul", [weights_of_tokens, unpack(hidden)])
    summed = graph.node("Reshape", [summed, graph.constant("rows", np.array([-1, shape.hidden], np.int64))])
    graph.rename(graph.node("LpNormalization", [summed], axis=-1, p=2), "vectors")
    return graph.serialize(
        {"input_ids": ["texts", "tokens"], "attention_mask": ["texts", "tokens"]},
        {"vectors": ["texts", shape.hidden]},
    )
