"""A model that travels arrives whole, checked and tried; or nothing arrives, and the reason says where."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from index_builder.models import gate
from index_builder.models.artifact import ArtifactRefused, fetch, peek
from index_builder.models.build import ensure_model
from index_builder.models.manifest import ModelManifest
from index_builder.models.space import variant_id

Damage = Callable[[Path], None]


@pytest.fixture
def built(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelManifest:
    """A directory to be damaged."""
    monkeypatch.setattr(gate, "TEXTS", ("red fox", "green foxes a b c", "z"))
    return ensure_model(tmp_path / "built", source=tiny_source)


def change(directory: Path, **facts: object) -> None:
    """Say something else in the manifest, whose variant follows from its graph."""
    path = directory / "manifest.json"
    told = {**json.loads(path.read_text()), **facts}
    if "model.onnx" in told["files"] and "variant" not in facts:
        told["variant"] = variant_id(
            space=told["space"],
            precision=told["precision"],
            engine="onnx",
            artifact_sha256=told["files"]["model.onnx"],
        )
    path.write_text(json.dumps(told))


def put(directory: Path, name: str, data: bytes) -> None:
    """Replace a file together with its checksum."""
    (directory / name).write_bytes(data)
    files = json.loads((directory / "manifest.json").read_text())["files"]
    change(directory, files={**files, name: sha256(data).hexdigest()})


def test_a_model_arrives_at_its_place(built: ModelManifest, tmp_path: Path) -> None:
    change(built.directory, name="tiny", version="7")
    made = fetch(str(built.directory), tmp_path / "models")
    assert made.directory == tmp_path / "models" / "tiny@7" / "int8"
    assert (made.model, made.variant, made.files) == ("tiny@7", built.variant, built.files)
    assert fetch(str(built.directory), tmp_path / "models") == made, "a second time it replaces itself"
    assert not list((tmp_path / "models" / "tiny@7").glob(".building-*"))


def test_a_model_arrives_from_an_object_store(built: ModelManifest, tmp_path: Path) -> None:
    url = f"memory://{uuid4().hex}/tiny"
    store = fsspec.filesystem("memory")
    for path in built.directory.iterdir():
        store.pipe_file(f"{url}/{path.name}", path.read_bytes())
    assert peek(url).variant == built.variant
    assert fetch(url, tmp_path / "models").files == built.files
    store.rm_file(f"{url}/tokenizer.json")
    with pytest.raises(ArtifactRefused, match=f"^{url}/tokenizer.json: "):
        fetch(url, tmp_path / "again")


def _more_tokens(directory: Path, count: int) -> None:
    facts = json.loads((directory / "tokenizer.json").read_bytes())
    vocabulary = facts["model"]["vocab"]
    vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(count)}
    put(directory, "tokenizer.json", json.dumps(facts).encode())


def _fixed(directory: Path, values: list[float]) -> None:
    """A graph that gives the same vector for everything, from inputs like a text model's."""
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["row"], value_floats=values),
            helper.make_node("Unsqueeze", ["row", "axis"], ["vectors"]),
        ],
        "fixed",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "t"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, [1, len(values)])],
        [onnx.numpy_helper.from_array(np.array([0], np.int64), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    put(directory, "model.onnx", model.SerializeToString())


REFUSALS: dict[str, tuple[Damage, str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: No such file"),
    "no JSON": (lambda d: (d / "manifest.json").write_text("{") and None, "no readable manifest"),
    "no dimension": (lambda d: change(d, dim="many"), r"Expected `int`, got `str` - at `\$.dim`"),
    "no graph named": (lambda d: change(d, files={"tokenizer.json": "0"}), r"names no model\.onnx"),
    "a way out": (
        lambda d: change(d, files={"model.onnx": "0", "tokenizer.json": "0", "../x": "0"}),
        r"'\.\./x' is not a file of the directory",
    ),
    "a file is gone": (lambda d: (d / "model.onnx").unlink(), r"model\.onnx: No such file"),
    "a byte is another": (
        lambda d: (d / "model.onnx").write_bytes(b"x" + (d / "model.onnx").read_bytes()[1:]) and None,
        r"model\.onnx: SHA-256 is [0-9a-f]{64}, the manifest says",
    ),
    "no ONNX": (lambda d: put(d, "model.onnx", b"no graph"), r"model\.onnx: .*Protobuf parsing failed"),
    "no tokenizer": (lambda d: put(d, "tokenizer.json", b"{}"), r"tokenizer\.json: not a tokenizer"),
    "another variant": (
        lambda d: change(d, variant="0" * 16),
        r"manifest\.json: variant is 0{16}; space, precision and graph make",
    ),
    "a larger vocabulary": (
        lambda d: _more_tokens(d, 9),
        r"tokenizer\.json: a vocabulary of 43 tokens, and the model has embeddings of fewer",
    ),
    "another length": (lambda d: change(d, dim=65), r"model\.onnx: gives 1×64, the manifest says 65"),
    "a smaller vocabulary": (lambda d: _fixed(d, [1.0] + [0.0] * 63), "embeddings of many more"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_run_is_refused_and_leaves_nothing(
    built: ModelManifest, tmp_path: Path, case: str
) -> None:
    damage, what = REFUSALS[case]
    change(built.directory, name="tiny", version="7")
    damage(built.directory)
    with pytest.raises(ArtifactRefused, match=what) as refused:
        fetch(str(built.directory), tmp_path / "models")
    assert str(built.directory) in str(refused.value), "it says where"
    assert not list((tmp_path / "models").glob("*/int8"))


def test_a_refused_copy_leaves_what_was_there(built: ModelManifest, tmp_path: Path) -> None:
    first = fetch(str(built.directory), tmp_path / "models")
    (built.directory / "tokenizer.json").unlink()
    with pytest.raises(ArtifactRefused):
        fetch(str(built.directory), tmp_path / "models")
    assert ModelManifest.load(first.directory) == first


@pytest.mark.parametrize("url", ["nowhere://x", "/no/such/directory"])
def test_an_address_that_leads_nowhere_is_told(url: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused, match=f"^{url}"):
        fetch(url, tmp_path)
