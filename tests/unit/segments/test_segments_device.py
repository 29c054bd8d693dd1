"""Devices: what they come to here, and one contract of search wherever it runs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from index_builder.segments import device as devices
from index_builder.segments import similarity
from index_builder.segments.device import GpuIndex
from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort, IndexKind
from index_builder.segments.inverted import InvertedIndex
from index_builder.segments.quantized import QuantizedIndex
from index_builder.segments.row_set import RowSet
from index_builder.segments.segment import Segment
from shard_router.model import LogRow, Metric, Version

ROWS, DIM = 2000, 24
GPU = pytest.param(
    "cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="no GPU")]
)


def some_vectors(n: int, seed: int = 0) -> np.ndarray:
    directions = np.random.default_rng(99).standard_normal((6, DIM))
    latent = np.random.default_rng(seed).standard_normal((n, 6))
    return similarity.prepare((latent @ directions).astype(np.float32), Metric.COSINE)


@pytest.mark.parametrize("kind", list(IndexKind))
@pytest.mark.parametrize("device", [devices.CPU, GPU])
def test_a_search_finds_what_it_should_on_every_device(tmp_path: Path, device: str, kind: IndexKind) -> None:
    faiss.omp_set_num_threads(1)
    rows = [LogRow(f"d{i}", 0, Version(1, i + 1), False, None, {}) for i in range(ROWS)]
    vectors, queries = some_vectors(ROWS), some_vectors(40, seed=1)
    segment = Segment.write(
        tmp_path / "one", rows, vectors, Metric.COSINE, {}, covers=(0, ROWS), kind=kind, device=device
    )
    for share in (1.0, 0.98, 0.4, 0.03):
        allowed = RowSet(np.random.default_rng(2).random(ROWS) < share)
        exact, _ = segment.search(queries, 10, allowed=allowed, exact=True)
        for effort in (DEFAULT_EFFORT, Effort(share=1.0)):
            scores, found = segment.search(queries, 18, allowed=allowed, exact=False, effort=effort)
            assert (found >= 0).all()
            assert allowed.mask[found].all()
            assert float(np.mean(scores[:, :10] >= exact[:, -1:])) >= 0.95
            for query, picks, told in zip(queries, found, scores, strict=True):
                assert (told == similarity.scores(query, segment.vectors[picks], Metric.COSINE)).all()


class CloneThatTakesNoFilter:
    """What a GPU's index does, on the CPU: it finds rows whatever is allowed, and counts what it is asked."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._index: Any = faiss.IndexFlat(DIM, faiss.METRIC_INNER_PRODUCT)
        self._index.add(vectors)
        self.asked: list[int] = []

    def search(self, queries: np.ndarray, count: int, params: Any) -> Sequence[np.ndarray]:
        self.asked.append(count)
        found: Sequence[np.ndarray] = self._index.search(queries, count)
        return found


@pytest.mark.parametrize("kind", [IndexKind.FLAT, IndexKind.IVF])
def test_what_is_not_allowed_is_fetched_besides_and_dropped(kind: IndexKind) -> None:
    vectors, queries = some_vectors(ROWS), some_vectors(30, seed=3)
    built = (
        QuantizedIndex.build(vectors, Metric.COSINE)
        if kind is IndexKind.FLAT
        else InvertedIndex.build(vectors, Metric.COSINE, for_gpu=True)
    )
    assert built is not None
    clone = CloneThatTakesNoFilter(vectors)
    index = GpuIndex(built[0], lambda: clone)
    barred = np.zeros(ROWS, np.bool_)
    barred[::100] = True
    few_barred = RowSet(~barred)
    found = index.candidates(queries, 34, few_barred, 8.0)
    assert found.shape == (30, 34)
    assert few_barred.mask[found[found >= 0]].all()
    assert 34 < clone.asked[-1] <= 34 + barred.sum()
    best = np.argsort(-(queries @ vectors.T) + np.where(barred, 9, 0), axis=1)[:, :10]
    assert all(set(want) <= set(got) for want, got in zip(best.tolist(), found.tolist(), strict=True))
    selective = RowSet(np.arange(ROWS) % 5 == 0)
    before = len(clone.asked)
    found = index.candidates(queries, 34, selective, 8.0)
    assert selective.mask[found[found >= 0]].all()
    assert len(clone.asked) == before
    assert (index.candidates(queries, 34, None, 8.0) >= 0).all()
    assert clone.asked[-1] == 34


def test_what_a_gpu_drops_too_much_of_says_so() -> None:
    """The segment then compares the query with all that is allowed."""
    vectors = some_vectors(ROWS)
    built = QuantizedIndex.build(vectors, Metric.COSINE)
    assert built is not None
    nearest = np.argsort(-(vectors @ vectors[0]))[:200]
    allowed = np.ones(ROWS, np.bool_)
    allowed[nearest] = False
    index = GpuIndex(built[0], lambda: CloneThatTakesNoFilter(vectors))
    assert (index.candidates(vectors[:1], 34, RowSet(allowed), 1.0) == -1).all()


def test_a_graph_stays_on_the_cpu() -> None:
    class Graph:
        kind = IndexKind.HNSW

    graph: Any = Graph()
    assert devices.on("cuda:0", graph, some_vectors(10), Metric.COSINE) is graph


@pytest.mark.parametrize(
    ("wanted", "gpus", "device", "warned"),
    [
        ("cpu", 2, "cpu", False),
        ("auto", 0, "cpu", False),
        ("auto", 2, "cuda:0", False),
        ("cuda:1", 2, "cuda:1", False),
        ("cuda:2", 2, "cpu", True),
        ("cuda:0", 0, "cpu", True),
    ],
)
def test_a_device_is_what_the_machine_has_of_what_was_asked(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wanted: str,
    gpus: int,
    device: str,
    warned: bool,
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus)
    with caplog.at_level(logging.WARNING):
        assert devices.resolve(wanted) == device
    assert bool(caplog.records) is warned


def test_a_device_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="none of auto, cpu and cuda:N"):
        devices.resolve("tpu")
