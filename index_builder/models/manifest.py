"""What a built model is: its identity, its files with their checksums, and how close it came to FP32."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

#: Name of the manifest in a model's directory.
MANIFEST_FILE = "manifest.json"


class ModelCorrupt(RuntimeError):
    """A model's directory does not hold what its manifest says, or has no readable manifest."""


class Agreement(msgspec.Struct, frozen=True):
    """Cosine between this model's vectors and the FP32 model's, over texts that nothing was tuned on."""

    mean: float
    p1: float
    worst: float


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

    @property
    def model(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @classmethod
    def load(cls, directory: Path) -> "ModelManifest":
        """The manifest of a model's directory, every file of it checked; or ModelCorrupt."""
        try:
            facts = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes())
            manifest = msgspec.convert({**facts, "directory": str(directory)}, cls, dec_hook=_convert)
        except (OSError, TypeError, msgspec.MsgspecError) as error:
            raise ModelCorrupt(f"{directory}: no readable manifest ({error})") from error
        for name, wanted in manifest.files.items():
            try:
                found = file_sha256(directory / name)
            except OSError as error:
                raise ModelCorrupt(f"{directory / name}: {error.strerror}") from error
            if found != wanted:
                raise ModelCorrupt(f"{directory / name}: SHA-256 is {found}, the manifest says {wanted}")
        return manifest

    def save(self) -> None:
        """Write the manifest into `directory`."""
        facts = {name: getattr(self, name) for name in self.__struct_fields__ if name != "directory"}
        (self.directory / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(facts)))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(kind: type, value: Any) -> Any:
    return kind(value)
