import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from index_builder.segments import frame, similarity
from index_builder.segments.merge import merge, merge_in_child
from index_builder.segments.row_set import RowSet
from index_builder.segments.segment import Segment
from shard_router.errors import SegmentCorrupt
from shard_router.model import AttributeType, LogRow, Metric, Version

SCHEMA = {"rank": AttributeType.INT, "name": AttributeType.KEYWORD, "tags": AttributeType.KEYWORDS}
FILES = ["header", "vectors", "arrays", "index"]


def row_of(segment: Segment, row: int) -> LogRow:
    """What a segment tells of a row, as the log told it."""
    return LogRow(
        id=segment.id_at(row),
        slot=int(segment.contents.slots[row]),
        version=segment.version_at(row),
        deleted=False,
        text=segment.text_at(row),
        attributes=segment.columns.attributes_at(row),
    )


def some_rows(n: int) -> list[LogRow]:
    return [
        LogRow(
            id=f"döc-{i}",
            slot=i % 128,
            version=Version(1 + i % 2, i + 1),
            deleted=False,
            text=None if i % 3 == 0 else f"text № {i}",
            attributes={"rank": i, "tags": (f"t{i % 5}", "all")} if i % 2 else {"name": f"n{i}"},
        )
        for i in range(n)
    ]


