"""Builds a model's directory from published weights, once, and checks it whenever it is opened."""

import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from index_builder.models import gate
from index_builder.models.engine import ENGINE
from index_builder.models.export import Float32, encoder
from index_builder.models.manifest import Agreement, ModelCorrupt, ModelManifest
from index_builder.models.publication import BUILDING, publish, sole_builder
from index_builder.models.quantize import int8_encoder
from index_builder.models.ranges import observe
from index_builder.models.source import ModelSource, packaged_model
from index_builder.models.space import variant_id
from index_builder.models.tokenizer import Tokenizer

DEFAULT_MODEL = "all-minilm-l6-v2@1"
PRECISIONS = ("int8", "fp32")
#: Raise it with every change of the graphs: directories built by an older recipe are rebuilt.
RECIPE = 2

#: Told the stage ("read", "build", "check", "write") and the share done, 0 to 1.
Progress = Callable[[str, float], None]

log = logging.getLogger(__name__)


class ModelInaccurate(RuntimeError):
    """The quantized model strays too far from FP32 on this machine; the message has the figures."""


def ensure_model(
    directory: Path,
    *,
    source: Path | None = None,
    precision: str = "int8",
    progress: Progress | None = None,
) -> ModelManifest:
    """The default model, ready to run, in `directory`/NAME@VERSION/PRECISION; built where it is not.

    Files are checked against their SHA-256 each time; a damaged directory is rebuilt. A build shows up
    whole or not at all, and one process builds at a time. `source` is a sentence-transformers directory in
    place of the packaged weights; where it holds another model than was built, that one is replaced.
    ModelMissing says how to get the weights; ModelUnsupported; ModelInaccurate.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, not one of {', '.join(PRECISIONS)}")
    target = directory / DEFAULT_MODEL / precision
    # The packaged weights are one release and never change; a directory of one's own may.
    space = ModelSource.open(source).space if source else None
    manifest = _open(target, space)
    if manifest is not None:
        return manifest
    target.parent.mkdir(parents=True, exist_ok=True)
    with sole_builder(target.parent):
        built = _open(target, space)
        return built or _build(target, source or packaged_model(), precision, progress or _silent)


def _open(target: Path, space: str | None) -> ModelManifest | None:
    """The manifest of a sound directory of the present recipe and of `space`, or None where to build one."""
    if not target.exists():
        return None
    try:
        manifest = ModelManifest.load(target)
    except ModelCorrupt as error:
        log.warning("model is damaged and will be rebuilt: %s", error)
        return None
    if manifest.recipe != RECIPE:
        log.info("model %s was built by recipe %d and will be rebuilt", target, manifest.recipe)
        return None
    if space not in (None, manifest.space):
        log.warning("model %s is of space %s, its source of %s: rebuilding", target, manifest.space, space)
        return None
    return manifest


def _build(target: Path, source_directory: Path, precision: str, progress: Progress) -> ModelManifest:
    progress("read", 0.0)
    source = ModelSource.open(source_directory)
    building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=target.parent))
    (building / "tokenizer.json").write_bytes(source.tokenizer)
    tokenizer = Tokenizer(building / "tokenizer.json", max_tokens=source.max_tokens)
    progress("build", 0.2)
    exact = encoder(source, Float32())
    progress("check", 0.5)
    reference = gate.vectors_of(exact, tokenizer, gate.TEXTS)
    if precision == "fp32":
        artifact, agreement = exact, gate.agreement(reference, reference)
    else:
        artifact, agreement = quantized(static_int8(source, tokenizer), tokenizer, reference)
    progress("write", 0.9)
    (building / "model.onnx").write_bytes(artifact)
    name, _, version = DEFAULT_MODEL.partition("@")
    files = {"model.onnx": artifact, "tokenizer.json": source.tokenizer}
    checksums = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    ModelManifest(
        name=name,
        version=version,
        precision=precision,
        space=source.space,
        variant=variant_id(
            space=source.space,
            precision=precision,
            engine=ENGINE,
            artifact_sha256=checksums["model.onnx"],
        ),
        dim=source.architecture.hidden,
        max_tokens=source.max_tokens,
        prompts=source.prompts,
        files=checksums,
        agreement=agreement,
        recipe=RECIPE,
        directory=building,
    ).save()
    publish(building, target)
    progress("write", 1.0)
    log.info(
        "model built model=%s precision=%s cosine_p1=%.4f path=%s",
        DEFAULT_MODEL,
        precision,
        agreement.p1,
        target,
    )
    return ModelManifest.load(target)


def static_int8(source: ModelSource, tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """What makes the model's INT8 graph with weights of so many bits."""
    ranges = observe(source, tokenizer)
    return lambda weight_bits: int8_encoder(source, ranges, weight_bits=weight_bits)


def quantized(
    int8: Callable[[int], bytes], tokenizer: Tokenizer, reference: np.ndarray
) -> tuple[bytes, Agreement]:
    """The INT8 graph that agrees with FP32 on this machine: 8-bit weights, or 7 where 8 overflow.

    `int8` makes a graph with weights of so many bits; `reference` are the FP32 vectors of `gate.TEXTS`.
    ModelInaccurate where neither does.
    """
    for weight_bits in (8, 7):
        artifact = int8(weight_bits)
        agreement = gate.agreement(gate.vectors_of(artifact, tokenizer, gate.TEXTS), reference)
        if agreement.p1 >= gate.LOWEST_P1:
            return artifact, agreement
        log.warning("INT8 with %d-bit weights has cosine p1 %.4f to FP32", weight_bits, agreement.p1)
    raise ModelInaccurate(
        f"INT8 has cosine p1 {agreement.p1:.4f} to FP32 here, less than {gate.LOWEST_P1}; use precision fp32"
    )


def _silent(stage: str, share: float) -> None:
    """For callers who do not want to know."""
