"""A BERT sentence encoder as an ONNX graph, straight from its weights."""

from typing import Protocol

import numpy as np

from index_builder.models.graph import GraphWriter
from index_builder.models.source import ModelSource


class Arithmetic(Protocol):
    """How the encoder multiplies: Float32, and Int8Static over weights that were rescaled for it.

    A site is a place where rows are read by a product, named like the weights that read them.
    """

    def rows_of(self, graph: GraphWriter, name: str, table: np.ndarray, ids: str) -> str:
        """Rows `ids` of an embedding table, float32 [m, hidden]."""

    def operand(self, graph: GraphWriter, site: str, rows: str) -> str:
        """Float rows [..., in] in the form that `product` of that site reads."""

    def product(
        self, graph: GraphWriter, site: str, operand: str, weight: np.ndarray, bias: np.ndarray
    ) -> str:
        """An operand [m, in] times a weight [out, in] transposed, plus a bias [out]: float32 [m, out]."""

    def gelu(self, graph: GraphWriter, rows: str) -> str:
        """The activation, value by value."""

    def summand(self, graph: GraphWriter, norm: str, rows: str) -> str:
        """What a LayerNormalization of that name gave, as it is added to the layer's result."""


class Float32:
    """Plain float32 products."""

    def rows_of(self, graph: GraphWriter, name: str, table: np.ndarray, ids: str) -> str:
        return graph.node("Gather", [graph.constant(name, table), ids], axis=0)

    def operand(self, graph: GraphWriter, site: str, rows: str) -> str:
        return rows

    def product(
        self, graph: GraphWriter, site: str, operand: str, weight: np.ndarray, bias: np.ndarray
    ) -> str:
        product = graph.node("MatMul", [operand, graph.constant(f"{site}.weight", weight.T)])
        return graph.node("Add", [product, graph.constant(f"{site}.bias", bias)])

    def gelu(self, graph: GraphWriter, rows: str) -> str:
        return graph.node("Gelu", [rows])

    def summand(self, graph: GraphWriter, norm: str, rows: str) -> str:
        return rows


class Sites:
    """The names of a layer's products, and of the normalisations that feed them."""

    def __init__(self, layer: int) -> None:
        at = f"encoder.layer.{layer}"
        #: Queries, keys and values, read by one product.
        self.heads = f"{at}.attention.self"
        self.mixed = f"{at}.attention.output.dense"
        self.wide = f"{at}.intermediate.dense"
        self.narrow = f"{at}.output.dense"
        self.norm_before = f"encoder.layer.{layer - 1}.output.LayerNorm" if layer else "embeddings.LayerNorm"
        self.norm_between = f"{at}.attention.output.LayerNorm"
        self.norm_after = f"{at}.output.LayerNorm"

    @property
    def parts(self) -> list[str]:
        """Query, key and value by their published names."""
        return [f"{self.heads}.{part}" for part in ("query", "key", "value")]


