"""Any sentence-transformers model as an ONNX graph, traced by torch; needs the extra `models`."""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.models.source import ModelMissing, ModelUnsupported, require_vocabulary
from index_builder.models.space import space_id

INSTALL_COMMAND = "pip install 'ringfort[models]'"
#: The first with LayerNormalization, and known to every release of the exporter.
OPSET = 17


@dataclass(frozen=True, slots=True)
class Exported:
    """A traced model: its float32 graph, and how a text becomes a vector of it."""

    graph: bytes
    tokenizer: bytes
    max_tokens: int
    prompts: dict[str, str]
    space: str
    #: The model's own vectors of texts without prompt, float32 [n, dim], of length 1.
    reference: Callable[[Sequence[str]], np.ndarray]


def export(directory: Path) -> Exported:
    """Trace the model of a sentence-transformers directory; its vectors are normalised.

    ModelMissing with the command to run where torch is not installed; ModelUnsupported where the model
    cannot be traced, has no tokenizer.json, or ranks by lengths that normalising would lose.
    """
    for package in ("torch", "sentence_transformers"):
        if find_spec(package) is None:
            raise ModelMissing(
                f"{directory}: this architecture is exported by torch, and {package} is not installed; "
                f"run: {INSTALL_COMMAND}"
            )
    from sentence_transformers import SentenceTransformer

    tokenizer_file = directory / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise ModelMissing(f"{tokenizer_file} is not there")
    tokenizer = tokenizer_file.read_bytes()
    try:
        # Local files only, and none of the code that a directory may bring along.
        model: Any = SentenceTransformer(
            str(directory), device="cpu", local_files_only=True, trust_remote_code=False
        ).eval()
    except Exception as error:  # whatever the libraries find wrong with a directory
        raise ModelUnsupported(f"{directory}: {type(error).__name__}: {error}") from error
    if model.similarity_fn_name not in (None, "cosine"):
        raise ModelUnsupported(
            f"{directory}: compares by {model.similarity_fn_name}; only unit vectors can be built"
        )
    words = model[0].auto_model.get_input_embeddings().weight
    require_vocabulary(tokenizer_file, tokenizer, len(words))
    max_tokens = int(model.max_seq_length)
    prompts = {name: text for name, text in (model.prompts or {}).items() if text}
    graph = _traced(model, directory, tokens=min(16, max_tokens))

    def reference(texts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = model.encode(
            list(texts), prompt="", normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return vectors

    return Exported(
        graph,
        tokenizer,
        max_tokens,
        prompts,
        _space(directory, tokenizer, max_tokens, prompts, model),
        reference,
    )


def _traced(model: Any, directory: Path, *, tokens: int) -> bytes:
    import torch

    class Unit(torch.nn.Module):  # type: ignore[misc]  # torch is not here when types are checked
        """The whole model from ids to unit vectors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            made = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
            return torch.nn.functional.normalize(made["sentence_embedding"], dim=-1)

    # Of different lengths, so that nothing is traced that holds for equal ones only.
    ids = torch.randint(0, 100, (3, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, tokens // 2 :] = 0
    axes = {"input_ids": {0: "texts", 1: "tokens"}, "attention_mask": {0: "texts", 1: "tokens"}}
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, warnings.catch_warnings():
        # The tracer warns of every shape it reads, and of being the older of two.
        warnings.simplefilter("ignore")
        try:
            # The newer exporter takes five times as long and emits operators that ONNX Runtime fuses less.
            torch.onnx.export(
                Unit().eval(),
                (ids, mask),
                file.name,
                input_names=list(axes),
                output_names=["vectors"],
                dynamic_axes={**axes, "vectors": {0: "texts"}},
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:  # torch's exporter has an error class for every operator
            raise ModelUnsupported(f"{directory}: torch cannot export it ({error})") from error
        return Path(file.name).read_bytes()


def _space(directory: Path, tokenizer: bytes, max_tokens: int, prompts: dict[str, str], model: Any) -> str:
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    config = json.loads((directory / "config.json").read_bytes())
    # Where a directory was made, and by what, does not change its vectors.
    facts = {key: value for key, value in config.items() if not key.startswith(("_", "transformers_version"))}
    return space_id(
        weights_sha256=weights.hexdigest(),
        architecture={**facts, "modules": [type(module).__name__ for module in model]},
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        max_tokens=max_tokens,
        pooling=json.dumps([module.get_config_dict() for module in model][1:], sort_keys=True, default=str),
        prompts=prompts,
        dim=int(model.get_embedding_dimension()),
        normalized=True,
    )
