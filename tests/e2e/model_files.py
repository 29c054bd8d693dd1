"""Model directories for tests: the default model's files, with something else said of them."""

import json
import shutil
from pathlib import Path

from index_builder.models.space import variant_id

DEFAULT = "all-minilm-l6-v2@1"


def made_model(model_dir: Path, directory: Path, *, name: str, version: str = "1", **facts: object) -> Path:
    """A model under another name in `directory`, of which `facts` are said."""
    shutil.copytree(model_dir / DEFAULT / "int8", directory)
    said(directory, name=name, version=version, **facts)
    return directory


def said(directory: Path, **facts: object) -> None:
    """Say something else in a manifest, whose variant follows from its space."""
    path = directory / "manifest.json"
    told = {**json.loads(path.read_text()), **facts}
    told["variant"] = variant_id(
        space=told["space"],
        precision=told["precision"],
        engine="onnx",
        artifact_sha256=told["files"]["model.onnx"],
    )
    path.write_text(json.dumps(told))
