"""A release holds the precision that the gate chose and all its figures; or there is none, and a reason."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from index_builder.models import gate, release, tuner
from index_builder.models.build import ModelInaccurate
from index_builder.models.manifest import ModelManifest, Requirements
from index_builder.models.observation import Candidate, Observed, observe
from index_builder.models.release import ReleaseRefused, Wanted
from index_builder.models.source import ModelMissing, ModelUnsupported
from index_builder.models.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
TEXTS = tuple(f"{word} fox {letters}" for word in ("red", "green", "") for letters in
              ("a", "b c", "d e f", "x y z w", "q", "k l m n o p", "foxes", "u v"))  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model knows few words; and it is measured here, in this process."""

    def here(candidate: Candidate, tokenizer_file: Path, max_tokens: int, texts: Sequence[str]) -> Observed:
        return observe(candidate, tokenizer_file, max_tokens, texts)

    monkeypatch.setattr(gate, "TEXTS", TEXTS)
    monkeypatch.setattr(tuner, "_in_child", here)


def make(source: Path, out: Path, **wanted: object) -> ModelManifest:
    """A release of `source` into `out`."""
    asked = replace(Wanted(model="tiny@1", texts=TEXTS), **wanted)
    return release.release(source, out, asked, lambda stage, share: None)


def nothing_in(out: Path) -> bool:
    return not [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_release_is_a_model_with_its_table(tiny_source: Path, tmp_path: Path) -> None:
    made = make(tiny_source, tmp_path)
    assert made.gate is not None
    chosen = made.gate.table[made.gate.chosen]
    assert made.directory == tmp_path / "tiny@1" / chosen.precision
    assert ModelManifest.load(made.directory) == made
    assert {path.name for path in made.directory.iterdir()} == {*made.files, "manifest.json"}
    assert not list(made.directory.parent.glob(".building-*"))
    assert [row.precision for row in made.gate.table] == ["fp32", "int8", "weight8", "fp16"]
    passing = [row for row in made.gate.table if not row.failed]
    assert chosen.texts_per_cpu_s == max(row.texts_per_cpu_s for row in passing)
    assert made.agreement == chosen.agreement
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert made.gate.table[3].failed == ["not run: needs a CUDA device"]


def test_only_what_was_asked_for_is_tried(tiny_source: Path, tmp_path: Path) -> None:
    made = make(tiny_source, tmp_path, precisions=("weight8",), threads=(1, 2), prefer="latency")
    assert made.gate is not None
    assert [(row.precision, row.threads) for row in made.gate.table] == [("weight8", 1), ("weight8", 2)]
    assert made.threads == made.gate.table[made.gate.chosen].threads
    assert made.precision == "weight8"


def test_half_floats_are_released_by_name_also_where_they_cannot_be_run(
    tiny_source: Path, tmp_path: Path
) -> None:
    made = make(tiny_source, tmp_path, precisions=("fp16",))
    assert made.precision == "fp16"
    assert made.agreement.worst > 0.999


def test_nothing_is_released_that_fails(tiny_source: Path, tmp_path: Path) -> None:
    impossible = Requirements(p1=1.1)
    with pytest.raises(ModelInaccurate, match=r"int8 with 1: p1 [0-9.]+ < 1\.1"):
        make(tiny_source, tmp_path, requirements=impossible)
    assert nothing_in(tmp_path)


def test_a_released_version_never_changes(tiny_source: Path, tmp_path: Path) -> None:
    made = make(tiny_source, tmp_path, precisions=("fp32",))
    with pytest.raises(ReleaseRefused, match=r"is released already \(fp32\)"):
        make(tiny_source, tmp_path, precisions=("int8",))
    assert ModelManifest.load(made.directory) == made


def test_a_pca_is_part_of_the_space_and_of_every_variant(tiny_source: Path, tmp_path: Path) -> None:
    whole = make(tiny_source, tmp_path / "whole", precisions=("fp32",))
    fit = tuple(f"{a} {b} fox" for a in "abcdefghijklmnop" for b in "qrstuv")
    cut = make(tiny_source, tmp_path / "cut", reduction="pca:24", fit_texts=fit, dimensions=(8, 16))
    assert (cut.dim, whole.dim) == (24, 64)
    assert cut.space != whole.space
    assert cut.reduction is not None
    assert cut.gate is not None
    assert all(row.reduction == "pca-24" for row in cut.gate.table)
    assert all(0.3 < row.kept < 1 for row in cut.gate.table if row.agreement)
    assert list(cut.dimensions) == [8, 16]
    assert cut.gate.kept_at["8"] < cut.gate.kept_at["16"] < 1
    tokenizer = Tokenizer(cut.directory / "tokenizer.json", max_tokens=32)
    vectors = gate.vectors_of(cut.directory / "model.onnx", tokenizer, TEXTS)
    assert vectors.shape == (len(TEXTS), 24)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ({"model": "tiny"}, "'tiny' is not NAME@VERSION"),
        ({"model": "../x@1"}, "is not NAME@VERSION"),
        ({"precisions": ("int4",)}, "precision 'int4' is none of"),
        ({"reduction": "pca"}, "'pca' is neither int8 nor pca:DIM"),
        ({"reduction": "pca:8"}, "fitted on texts"),
        ({"texts": ("a",)}, "1 texts judge nothing"),
        ({"dimensions": (64,), "precisions": ("fp32",)}, "dimension 64: the model has 64"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_source: Path, tmp_path: Path, wanted: dict[str, object], what: str
) -> None:
    with pytest.raises(ReleaseRefused, match=what):
        make(tiny_source, tmp_path, **wanted)
    assert nothing_in(tmp_path)


def test_another_architecture_asks_for_the_extra(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_builder.models import torch_export

    monkeypatch.setattr(torch_export, "find_spec", lambda name: None)
    other = shutil.copytree(tiny_source, tmp_path / "source")
    (other / "config.json").write_text(json.dumps({"model_type": "mpnet"}))
    with pytest.raises(ModelMissing, match=r"exported by torch.*pip install 'ringfort\[models\]'$"):
        make(other, tmp_path / "out")


def test_another_models_tokenizer_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_source, tmp_path / "source")
    facts = json.loads((other / "tokenizer.json").read_bytes())
    facts["model"]["vocab"] |= {f"w{i}": len(facts["model"]["vocab"]) + i for i in range(5)}
    (other / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json: a vocabulary of 39.*embeddings of 34"):
        make(other, tmp_path / "out")
    assert nothing_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("model.safetensors", b"no tensors", "not readable as safetensors"),
        ("config.json", b"{", "not JSON"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
    ],
)
def test_a_broken_file_is_named(
    tiny_source: Path, tmp_path: Path, file: str, content: bytes, what: str
) -> None:
    other = shutil.copytree(tiny_source, tmp_path / "source")
    (other / file).write_bytes(content)
    with pytest.raises(ModelUnsupported, match=f"{file}: .*{what}"):
        make(other, tmp_path / "out")


def test_the_command_prints_the_table_and_refuses_in_a_sentence(tiny_source: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("\n".join(TEXTS))
    command = [
        sys.executable, "-m", "index_builder.models", "build", str(tiny_source), "--name", "tiny@7",
        "--out", str(tmp_path / "out"), "--precision", "int8", "--threads", "1", "--texts", str(texts),
        "--min-p1", "0.9",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert first.returncode == 0, first.stderr
    assert "chosen" in first.stdout
    assert "tiny@7" in first.stdout
    again = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert again.returncode == 1
    error = json.loads(again.stderr)["error"]
    assert error["reason"] == "ReleaseRefused"
    assert "is released already" in error["message"]
