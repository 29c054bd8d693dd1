"""A model small enough to build in milliseconds: two layers, random weights, a vocabulary of letters."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

HIDDEN, HEADS, LAYERS, WIDE, POSITIONS, MAX_TOKENS = 64, 4, 2, 128, 48, 32
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "red", "green", "fox", "##es")


def write_tiny_source(directory: Path) -> Path:
    """A sentence-transformers directory with random weights."""
    rng = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int) -> None:
        weights[name] = rng.normal(0, 0.3, shape).astype(np.float32)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = rng.normal(1, 0.1, HIDDEN).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(0, 0.1, HIDDEN).astype(np.float32)

    for table, rows in (("word", len(WORDS)), ("position", POSITIONS), ("token_type", 2)):
        matrix(f"embeddings.{table}_embeddings.weight", rows, HIDDEN)
    norm("embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        for name, outputs, inputs in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", WIDE, HIDDEN),
            ("output.dense", HIDDEN, WIDE),
        ):
            matrix(f"{at}.{name}.weight", outputs, inputs)
            matrix(f"{at}.{name}.bias", outputs)
        norm(f"{at}.attention.output.LayerNorm")
        norm(f"{at}.output.LayerNorm")
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors")

    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As published: a fixed padding, and a shorter truncation than the model's.
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(directory / "tokenizer.json"))

    (directory / "1_Pooling").mkdir()
    for name, facts in {
        "config.json": {
            "model_type": "bert",
            "hidden_act": "gelu",
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "layer_norm_eps": 1e-12,
        },
        "1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True},
        "modules.json": [{"type": f"models.{part}"} for part in ("Transformer", "Pooling", "Normalize")],
        "sentence_bert_config.json": {"max_seq_length": MAX_TOKENS},
        "config_sentence_transformers.json": {"prompts": {"query": "fox: "}},
    }.items():
        (directory / name).write_text(json.dumps(facts))
    return directory


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory; not to be written to."""
    return write_tiny_source(tmp_path_factory.mktemp("tiny") / "source")
