"""The fastest way to run a model that is accurate is chosen, and nothing that was measured is lost."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from index_builder.models import gate, tuner
from index_builder.models.manifest import Agreement, Measured, Requirements
from index_builder.models.observation import Candidate, Observed
from index_builder.models.tuner import choose, judged

RNG = np.random.default_rng(11)
REFERENCE = RNG.normal(size=(40, 32)).astype(np.float32)
REFERENCE /= np.linalg.norm(REFERENCE, axis=1, keepdims=True)


def row(precision: str, threads: int, latency_ms: float, texts_per_cpu_s: float, *failed: str) -> Measured:
    return Measured(
        engine="onnx", precision=precision, threads=threads, reduction="", graph_bytes=1, failed=failed,
        agreement=Agreement(1, 1, 1), latency_ms=latency_ms, texts_per_cpu_s=texts_per_cpu_s,
    )  # fmt: skip


def verdict(tmp_path: Path, vectors: np.ndarray, *, batch_invariance: float = 1.0, **bars: float) -> Measured:
    graph = tmp_path / "graph"
    graph.write_bytes(b"12345")
    observed = Observed(vectors.tobytes(), vectors.shape[1], batch_invariance, 1.0, 100.0, 90.0, 10)
    required = Requirements(**bars)
    return judged(Candidate("int8", 1, str(graph)), observed, REFERENCE, REFERENCE, "", required)


def test_the_fastest_that_passes_is_chosen() -> None:
    table = [
        row("fp32", 1, 4.0, 500),
        row("fast", 1, 0.5, 9_000, "p1 0.98 < 0.99"),
        row("int8", 1, 2.0, 1_000),
        row("int8", 2, 1.5, 900),
    ]
    assert choose(table, "throughput") == 2
    assert choose(table, "latency") == 3
    assert choose([table[1]], "throughput") is None


def test_exact_vectors_pass(tmp_path: Path) -> None:
    found = verdict(tmp_path, REFERENCE)
    assert not found.failed
    assert (found.overlap, found.kept, found.graph_bytes) == (1.0, 1.0, 5)
    assert found.agreement is not None
    assert found.agreement.worst == pytest.approx(1.0, abs=1e-6)


def test_what_fails_is_told_with_figure_and_bar(tmp_path: Path) -> None:
    noise = RNG.normal(scale=0.05, size=REFERENCE.shape).astype(np.float32)
    assert [f.split()[0] for f in verdict(tmp_path, REFERENCE + noise).failed] == ["p1", "overlap"]
    assert not verdict(tmp_path, REFERENCE + noise, p1=0.5, overlap=0.5).failed
    told = verdict(tmp_path, REFERENCE, batch_invariance=0.9999).failed
    assert told == ["batch invariance 0.9999 < 0.99999"]
    broken = REFERENCE.copy()
    broken[3] = np.nan
    assert verdict(tmp_path, broken).failed, "not a number is no pass"


def test_a_reduction_is_held_to_what_it_has_to_keep(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    graph.write_bytes(b"")
    short = REFERENCE[:, :8]
    observed = Observed(short.tobytes(), 8, 1.0, 1.0, 1.0, 1.0, 1)
    found = judged(
        Candidate("fp32", 1, str(graph)), observed, short, REFERENCE, "pca-8", Requirements(kept=0.9)
    )
    assert found.overlap == 1.0
    assert 0 < found.kept < 0.9
    assert found.failed == [f"kept {found.kept:g} < 0.9"]


def test_candidates_are_run_in_processes_of_their_own(
    tmp_path: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index_builder.models.export import Float32, encoder
    from index_builder.models.source import ModelSource
    from index_builder.models.tokenizer import Tokenizer

    monkeypatch.setattr(tuner, "ROUNDS", 1)
    (tmp_path / "sound.onnx").write_bytes(encoder(ModelSource.open(tiny_source), Float32()))
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    texts = ("red fox", "green", "a b c d e f g h") * 8
    tokenizer_file = tiny_source / "tokenizer.json"
    reference = gate.vectors_of(tmp_path / "sound.onnx", Tokenizer(tokenizer_file, max_tokens=32), texts)
    told: list[tuple[str, float]] = []
    table = tuner.tune(
        [
            Candidate("fp32", 2, str(tmp_path / "sound.onnx")),
            Candidate("int8", 1, str(tmp_path / "broken.onnx")),
            Candidate("fp16", 1, str(tmp_path / "sound.onnx"), obstacle="not run: needs a CUDA device"),
        ],
        tokenizer_file=tokenizer_file,
        max_tokens=32,
        texts=texts,
        reference=reference,
        unreduced=reference,
        reduction="",
        requirements=Requirements(),
        progress=lambda stage, share: told.append((stage, share)),
    )
    sound, broken, unrun = table
    assert not sound.failed
    assert sound.latency_ms > 0
    assert sound.texts_per_s > 0
    assert sound.texts_per_cpu_s > 0
    assert sound.batch_invariance > 0.99999
    assert broken.failed[0].startswith("cannot be run here: ")
    assert "no graph" not in msgspec.json.encode(broken).decode(), "what is in a file is not told"
    assert unrun.failed == ["not run: needs a CUDA device"]
    assert broken.agreement is None is unrun.agreement
    assert [stage for stage, _ in told] == ["measure"] * 3
