"""The graphs compute what BERT is defined to, for each text as if it were alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from index_builder.models.export import Float32, Sites, encoder
from index_builder.models.graph import GraphWriter
from index_builder.models.quantize import int8_encoder
from index_builder.models.ranges import Range, observe, probes
from index_builder.models.rescale import MULTIPLE, NEURON_MOST, rescale
from index_builder.models.source import ModelSource
from index_builder.models.tokenizer import Tokenizer, padded

erf = np.vectorize(math.erf)


def bert(source: ModelSource, ids: np.ndarray) -> np.ndarray:
    """One text's vector by the definition, in float64."""
    weights = {name: value.astype(np.float64) for name, value in source.weights.items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + source.architecture.norm_epsilon)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    heads = source.architecture.heads
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(source.architecture.layers):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{part}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = linear(mixed.transpose(1, 0, 2).reshape(x.shape), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        wide = linear(x, f"{at}.intermediate.dense")
        wide = wide * (1 + erf(wide / math.sqrt(2))) / 2
        x = norm(x + linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def run(artifact: bytes, texts: list[np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(artifact, providers=["CPUExecutionProvider"])
    ids, mask = padded(texts)
    return session.run(["vectors"], {"input_ids": ids, "attention_mask": mask})[0]


@pytest.fixture(scope="module")
def source(tiny_source: Path) -> ModelSource:
    return ModelSource.open(tiny_source)


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    """Of every length from the shortest to the model's limit."""
    rng = np.random.default_rng(3)
    return [np.array([2, *rng.integers(4, 34, n), 3], np.int32) for n in (5, 0, 30, 1, 12, 29, 17)]


@pytest.fixture(scope="module")
def tokenizer(tiny_source: Path, source: ModelSource) -> Tokenizer:
    return Tokenizer(tiny_source / "tokenizer.json", max_tokens=source.max_tokens)


@pytest.fixture(scope="module")
def ranges(source: ModelSource, tokenizer: Tokenizer) -> Mapping[str, Range]:
    return observe(source, tokenizer)


@pytest.fixture(scope="module", params=["fp32", "int8", "int8 of 7 bits"])
def artifact(request: pytest.FixtureRequest, source: ModelSource, ranges: Mapping[str, Range]) -> bytes:
    if request.param == "fp32":
        return encoder(source, Float32())
    return int8_encoder(source, ranges, weight_bits=7 if "7" in request.param else 8)


def test_fp32_is_bert(source: ModelSource, texts: list[np.ndarray]) -> None:
    expected = np.array([bert(source, text) for text in texts])
    np.testing.assert_allclose(run(encoder(source, Float32()), texts), expected, atol=2e-6)


@pytest.mark.parametrize(("weight_bits", "least"), [(8, 0.998), (7, 0.995)])
def test_int8_is_nearly_bert(
    source: ModelSource, ranges: Mapping[str, Range], texts: list[np.ndarray], weight_bits: int, least: float
) -> None:
    expected = np.array([bert(source, text) for text in texts])
    cosine = (run(int8_encoder(source, ranges, weight_bits=weight_bits), texts) * expected).sum(1)
    assert cosine.min() > least
    assert cosine.min() < 1 - 1e-7, "this is not INT8 at all"


def test_a_vector_does_not_depend_on_its_batch(artifact: bytes, texts: list[np.ndarray]) -> None:
    together = run(artifact, texts)
    alone = np.concatenate([run(artifact, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_same_weights_make_the_same_bytes(source: ModelSource, tokenizer: Tokenizer) -> None:
    one, two = (int8_encoder(source, observe(source, tokenizer)) for _ in range(2))
    assert one == two
    assert encoder(source, Float32()) == encoder(source, Float32())


def test_ranges_hold_what_the_products_of_a_text_read(
    source: ModelSource, tokenizer: Tokenizer, ranges: Mapping[str, Range]
) -> None:
    seen = _reads(source, tokenizer.encode(probes(tokenizer)[:8]).ids)
    at = Sites(1)
    for site in (at.heads, at.wide, at.narrow, at.mixed):
        assert (seen[site].max(0) <= ranges[site].greatest + 1e-5).all(), site
        assert (seen[site].min(0) >= ranges[site].least - 1e-5).all(), site


def test_a_rescaled_model_is_the_same_function_of_a_text(
    source: ModelSource,
    ranges: Mapping[str, Range],
    texts: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its factors are undone where a layer's input is added to its result; shared neurons are near enough."""
    monkeypatch.setattr("index_builder.models.rescale.NEURON_MOST", 1000.0)
    rescaled = rescale(source, ranges)

    class Undone(Float32):
        def summand(self, graph: GraphWriter, norm: str, rows: str) -> str:
            return graph.node("Mul", [rows, graph.constant(f"{norm}.factor", rescaled.factors[norm])])

    expected = np.array([bert(source, text) for text in texts])
    np.testing.assert_allclose(run(encoder(rescaled.source, Undone()), texts), expected, atol=5e-6)


def test_channels_far_apart_come_within_reach_of_one_byte(
    source: ModelSource, tokenizer: Tokenizer, texts: list[np.ndarray]
) -> None:
    """As in real models: one channel of a normalisation, and one neuron, are far larger than the rest."""
    weights = {name: value.copy() for name, value in source.weights.items()}
    at = Sites(1)
    for norm, readers in ((at.norm_before, at.parts), (at.norm_between, [at.wide])):
        for part in ("weight", "bias"):
            weights[f"{norm}.{part}"][5] *= 20
        for reader in readers:
            weights[f"{reader}.weight"][:, 5] /= 20
    weights[f"{at.wide}.bias"][3] = 6 * NEURON_MOST
    weights[f"{at.narrow}.weight"][:, 3] /= 20
    source = dataclasses.replace(source, weights=weights)
    ranges = observe(source, tokenizer)
    neurons = rescale(source, ranges).source.weights[f"{at.wide}.bias"]
    assert len(neurons) % MULTIPLE == 0
    assert len(neurons) > len(weights[f"{at.wide}.bias"])
    expected = np.array([bert(source, text) for text in texts])
    assert (run(int8_encoder(source, ranges), texts) * expected).sum(1).min() > 0.99


def _reads(source: ModelSource, texts: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
    """What each product reads of some texts, rows of all of them together."""
    rows: dict[str, list[np.ndarray]] = {}
    names: dict[str, str] = {}

    class Reading(Float32):
        def operand(self, graph: GraphWriter, site: str, operand: str) -> str:
            names[site] = graph.node("Flatten", [operand], axis=-1)
            graph.expose(names[site])
            return operand

    session = onnxruntime.InferenceSession(encoder(source, Reading()), providers=["CPUExecutionProvider"])
    for text in texts:
        ids, mask = padded([text])
        found = session.run(list(names.values()), {"input_ids": ids, "attention_mask": mask})
        for site, values in zip(names, found, strict=True):
            rows.setdefault(site, []).append(values)
    return {site: np.concatenate(parts) for site, parts in rows.items()}