def encoder(source: ModelSource, arithmetic: Arithmetic) -> bytes:
    """The model as ONNX: ids and mask int64 [n, t], right-padded, to unit vectors float32 [n, hidden].

    Tokens are packed: everything but attention runs on the real tokens of the batch, [m, hidden], so
    padding costs next to nothing. A text's vector does not depend on the texts beside it.
    """
    graph, shape, weights = GraphWriter(), source.architecture, source.weights
    minus_one = graph.constant("minus_one", np.array([-1], np.int64))
    axis_0 = graph.constant("axis_0", np.array(0, np.int64))
    one = graph.constant("one", np.array(1, np.int64))
    row = graph.constant("row", np.array([-1, shape.hidden], np.int64))

    def norm(rows: str, name: str) -> str:
        scale, bias = (
            graph.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias")
        )
        return graph.node("LayerNormalization", [rows, scale, bias], axis=-1, epsilon=shape.norm_epsilon)

    def product(site: str, operand: str, *parts: str) -> str:
        weight, bias = (
            np.concatenate([weights[f"{part}.{kind}"] for part in parts or (site,)])
            for kind in ("weight", "bias")
        )
        return arithmetic.product(graph, site, operand, weight, bias)

    # Where each real token lies in the padded batch, and which packed row each padded place reads:
    # padding reads the row of the token before it, and no text attends beyond its length.
    size = graph.node("Shape", ["input_ids"])
    longest = graph.node("Gather", [size, one], axis=0)
    flat_mask = graph.node("Reshape", ["attention_mask", minus_one])
    real = graph.node("Reshape", [graph.node("NonZero", [flat_mask]), minus_one])
    spread = graph.node("Sub", [graph.node("CumSum", [flat_mask, axis_0]), one])
    spread = graph.node("Reshape", [spread, size])
    # Queries, keys and values of a token are neighbours, as one product makes them.
    query = graph.node("Mul", [spread, graph.constant("three", np.array(3, np.int64))])
    key = graph.node("Add", [query, one])
    value = graph.node("Add", [key, one])
    ids = graph.node("Gather", [graph.node("Reshape", ["input_ids", minus_one]), real], axis=0)
    positions = graph.node("Mod", [real, longest])
    lengths = graph.node(
        "ReduceSum", ["attention_mask", graph.constant("axes_1", np.array([1], np.int64))], keepdims=0
    )

    tables = "embeddings.{}_embeddings.weight"
    words = arithmetic.rows_of(graph, tables.format("word"), weights[tables.format("word")], ids)
    # One text is one segment, so its type row is part of every position's.
    places = weights[tables.format("position")][: source.max_tokens] + weights[tables.format("token_type")][0]
    placed = graph.node("Gather", [graph.constant("positions", places), positions], axis=0)
    hidden = norm(graph.node("Add", [words, placed]), Sites(0).norm_before)

    for layer in range(shape.layers):
        at = Sites(layer)
        together = product(at.heads, arithmetic.operand(graph, at.heads, hidden), *at.parts)
        together = graph.node("Reshape", [together, row])
        # The standard's operator beats MultiHeadAttention on CPUs: it reads no mask.
        read = [graph.node("Gather", [together, part], axis=0) for part in (query, key, value)]
        attended = graph.node(
            "Attention",
            [*read, "", "", "", lengths],
            q_num_heads=shape.heads,
            kv_num_heads=shape.heads,
        )
        # The operand is packed, not the rows: it may be smaller.
        attended = graph.node("Reshape", [arithmetic.operand(graph, at.mixed, attended), row])
        mixed = product(at.mixed, graph.node("Gather", [attended, real], axis=0))
        # Add and LayerNormalization beat the fused SkipLayerNormalization on CPUs.
        mixed = graph.node("Add", [mixed, arithmetic.summand(graph, at.norm_before, hidden)])
        hidden = norm(mixed, at.norm_between)
        wide = arithmetic.gelu(graph, product(at.wide, arithmetic.operand(graph, at.wide, hidden)))
        narrow = product(at.narrow, arithmetic.operand(graph, at.narrow, wide))
        narrow = graph.node("Add", [narrow, arithmetic.summand(graph, at.norm_between, hidden)])
        hidden = norm(narrow, at.norm_after)

    # The mean is a product with the mask; its length is divided out by the normalisation.
    weights_of_tokens = graph.node(
        "Unsqueeze", [graph.node("Cast", ["attention_mask"], to=1), graph.constant("axes_1", np.array([1]))]
    )
    summed = graph.node("MatMul", [weights_of_tokens, graph.node("Gather", [hidden, spread], axis=0)])
    summed = graph.node("Reshape", [summed, row])
    graph.rename(graph.node("LpNormalization", [summed], axis=-1, p=2), "vectors")
    return graph.serialize(
        {"input_ids": ["texts", "tokens"], "attention_mask": ["texts", "tokens"]},
        {"vectors": ["texts", shape.hidden]},
    )
