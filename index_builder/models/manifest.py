"""What a built model is: its identity, its files with their checksums, and how close it came to FP32."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from index_builder.models.reduction import Reduction

#: Name of the manifest in a model's directory.
MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"


class ModelCorrupt(RuntimeError):
    """A model's directory does not hold what its manifest says, or has no readable manifest."""


class Agreement(msgspec.Struct, frozen=True):
    """Cosine between this model's vectors and the FP32 model's, over texts that nothing was tuned on."""

    mean: float
    p1: float
    worst: float


class Requirements(msgspec.Struct, frozen=True):
    """What a way to run a model has to reach to speak for its space."""

    #: First percentile of the cosine to FP32.
    p1: float = 0.99
    #: Least cosine between a text's vector alone and in a padded batch.
    batch_invariance: float = 0.99999
    #: Share of each text's ten nearest that are those of FP32.
    overlap: float = 0.90
    #: Share of them that are those of the model without its reduction.
    kept: float = 0.0


class Measured(msgspec.Struct, frozen=True):
    """One way to run a model as it was found on one host; what could not be run here has no figures."""

    engine: str
    precision: str
    #: Threads that run one batch together.
    threads: int
    #: Empty, or the kind of reduction with its dimension.
    reduction: str
    graph_bytes: int
    #: What it failed, each with figure and bar; empty: it passes.
    failed: Sequence[str]
    agreement: Agreement | None = None
    #: Share of each text's ten nearest that are those of FP32, reduced alike.
    overlap: float = 0.0
    #: Share of them that are those of FP32 without reduction.
    kept: float = 0.0
    #: Least cosine between a text's vector alone and in a padded batch.
    batch_invariance: float = 0.0
    #: One short text, median.
    latency_ms: float = 0.0
    #: Batches of 32 short texts, on the clock.
    texts_per_s: float = 0.0
    #: The same, a second of CPU: what a busy service gets out of a core.
    texts_per_cpu_s: float = 0.0
    #: Resident memory that loading it and a long batch took.
    memory_bytes: int = 0


class Gate(msgspec.Struct, frozen=True):
    """What the accuracy gate asked for, found, and chose."""

    requirements: Requirements
    #: "throughput" (texts a second of CPU) or "latency" (of one text).
    prefer: str
    texts: int
    table: Sequence[Measured]
    #: Place in `table` of what the directory holds.
    chosen: int
    #: Share of each text's ten nearest that is left at the lengths the model declares.
    kept_at: Mapping[str, float]


class ImageInput(msgspec.Struct, frozen=True):
    """How a picture becomes what an image model reads: RGB or BGR floats, (value / scale - mean) / std."""

    #: Name of the graph's input, float32 [n, 3, height, width] or as `layout` says.
    input: str
    width: int
    height: int
    #: stretch: to size, whatever the shape. crop: cover the size, take the middle. pad: fit in, black around.
    resize: Literal["stretch", "crop", "pad"] = "crop"
    #: With crop, what the shorter side is scaled to before the middle is taken; 0: just enough.
    shorter_side: int = 0
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    channels: Literal["RGB", "BGR"] = "RGB"
    #: Order of the graph's axes after the batch's.
    layout: Literal["CHW", "HWC"] = "CHW"
    #: What a channel's byte is divided by.
    scale: float = 255.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)


class ModelManifest(msgspec.Struct, frozen=True):
    """One built model. `files` maps every file of `directory` but the manifest to its SHA-256."""

    name: str
    version: str
    precision: str
    #: Vectors of one space may be compared; see space.py.
    space: str
    #: This way to run the space.
    variant: str
    dim: int
    max_tokens: int
    #: Text put before an input, by input type ("query", "document"); absent means none.
    prompts: Mapping[str, str]
    files: Mapping[str, str]
    agreement: Agreement
    #: Grows when the builder would make another artifact from the same weights.
    recipe: int
    directory: Path
    #: Threads that run one batch together.
    threads: int = 1
    #: Lengths at which a vector's head stands alone, below `dim`; only models trained for it have any.
    dimensions: Sequence[int] = ()
    #: What became of the model's own vectors; part of the space.
    reduction: Reduction | None = None
    #: A model of pictures reads them like this, and no texts.
    image: ImageInput | None = None
    gate: Gate | None = None

    @property
    def model(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @classmethod
    def load(cls, directory: Path) -> "ModelManifest":
        """The manifest of a model's directory, every file of it checked; or ModelCorrupt."""
        try:
            manifest = cls.of((directory / MANIFEST_FILE).read_bytes(), directory)
        except OSError as error:
            raise ModelCorrupt(f"{directory}: no readable manifest ({error})") from error
        for name, wanted in manifest.files.items():
            try:
                found = file_sha256(directory / name)
            except OSError as error:
                raise ModelCorrupt(f"{directory / name}: {error.strerror}") from error
            if found != wanted:
                raise ModelCorrupt(f"{directory / name}: SHA-256 is {found}, the manifest says {wanted}")
        return manifest

    @classmethod
    def of(cls, data: bytes, directory: Path) -> "ModelManifest":
        """The manifest that `data` says, its files unseen; ModelCorrupt where it is none."""
        try:
            facts = msgspec.json.decode(data)
            manifest = msgspec.convert({**facts, "directory": str(directory)}, cls, dec_hook=_convert)
        except (TypeError, msgspec.MsgspecError) as error:
            raise ModelCorrupt(f"{directory}: no readable manifest ({error})") from error
        wanted = {GRAPH_FILE} if manifest.image else {GRAPH_FILE, TOKENIZER_FILE}
        if missing := wanted - set(manifest.files):
            raise ModelCorrupt(f"{directory / MANIFEST_FILE}: names no {', '.join(sorted(missing))}")
        if strange := [name for name in manifest.files if Path(name).name != name]:
            raise ModelCorrupt(f"{directory / MANIFEST_FILE}: {strange[0]!r} is not a file of the directory")
        return manifest

    def encode(self) -> bytes:
        """The manifest as JSON; where it lies is not part of it."""
        facts = {name: getattr(self, name) for name in self.__struct_fields__ if name != "directory"}
        return msgspec.json.format(msgspec.json.encode(facts))

    def save(self) -> None:
        """Write the manifest into `directory`."""
        (self.directory / MANIFEST_FILE).write_bytes(self.encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(kind: type, value: Any) -> Any:
    return kind(value)
