"""A model is built once, whole or not at all, and rebuilt when it is not what it was."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from index_builder.models import build, gate
from index_builder.models.build import DEFAULT_MODEL, ModelInaccurate, ensure_model
from index_builder.models.manifest import ModelCorrupt, ModelManifest


@pytest.fixture(autouse=True)
def short_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model knows few words; a few texts are gate enough."""
    monkeypatch.setattr(gate, "TEXTS", ("red fox", "green foxes a b c", "z"))


@pytest.fixture
def ensure(tmp_path: Path, tiny_source: Path) -> Callable[..., ModelManifest]:
    """ensure_model with the tiny weights."""

    def ensure(precision: str = "int8", **options: object) -> ModelManifest:
        return ensure_model(tmp_path / "models", source=tiny_source, precision=precision, **options)

    return ensure


def test_a_build_lies_where_it_belongs_and_says_what_it_is(
    tmp_path: Path, ensure: Callable[..., ModelManifest]
) -> None:
    stages: list[tuple[str, float]] = []
    manifest = ensure(progress=lambda stage, share: stages.append((stage, share)))
    assert manifest.directory == tmp_path / "models" / DEFAULT_MODEL / "int8"
    assert {path.name for path in manifest.directory.iterdir()} == {*manifest.files, "manifest.json"}
    assert (manifest.model, manifest.dim, manifest.max_tokens) == (DEFAULT_MODEL, 64, 32)
    assert manifest.prompts == {"query": "fox: "}
    assert gate.LOWEST_P1 <= manifest.agreement.worst <= manifest.agreement.mean < 1
    assert [stage for stage, _ in stages] == ["read", "build", "check", "write", "write"]
    assert [share for _, share in stages] == sorted(share for _, share in stages)
    assert stages[-1][1] == 1


def test_precisions_are_variants_of_one_space(ensure: Callable[..., ModelManifest]) -> None:
    int8, fp32 = ensure("int8"), ensure("fp32")
    assert int8.space == fp32.space
    assert int8.variant != fp32.variant
    assert fp32.agreement.worst > 0.999999


def test_a_sound_model_is_not_built_again(
    ensure: Callable[..., ModelManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure()
    monkeypatch.setattr(build, "encoder", None)
    assert ensure() == first


def test_building_again_gives_the_same_variant(tmp_path: Path, tiny_source: Path) -> None:
    """Else every rebuild would void what caches hold."""
    one, two = (ensure_model(tmp_path / name, source=tiny_source) for name in "ab")
    assert (one.variant, one.files) == (two.variant, two.files)


@pytest.mark.parametrize("file", ["model.onnx", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_model_is_rebuilt_and_logged(
    ensure: Callable[..., ModelManifest], caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    sound = ensure()
    path = sound.directory / file
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        path.write_bytes(data[:-3])
    else:
        path.unlink()
    with pytest.raises(ModelCorrupt, match=file if file != "manifest.json" else "manifest"):
        ModelManifest.load(sound.directory)
    with caplog.at_level(logging.WARNING):
        assert ensure() == sound
    assert "will be rebuilt" in caplog.text
    assert ModelManifest.load(sound.directory) == sound


def test_a_model_of_an_older_recipe_is_rebuilt(ensure: Callable[..., ModelManifest]) -> None:
    path = ensure().directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": 0}))
    assert ensure().recipe == build.RECIPE


def test_another_source_is_another_model(
    tmp_path: Path, tiny_source: Path, ensure: Callable[..., ModelManifest]
) -> None:
    first = ensure()
    other = shutil.copytree(tiny_source, tmp_path / "other")
    (other / "config_sentence_transformers.json").write_text('{"prompts": {"query": "red: "}}')
    second = ensure_model(tmp_path / "models", source=other)
    assert second.space != first.space
    assert ensure() == first


def test_an_interrupted_build_leaves_nothing_to_be_taken_for_a_model(
    tmp_path: Path, ensure: Callable[..., ModelManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(building: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "publish", power_cut)
        with pytest.raises(KeyboardInterrupt):
            ensure()
    parent = tmp_path / "models" / DEFAULT_MODEL
    assert not (parent / "int8").exists()
    assert list(parent.glob(".building-*")), "the half-built directory was expected to lie there"
    ensure()
    assert not list(parent.glob(".building-*"))


def test_builders_at_the_same_time_build_once(
    ensure: Callable[..., ModelManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    real = build._build

    def counted(*arguments: object) -> ModelManifest:
        builds.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(build, "_build", counted)
    results: list[ModelManifest] = []
    threads = [threading.Thread(target=lambda: results.append(ensure())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert results == [results[0]] * 4


def test_int8_takes_seven_bits_where_eight_overflow(
    ensure: Callable[..., ModelManifest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    figures = iter([gate.Agreement(0.9, 0.5, 0.1), gate.Agreement(0.999, 0.998, 0.997)])
    monkeypatch.setattr(gate, "agreement", lambda *_: next(figures))
    assert ensure().agreement.p1 == 0.998
    assert "8-bit weights has cosine p1 0.5000" in caplog.text


def test_int8_that_strays_too_far_is_not_published(
    tmp_path: Path, ensure: Callable[..., ModelManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "agreement", lambda *_: gate.Agreement(0.9, 0.5, 0.1))
    with pytest.raises(ModelInaccurate, match=r"0\.5000.*fp32"):
        ensure()
    assert not (tmp_path / "models" / DEFAULT_MODEL / "int8").exists()


def test_an_unknown_precision_is_refused(ensure: Callable[..., ModelManifest]) -> None:
    with pytest.raises(ValueError, match="precision is 'int4'"):
        ensure("int4")
