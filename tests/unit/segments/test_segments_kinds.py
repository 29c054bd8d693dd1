"""Every kind of index behind Segment.search, held to one contract."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_builder.segments import frame, similarity
from index_builder.segments.index_spec import DEFAULT_EFFORT, Effort, IndexKind
from index_builder.segments.row_set import RowSet
from index_builder.segments.segment import Segment
from shard_router.model import LogRow, Metric, Version

ROWS, DIM = 4000, 32
KINDS = list(IndexKind)
METRICS = list(Metric)


def some_rows(n: int) -> list[LogRow]:
    return [LogRow(f"d{i}", i % 128, Version(1, i + 1), False, None, {}) for i in range(n)]


def some_vectors(n: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """Of fewer dimensions than they fill, as embeddings are; every seed fills the same ones."""
    directions = np.random.default_rng(99).standard_normal((8, dim))
    latent = np.random.default_rng(seed).standard_normal((n, 8))
    return (latent @ directions).astype(np.float32)


def write(directory: Path, kind: IndexKind, vectors: np.ndarray, metric: Metric) -> Segment:
    faiss.omp_set_num_threads(1)
    prepared = similarity.prepare(vectors, metric)
    return Segment.write(
        directory / "one", some_rows(len(vectors)), prepared, metric, {}, covers=(0, len(vectors)), kind=kind
    )


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[IndexKind, Metric], Segment]:
    vectors = some_vectors(ROWS)
    return {
        (kind, metric): write(tmp_path_factory.mktemp(f"{kind}-{metric}"), kind, vectors, metric)
        for kind in KINDS
        for metric in METRICS
    }


def recall(segment: Segment, queries: np.ndarray, allowed: RowSet | None, effort: Effort) -> float:
    """Recall@10 as a shard asks: eight more than ten, so that ids decide between equals."""
    scores, _ = segment.search(queries, 18, allowed=allowed, exact=False, effort=effort)
    exact, _ = segment.search(queries, 10, allowed=allowed, exact=True)
    return float(np.mean(scores[:, :10] >= exact[:, -1:]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_segment_is_searched_with_what_was_asked_for_and_again_when_opened(
    segments: Mapping[tuple[IndexKind, Metric], Segment], kind: IndexKind, metric: Metric
) -> None:
    segment = segments[kind, metric]
    assert segment.kind is kind
    again = Segment.open(segment.directory, {}, verify=True)
    assert again.kind is kind
    queries = similarity.prepare(some_vectors(20, seed=1), metric)
    for mine, theirs in zip(
        segment.search(queries, 10, allowed=None, exact=False),
        again.search(queries, 10, allowed=None, exact=False),
        strict=True,
    ):
        assert (mine == theirs).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_more_effort_finds_more_and_the_most_nearly_all(
    segments: Mapping[tuple[IndexKind, Metric], Segment], kind: IndexKind, metric: Metric
) -> None:
    segment = segments[kind, metric]
    queries = similarity.prepare(some_vectors(200, seed=2), metric)
    least, default, most = (
        recall(segment, queries, None, effort)
        for effort in (Effort(share=0.0), DEFAULT_EFFORT, Effort(share=1.0))
    )
    assert default >= 0.95
    assert most >= 0.99
    assert least <= most
    assert recall(segment, queries, None, Effort(recall=0.985)) >= 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_a_recall_that_nothing_measured_reaches_is_reached_by_comparing_with_all(
    segments: Mapping[tuple[IndexKind, Metric], Segment], kind: IndexKind
) -> None:
    segment = segments[kind, Metric.COSINE]
    header = msgspec.msgpack.decode(
        frame.unseal(b"RFSG", 1, (segment.directory / "header").read_bytes(), "header")
    )
    assert [knob for knob, _ in header["curve"]] == sorted(knob for knob, _ in header["curve"])
    queries = similarity.prepare(some_vectors(50, seed=3), Metric.COSINE)
    if header["curve"][-1][1] < 1.0:
        assert recall(segment, queries, None, Effort(recall=1.0)) == 1.0
    else:
        assert recall(segment, queries, None, Effort(recall=1.0)) >= 0.99


@pytest.mark.parametrize("share", [0.999, 0.5, 0.1, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("kind", KINDS)
def test_filters_of_every_selectivity_find_what_they_should(
    segments: Mapping[tuple[IndexKind, Metric], Segment], kind: IndexKind, share: float
) -> None:
    segment = segments[kind, Metric.COSINE]
    queries = similarity.prepare(some_vectors(100, seed=4), Metric.COSINE)
    allowed = RowSet(np.random.default_rng(5).random(ROWS) < share)
    scores, rows = segment.search(queries, 10, allowed=allowed, exact=False)
    filled = min(10, allowed.count)
    assert (rows[:, :filled] >= 0).all()
    assert (rows[:, filled:] == -1).all()
    assert allowed.mask[rows[:, :filled]].all()
    assert all(len(set(found)) == filled for found in rows[:, :filled].tolist())
    exact, _ = segment.search(queries, 10, allowed=allowed, exact=True)
    assert float(np.mean(scores >= exact[:, filled - 1 : filled])) >= 0.98 * filled / 10


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_row_scores_the_same_whatever_finds_it(
    segments: Mapping[tuple[IndexKind, Metric], Segment], data: st.DataObject
) -> None:
    metric = data.draw(st.sampled_from(METRICS))
    queries = similarity.prepare(
        some_vectors(data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 1000))), metric
    )
    k = data.draw(st.integers(1, 60))
    share = data.draw(st.sampled_from([None, 0.9, 0.4, 0.08, 0.002]))
    allowed = None
    if share is not None:
        allowed = RowSet(np.random.default_rng(data.draw(st.integers(0, 1000))).random(ROWS) < share)
    effort = Effort(share=data.draw(st.sampled_from([None, 0.0, 0.5, 1.0])))
    for kind in KINDS:
        segment = segments[kind, metric]
        scores, rows = segment.search(queries, k, allowed=allowed, exact=False, effort=effort)
        assert scores.shape == rows.shape == (len(queries), k)
        for query, found, told in zip(queries, rows, scores, strict=True):
            real = found[found >= 0]
            assert len(real) == min(k, ROWS if allowed is None else allowed.count)
            assert (told[: len(real)] == similarity.scores(query, segment.vectors[real], metric)).all()
            assert (np.diff(told[: len(real)]) <= 0).all()


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("kind", KINDS)
def test_many_equal_and_zero_vectors_leave_no_query_short(
    tmp_path: Path, kind: IndexKind, metric: Metric
) -> None:
    vectors = some_vectors(ROWS)
    vectors[500:2500] = vectors[500]
    vectors[3000:3400] = 0
    segment = write(tmp_path, kind, vectors, metric)
    queries = similarity.prepare(vectors[[0, 500, 3000, 3999]] + np.float32(0), metric)
    everything, half = np.ones(ROWS, np.bool_), np.arange(ROWS) % 2 == 0
    for mask in (everything, half, np.arange(ROWS) > 2400):
        scores, rows = segment.search(queries, 100, allowed=RowSet(mask), exact=False)
        assert all(len(set(found)) == 100 for found in rows.tolist())
        assert mask[rows].all()
        exact, _ = segment.search(queries, 100, allowed=RowSet(mask), exact=True)
        assert (scores[:, 0] == exact[:, 0]).all()


def test_copies_of_documents_do_not_stand_in_a_graphs_way(tmp_path: Path) -> None:
    """Half of all are copies of few: linked like others they would fill each other's lists."""
    vectors = some_vectors(ROWS)
    vectors[1::2] = np.repeat(vectors[1:21], ROWS // 40, axis=0)
    segment = write(tmp_path, IndexKind.HNSW, vectors, Metric.COSINE)
    assert segment.kind is IndexKind.HNSW
    assert (
        recall(segment, similarity.prepare(some_vectors(200, seed=2), Metric.COSINE), None, Effort(0.0)) > 0.9
    )
    copies = np.flatnonzero((vectors == vectors[1]).all(axis=1))
    for allowed in (copies, copies[::7], copies[-1:]):
        mask = np.ones(ROWS, np.bool_)
        mask[np.setdiff1d(copies, allowed)] = False
        scores, rows = segment.search(segment.vectors[1:2], 200, allowed=RowSet(mask), exact=False)
        assert set(allowed.tolist()) <= set(rows[0].tolist())
        assert (scores[0, : len(allowed)] == scores[0, 0]).all()


@pytest.mark.parametrize("dim", [2, 3, 7, 130])
@pytest.mark.parametrize("kind", [IndexKind.HNSW, IndexKind.IVF])
def test_any_dimension_has_an_index_or_does_without(tmp_path: Path, kind: IndexKind, dim: int) -> None:
    segment = write(tmp_path, kind, some_vectors(800, dim), Metric.L2)
    assert recall(segment, some_vectors(30, dim, seed=1), None, DEFAULT_EFFORT) >= 0.95


@pytest.mark.parametrize("rows", [32, 33, 100])
@pytest.mark.parametrize("kind", [IndexKind.HNSW, IndexKind.IVF])
def test_the_fewest_rows_that_may_be_indexed_are(tmp_path: Path, kind: IndexKind, rows: int) -> None:
    vectors = some_vectors(rows)
    segment = write(tmp_path / "s", kind, vectors, Metric.COSINE)
    scores, found = segment.search(segment.vectors[:4], 10, allowed=None, exact=False, effort=DEFAULT_EFFORT)
    assert found[:, 0].tolist() == [0, 1, 2, 3]
    assert (scores > -np.inf).all()


@pytest.mark.parametrize("kind", [IndexKind.HNSW, IndexKind.IVF])
def test_what_an_index_cannot_tell_apart_is_compared_with_all(tmp_path: Path, kind: IndexKind) -> None:
    """Without neighbourhoods there is nothing to walk, and every list is as good as any other."""
    vectors = np.random.default_rng(0).standard_normal((1000, 128)).astype(np.float32)
    vectors[0] *= 1e6
    segment = write(tmp_path, kind, vectors, Metric.INNER_PRODUCT)
    assert recall(segment, vectors[:30], None, DEFAULT_EFFORT) >= 0.95
    assert recall(segment, vectors[1:30], RowSet(np.arange(1000) != 0), DEFAULT_EFFORT) >= 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_threads_may_search_at_once(
    segments: Mapping[tuple[IndexKind, Metric], Segment], kind: IndexKind
) -> None:
    segment = segments[kind, Metric.COSINE]
    queries = similarity.prepare(some_vectors(64, seed=6), Metric.COSINE)
    want = segment.search(queries, 10, allowed=None, exact=False)
    together = threading.Barrier(4)

    def search(_: int) -> bool:
        faiss.omp_set_num_threads(1)
        together.wait()
        found = [segment.search(queries[i : i + 1], 10, allowed=None, exact=False) for i in range(64)]
        return all(
            (scores[0] == want[0][i]).all() and (rows[0] == want[1][i]).all()
            for i, (scores, rows) in enumerate(found)
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(search, range(4)))


def test_a_segment_of_an_earlier_release_is_searched_as_flat(
    segments: Mapping[tuple[IndexKind, Metric], Segment], tmp_path: Path
) -> None:
    segment = write(tmp_path, IndexKind.FLAT, some_vectors(600), Metric.COSINE)
    path = segment.directory / "header"
    fields = msgspec.msgpack.decode(frame.unseal(b"RFSG", 1, path.read_bytes(), "header"))
    old = {name: value for name, value in fields.items() if name not in ("kind", "curve", "held")}
    path.write_bytes(frame.seal(b"RFSG", 1, msgspec.msgpack.encode(old)))
    again = Segment.open(segment.directory, {}, verify=True)
    assert again.kind is IndexKind.FLAT
    queries = similarity.prepare(some_vectors(20, seed=1), Metric.COSINE)
    assert recall(again, queries, None, DEFAULT_EFFORT) >= 0.99
    assert recall(again, queries, None, Effort(recall=0.999)) == 1.0