def some_vectors(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Loose clusters, as embeddings are."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((max(1, n // 40), dim))
    vectors = centers[rng.integers(0, len(centers), n)] + 0.7 * rng.standard_normal((n, dim))
    return vectors.astype(np.float32)


def written(directory: Path, n: int = 50, dim: int = 8, metric: Metric = Metric.COSINE) -> Segment:
    vectors = similarity.prepare(some_vectors(n, dim), metric)
    return Segment.write(directory / "one", some_rows(n), vectors, metric, SCHEMA, covers=(0, n))


@pytest.mark.parametrize("verify", [True, False])
def test_everything_written_is_read_back(tmp_path: Path, verify: bool) -> None:
    written(tmp_path)
    segment = Segment.open(tmp_path / "one", SCHEMA, verify)
    assert [row_of(segment, row) for row in range(segment.rows)] == some_rows(50)
    assert segment.ids() == [row.id for row in some_rows(50)]
    assert (segment.vectors == similarity.prepare(some_vectors(50, 8), Metric.COSINE)).all()
    assert (segment.covers, segment.metric, segment.dim) == ((0, 50), Metric.COSINE, 8)
    assert segment.size_bytes == sum((tmp_path / "one" / name).stat().st_size for name in FILES[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("dim", [16, 48, 64, 384])
@pytest.mark.parametrize("metric", list(Metric))
def test_codes_find_what_an_exact_scan_finds_with_the_same_scores(
    tmp_path: Path, metric: Metric, dim: int
) -> None:
    segment = written(tmp_path, n=1500, dim=dim, metric=metric)
    assert (segment.directory / "index").exists()
    queries = similarity.prepare(some_vectors(1500, dim)[::100] + np.float32(0.05), metric)
    allowed = np.random.default_rng(1).random(1500) < 0.5
    for rows in (None, RowSet(allowed)):
        scores, found = segment.search(queries, 10, allowed=rows, exact=False)
        exact_scores, exact = segment.search(queries, 10, allowed=rows, exact=True)
        shared = [len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]
        assert np.mean(shared) >= 0.98
        for i in range(len(queries)):
            known = dict(zip(exact[i].tolist(), exact_scores[i].tolist(), strict=True))
            both = [row for row in found[i].tolist() if row in known]
            assert [known[row] for row in both] == [scores[i][found[i].tolist().index(row)] for row in both]


@pytest.mark.parametrize("allowed_rows", [0, 1, 9, 10, 40, 400, 1499])
def test_k_rows_are_found_whenever_k_are_allowed(tmp_path: Path, allowed_rows: int) -> None:
    segment = written(tmp_path, n=1500, dim=16)
    allowed = np.zeros(1500, bool)
    allowed[np.random.default_rng(2).permutation(1500)[:allowed_rows]] = True
    scores, found = segment.search(segment.vectors[:2], 10, allowed=RowSet(allowed), exact=False)
    for row in range(2):
        real = found[row][found[row] >= 0]
        assert len(set(real.tolist())) == min(10, allowed_rows)
        assert allowed[real].all()
        assert (np.diff(scores[row][: len(real)]) <= 0).all()
        assert (scores[row][len(real) :] == -np.inf).all()


def test_vectors_that_bytes_cannot_tell_apart_are_searched_exactly(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((600, 4)).astype(np.float32)
    vectors[0] *= 1e6
    segment = Segment.write(
        tmp_path / "one", some_rows(600), vectors, Metric.INNER_PRODUCT, SCHEMA, covers=(0, 600)
    )
    assert not (tmp_path / "one" / "index").exists()
    allowed = np.ones(600, bool)
    allowed[0] = False
    _, found = segment.search(vectors[5:6], 10, allowed=RowSet(allowed), exact=False)
    want = np.argsort(-similarity.scores(vectors[5], vectors[1:], Metric.INNER_PRODUCT))[:10] + 1
    assert found[0].tolist() == want.tolist()


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit_is_found(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    path = tmp_path / "one" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SegmentCorrupt, match="checksum"):
        Segment.open(tmp_path / "one", SCHEMA, verify=True)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_short_or_missing_file_is_found_without_reading_it(tmp_path: Path, name: str, verify: bool) -> None:
    written(tmp_path)
    path = tmp_path / "one" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SegmentCorrupt):
        Segment.open(tmp_path / "one", SCHEMA, verify)
    path.unlink()
    with pytest.raises(SegmentCorrupt):
        Segment.open(tmp_path / "one", SCHEMA, verify)


def test_an_attribute_that_came_later_reads_as_null_and_one_that_went_is_gone(tmp_path: Path) -> None:
    written(tmp_path)
    schema = {"rank": AttributeType.INT, "late": AttributeType.FLOAT}
    segment = Segment.open(tmp_path / "one", schema, verify=True)
    assert row_of(segment, 1).attributes == {"rank": 1}
    assert np.isnan(segment.columns.numbers("late")).all()


def test_a_header_with_fields_of_a_later_release_is_read_and_a_later_format_refused(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "one" / "header"
    fields = msgspec.msgpack.decode(frame.unseal(b"RFSG", 1, path.read_bytes(), "header"))
    body = msgspec.msgpack.encode({**fields, "from_the_future": [1, 2]})
    path.write_bytes(frame.seal(b"RFSG", 1, body))
    assert Segment.open(tmp_path / "one", SCHEMA, verify=True).rows == 50
    path.write_bytes(frame.seal(b"RFSG", 2, body))
    with pytest.raises(SegmentCorrupt, match="newer"):
        Segment.open(tmp_path / "one", SCHEMA, verify=True)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("index_builder.segments.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_left_by_a_crash_does_not_hinder_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".one.part").mkdir()
    (tmp_path / ".one.part" / "vectors").write_bytes(b"half")
    assert written(tmp_path).rows == 50


def test_no_rows_make_no_segment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Segment.write(tmp_path / "one", [], np.zeros((0, 2), np.float32), Metric.L2, {}, covers=(0, 0))


def test_documents_without_text_or_attributes_are_fine(tmp_path: Path) -> None:
    rows = [LogRow("a", 0, Version(1, 1), False, None, {}), LogRow("b", 1, Version(1, 2), False, "", {})]
    vectors = np.eye(2, dtype=np.float32)
    Segment.write(tmp_path / "one", rows, vectors, Metric.COSINE, {}, covers=(0, 2))
    segment = Segment.open(tmp_path / "one", {}, verify=True)
    assert [row_of(segment, 0), row_of(segment, 1)] == rows


def test_a_merge_holds_the_picked_rows_of_every_source_in_order(tmp_path: Path) -> None:
    one = written(tmp_path)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = Segment.open(tmp_path / "two", SCHEMA, verify=True)
    merged = merge(tmp_path / "both", [(one, np.array([3, 1])), (two, np.array([0]))], SCHEMA)
    assert merged is not None
    assert [row_of(merged, row) for row in range(3)] == [row_of(one, 3), row_of(one, 1), row_of(two, 0)]
    assert (merged.vectors == one.vectors[[3, 1, 0]]).all()
    assert merged.covers == (0, 50)
    assert merge(tmp_path / "none", [(one, np.array([], np.int64))], SCHEMA) is None


async def test_a_merge_in_a_child_process_makes_the_same_segment(tmp_path: Path) -> None:
    one = written(tmp_path)
    merged = await merge_in_child(tmp_path / "both", [(one, np.array([3, 1]))], SCHEMA)
    assert merged is not None
    assert [row_of(merged, row) for row in range(2)] == [row_of(one, 3), row_of(one, 1)]
    assert await merge_in_child(tmp_path / "none", [(one, np.array([], np.int64))], SCHEMA) is None
    (tmp_path / "one" / "header").unlink()
    with pytest.raises(SegmentCorrupt, match="header") as told:
        await merge_in_child(tmp_path / "again", [(one, np.array([0]))], SCHEMA)
    assert told.value.path == str(one.directory)


async def test_a_child_tells_why_it_cannot_write(tmp_path: Path) -> None:
    one = written(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        await merge_in_child(tmp_path / "file" / "both", [(one, np.array([0]))], SCHEMA)


def test_a_merge_does_not_give_damage_a_good_checksum(tmp_path: Path) -> None:
    one = written(tmp_path)
    content = bytearray((tmp_path / "one" / "vectors").read_bytes())
    content[7] ^= 4
    (tmp_path / "one" / "vectors").write_bytes(content)
    with pytest.raises(SegmentCorrupt, match="vectors"):
        merge(tmp_path / "both", [(one, np.array([40]))], SCHEMA)
    assert not (tmp_path / "both").exists()
