"""The graphs compute what BERT is defined to, for each text as if it were alone."""

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from index_builder.models.export import Arithmetic, Float32, encoder
from index_builder.models.quantize import Int8PerToken
from index_builder.models.source import ModelSource
from index_builder.models.tokenizer import padded

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
        scores = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = linear(mixed.transpose(1, 0, 2).reshape(x.shape), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        wide = linear(x, f"{at}.intermediate.dense")
        wide = wide * (1 + erf(wide / math.sqrt(2))) / 2
        x = norm(x + linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def run(source: ModelSource, arithmetic: Arithmetic, texts: list[np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(encoder(source, arithmetic), providers=["CPUExecutionProvider"])
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


def test_fp32_is_bert(source: ModelSource, texts: list[np.ndarray]) -> None:
    expected = np.array([bert(source, text) for text in texts])
    np.testing.assert_allclose(run(source, Float32(), texts), expected, atol=2e-6)


@pytest.mark.parametrize("weight_bits", [8, 7])
def test_int8_is_nearly_bert(source: ModelSource, texts: list[np.ndarray], weight_bits: int) -> None:
    expected = np.array([bert(source, text) for text in texts])
    cosine = (run(source, Int8PerToken(weight_bits), texts) * expected).sum(1)
    assert cosine.min() > 0.998
    assert cosine.min() < 1 - 1e-7, "this is not INT8 at all"


@pytest.mark.parametrize("arithmetic", [Float32(), Int8PerToken(), Int8PerToken(7)])
def test_a_vector_does_not_depend_on_its_batch(
    source: ModelSource, texts: list[np.ndarray], arithmetic: Arithmetic
) -> None:
    together = run(source, arithmetic, texts)
    alone = np.concatenate([run(source, arithmetic, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("arithmetic", [Float32(), Int8PerToken()])
def test_the_same_weights_make_the_same_bytes(source: ModelSource, arithmetic: Arithmetic) -> None:
    assert encoder(source, arithmetic) == encoder(source, arithmetic)
