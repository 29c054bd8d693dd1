"""The tuner: every way to run a model is measured on this host, and the fastest that passes is chosen."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from index_builder.models import gate
from index_builder.models.engine import ENGINE
from index_builder.models.manifest import Measured, Requirements
from index_builder.models.observation import Candidate, Observed, Obstacle, Question

#: How often all candidates are measured in turn; the best of each counts, as others use the host too.
ROUNDS = 2


def tune(
    candidates: Sequence[Candidate],
    *,
    tokenizer_file: Path,
    max_tokens: int,
    texts: Sequence[str],
    reference: np.ndarray,
    unreduced: np.ndarray,
    reduction: str,
    requirements: Requirements,
    progress: Callable[[str, float], None],
) -> list[Measured]:
    """Measure every candidate in a process of its own, in turn; a row each, in order.

    `reference` are the FP32 vectors of `texts` in the same space, `unreduced` those before a reduction.
    What cannot be run says why in its row and fails.
    """
    best: dict[int, Measured] = {}
    turns = [(turn, i) for turn in range(ROUNDS) for i in range(len(candidates))]
    for done, (_, i) in enumerate(turns):
        candidate = candidates[i]
        progress("measure", done / len(turns))
        found: Observed | str = candidate.obstacle or _in_child(candidate, tokenizer_file, max_tokens, texts)
        row = judged(candidate, found, reference, unreduced, reduction, requirements)
        best[i] = _better(best.get(i, row), row)
    return [best[i] for i in range(len(candidates))]


def judged(
    candidate: Candidate,
    found: Observed | str,
    reference: np.ndarray,
    unreduced: np.ndarray,
    reduction: str,
    requirements: Requirements,
) -> Measured:
    """A candidate's row: what was observed, or why it could not be, against what is required."""
    row = Measured(
        engine=ENGINE,
        precision=candidate.precision,
        threads=candidate.threads,
        reduction=reduction,
        graph_bytes=Path(candidate.graph).stat().st_size if candidate.graph else 0,
        failed=[found] if isinstance(found, str) else [],
    )
    if isinstance(found, str):
        return row
    vectors = found.matrix()
    agreement = gate.agreement(_unit(vectors), _unit(reference))
    row = msgspec.structs.replace(
        row,
        agreement=agreement,
        overlap=round(gate.overlap(vectors, reference), 4),
        kept=round(gate.overlap(vectors, unreduced), 4),
        batch_invariance=round(found.batch_invariance, 7),
        latency_ms=round(found.latency_ms, 3),
        texts_per_s=round(found.texts_per_s, 1),
        texts_per_cpu_s=round(found.texts_per_cpu_s, 1),
        memory_bytes=found.memory_bytes,
    )
    bars = (
        ("p1", agreement.p1, requirements.p1),
        ("batch invariance", row.batch_invariance, requirements.batch_invariance),
        ("overlap", row.overlap, requirements.overlap),
        ("kept", row.kept, requirements.kept),
    )
    failed = [f"{name} {got:g} < {least:g}" for name, got, least in bars if not got >= least]
    return msgspec.structs.replace(row, failed=failed)


def choose(table: Sequence[Measured], prefer: str) -> int | None:
    """Place of the fastest row that passes, None where none does.

    `prefer`: "throughput" is texts a second of CPU, as a service keeps every core busy with batches of its
    own, and as other load on the host hardly changes it; "latency" is that of one text.
    """
    passing = [i for i, row in enumerate(table) if not row.failed]
    if prefer == "latency":
        return min(passing, key=lambda i: table[i].latency_ms, default=None)
    return max(passing, key=lambda i: table[i].texts_per_cpu_s, default=None)


def _in_child(
    candidate: Candidate, tokenizer_file: Path, max_tokens: int, texts: Sequence[str]
) -> Observed | str:
    """What a candidate gave in a fresh process, or why it gave nothing."""
    question = msgspec.msgpack.encode(Question(candidate, str(tokenizer_file), max_tokens, texts))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "index_builder.models.observation"],
        input=question,
        capture_output=True,
        check=False,
    )
    try:
        answer = msgspec.msgpack.decode(child.stdout, type=Observed | Obstacle)
    except msgspec.DecodeError:
        said = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return f"cannot be run here: its process ended with {child.returncode} {' '.join(said)}".rstrip()
    return f"cannot be run here: {answer.why}" if isinstance(answer, Obstacle) else answer


def _better(one: Measured, other: Measured) -> Measured:
    """The row with the better time of two measurements of one candidate."""
    if other.agreement is None or one.agreement is None:
        return one if one.agreement is None else other
    return msgspec.structs.replace(
        one,
        latency_ms=min(one.latency_ms, other.latency_ms),
        texts_per_s=max(one.texts_per_s, other.texts_per_s),
        texts_per_cpu_s=max(one.texts_per_cpu_s, other.texts_per_cpu_s),
        memory_bytes=max(one.memory_bytes, other.memory_bytes),
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
