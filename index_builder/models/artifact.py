"""A released model as it travels: fetched from a directory or an object store, checked, put in its place."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from index_builder.models.engine import ENGINE, Engine, EngineUnavailable
from index_builder.models.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    ModelCorrupt,
    ModelManifest,
)
from index_builder.models.publication import BUILDING, publish, sole_builder
from index_builder.models.source import TABLE_PADDING_ROWS
from index_builder.models.space import variant_id
from index_builder.models.tokenizer import Tokenizer

#: A manifest is read as a whole, so it is not read beyond this.
MANIFEST_BYTES = 4 * 1024 * 1024
COPY_BYTES = 1024 * 1024
#: How far from 1 a vector's length may be; rounded ones are a little off.
LENGTH_SLACK = 0.01


class ArtifactRefused(ValueError):
    """What lies at an address is not a model that can be run here; the message says what and where."""


def peek(url: str) -> ModelManifest:
    """The manifest at an address, its files unseen; ArtifactRefused."""
    _, root, data = _manifest(url)
    try:
        return ModelManifest.of(data, Path(root))
    except ModelCorrupt as error:
        raise ArtifactRefused(str(error)) from None


def fetch(url: str, models: Path) -> ModelManifest:
    """Copy the model at `url` to `models`/NAME@VERSION/PRECISION, every file checked and the model tried.

    `url` is a directory or an address that fsspec knows (file://, memory://, s3:// with its plugin). What
    lies at the place already is replaced; a copy that fails or is cut short leaves it as it was.
    ArtifactRefused.
    """
    files, root, data = _manifest(url)
    manifest = peek(url)
    parent = models / manifest.model
    parent.mkdir(parents=True, exist_ok=True)
    with sole_builder(parent):
        building = Path(tempfile.mkdtemp(prefix=BUILDING, dir=parent))
        for name, wanted in manifest.files.items():
            try:
                found = _copy(files, f"{root}/{name}", building / name)
            except OSError as error:
                raise ArtifactRefused(f"{url}/{name}: {error.strerror or 'is not there'}") from None
            if found != wanted:
                raise ArtifactRefused(f"{url}/{name}: SHA-256 is {found}, the manifest says {wanted}")
        (building / MANIFEST_FILE).write_bytes(data)
        _try(ModelManifest.load(building), url)
        target = parent / manifest.precision
        publish(building, target)
    return ModelManifest.load(target)


def read(url: str) -> bytes:
    """The bytes of a manifest's file at an address, as far as a manifest goes; ArtifactRefused."""
    return _read(url)[2]


def _manifest(url: str) -> tuple[Any, str, bytes]:
    """The file system of an address, its path there, and the bytes of its manifest."""
    files, path, data = _read(f"{url}/{MANIFEST_FILE}")
    return files, path.removesuffix(f"/{MANIFEST_FILE}"), data


def _read(url: str) -> tuple[Any, str, bytes]:
    # A service that fetches nothing need not wait for it.
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ArtifactRefused(f"{url}: {error}") from None
    try:
        with files.open(path, "rb") as file:
            data: bytes = file.read(MANIFEST_BYTES)
    except OSError as error:
        raise ArtifactRefused(f"{url}: {error.strerror or 'is not there'}") from None
    return files, path, data


def _copy(files: Any, path: str, target: Path) -> str:
    """Copy a file a piece at a time; its SHA-256."""
    digest = hashlib.sha256()
    with files.open(path, "rb") as source, target.open("wb") as copy:
        while piece := source.read(COPY_BYTES):
            digest.update(piece)
            copy.write(piece)
    return digest.hexdigest()


def _try(manifest: ModelManifest, url: str) -> None:
    """Load the model and run it once; ArtifactRefused where it is not what its manifest says."""
    variant = variant_id(
        space=manifest.space,
        precision=manifest.precision,
        engine=ENGINE,
        artifact_sha256=manifest.files[GRAPH_FILE],
    )
    if manifest.variant != variant:
        raise ArtifactRefused(
            f"{url}/{MANIFEST_FILE}: variant is {manifest.variant}; space, precision and graph make {variant}"
        )
    try:
        engine = Engine.load(manifest.directory / GRAPH_FILE, threads=1)
    except EngineUnavailable as error:
        raise ArtifactRefused(f"{url}/{GRAPH_FILE}: {error}") from None
    if "vectors" not in engine.outputs():
        raise ArtifactRefused(f"{url}/{GRAPH_FILE}: has no output named vectors")
    if manifest.image is not None:
        size = (manifest.image.height, manifest.image.width)
        shape = (1, 3, *size) if manifest.image.layout == "CHW" else (1, *size, 3)
        picture = np.random.default_rng(0).random(shape, np.float32)
        vectors = _run(engine, {manifest.image.input: picture}, url)
    else:
        vectors = _run_tokens(engine, manifest, url)
    if vectors.shape != (1, manifest.dim):
        shape_said = "×".join(map(str, vectors.shape))
        raise ArtifactRefused(f"{url}/{GRAPH_FILE}: gives {shape_said}, the manifest says {manifest.dim}")
    if not abs(float(np.linalg.norm(vectors)) - 1) <= LENGTH_SLACK:
        raise ArtifactRefused(f"{url}/{GRAPH_FILE}: gives vectors that are not of length 1")


def _run_tokens(engine: Engine, manifest: ModelManifest, url: str) -> np.ndarray:
    """The vector of a text, once the tokenizer is known to be the model's."""
    path = f"{url}/{TOKENIZER_FILE}"
    try:
        tokenizer = Tokenizer(manifest.directory / TOKENIZER_FILE, max_tokens=manifest.max_tokens)
    except Exception as error:  # the library raises plain Exceptions of its own making
        raise ArtifactRefused(f"{path}: not a tokenizer ({error})") from None
    size = tokenizer.vocabulary_size

    def known(token: int) -> bool:
        ids = np.array([[token]], np.int64)
        try:
            engine.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        except Exception:  # the runtime's own, for an index beyond the table
            return False
        return True

    ids = np.zeros((1, 1), np.int64)
    made = _run(engine, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, url)
    if not known(size - 1):
        raise ArtifactRefused(
            f"{path}: a vocabulary of {size} tokens, and the model has embeddings of fewer: "
            "it is another model's tokenizer"
        )
    if known(size + TABLE_PADDING_ROWS):
        raise ArtifactRefused(
            f"{path}: a vocabulary of {size} tokens, and the model has embeddings of many more: "
            "it is another model's tokenizer"
        )
    return made


def _run(engine: Engine, inputs: dict[str, np.ndarray], url: str) -> np.ndarray:
    try:
        return engine.run(inputs)
    except Exception as error:  # the runtime raises plain Exceptions of its own making
        raise ArtifactRefused(f"{url}/{GRAPH_FILE}: cannot be run ({error})") from None
