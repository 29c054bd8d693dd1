"""One way to run a model, run and timed; `python -m index_builder.models.observation` is a process for it.

A process of its own, as memory that one candidate gave back would hide what the next one takes.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import psutil

from index_builder.models.engine import Engine, EngineUnavailable
from index_builder.models.tokenizer import Tokenizer, padded

#: Texts of a batch whose rate is measured, and runs of it.
BATCH_TEXTS, BATCH_RUNS = 32, 8
#: Runs of the one short text whose latency is measured, after some that are not.
LATENCY_RUNS, WARM_RUNS = 30, 3


class Candidate(msgspec.Struct, frozen=True):
    """A way to run a model. `obstacle` says why it was not built or cannot be run here; empty: it can."""

    precision: str
    threads: int
    #: Path of its graph.
    graph: str | None
    device: str = "cpu"
    obstacle: str = ""


class Observed(msgspec.Struct, frozen=True, tag=True):
    """What one run of a candidate gave: vectors of the texts, each alone, and figures."""

    #: float32 [texts, dim], little-endian.
    vectors: bytes
    dim: int
    batch_invariance: float
    latency_ms: float
    texts_per_s: float
    texts_per_cpu_s: float
    memory_bytes: int

    def matrix(self) -> np.ndarray:
        """The vectors, float32 [texts, dim]."""
        return np.frombuffer(self.vectors, "<f4").reshape(-1, self.dim)


class Obstacle(msgspec.Struct, frozen=True, tag=True):
    """Why a candidate could not be run."""

    why: str


class Question(msgspec.Struct, frozen=True):
    """What a process is to observe."""

    candidate: Candidate
    tokenizer_file: str
    max_tokens: int
    texts: Sequence[str]


def observe(candidate: Candidate, tokenizer_file: Path, max_tokens: int, texts: Sequence[str]) -> Observed:
    """Load a candidate in this process and run it; for a fresh process, else its memory is not told.

    EngineUnavailable where this host cannot.
    """
    if candidate.graph is None:
        raise EngineUnavailable("there is no graph")
    process = psutil.Process()
    tokenizer = Tokenizer(tokenizer_file, max_tokens=max_tokens)
    ids = tokenizer.encode(texts).ids
    before = process.memory_info().rss
    engine = Engine.load(
        Path(candidate.graph),
        threads=candidate.threads,
        device=candidate.device,
        precision=candidate.precision,
    )

    def run(rows: Sequence[np.ndarray]) -> np.ndarray:
        matrix, mask = padded(rows)
        return engine.run({"input_ids": matrix, "attention_mask": mask})

    alone = np.concatenate([run([row]) for row in ids])
    crowded = np.concatenate([run(rows) for rows in _batches(ids)])
    memory_bytes = process.memory_info().rss - before
    typical = sorted(ids, key=len)[: BATCH_TEXTS // 2]
    batch = [typical[i % len(typical)] for i in range(BATCH_TEXTS)]
    one = typical[len(typical) // 2]
    for _ in range(WARM_RUNS):
        run([one])
    latencies = [_seconds(run, [one]) for _ in range(LATENCY_RUNS)]
    cpu_began = time.process_time()
    batches = [_seconds(run, batch) for _ in range(BATCH_RUNS)]
    cpu_s = time.process_time() - cpu_began
    lengths = np.linalg.norm(alone, axis=1) * np.linalg.norm(crowded, axis=1)
    return Observed(
        vectors=alone.tobytes(),
        dim=alone.shape[1],
        batch_invariance=float((np.einsum("td,td->t", alone, crowded, dtype=np.float64) / lengths).min()),
        latency_ms=statistics.median(latencies) * 1e3,
        texts_per_s=BATCH_TEXTS / min(batches),
        texts_per_cpu_s=BATCH_TEXTS * BATCH_RUNS / cpu_s,
        memory_bytes=max(0, memory_bytes),
    )


def _batches(ids: Sequence[np.ndarray]) -> Iterable[Sequence[np.ndarray]]:
    for start in range(0, len(ids), BATCH_TEXTS):
        yield ids[start : start + BATCH_TEXTS]


def _seconds(run: Callable[[Sequence[np.ndarray]], np.ndarray], rows: Sequence[np.ndarray]) -> float:
    began = time.perf_counter()
    run(rows)
    return time.perf_counter() - began


def main() -> None:
    """Answer the question on standard input on standard output, both MessagePack."""
    question = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Question)
    answer: Observed | Obstacle
    try:
        answer = observe(
            question.candidate, Path(question.tokenizer_file), question.max_tokens, question.texts
        )
    except EngineUnavailable as error:
        answer = Obstacle(str(error))
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
