from pathlib import Path

import numpy as np
import pytest

from index_builder.segments.contents import Contents, Draft
from index_builder.segments.segment import Segment
from shard_router.errors import SegmentCorrupt
from shard_router.hashing import hashes_of
from shard_router.model import AttributeType, LogRow, Metric, Version

SCHEMA = {"name": AttributeType.KEYWORD}


def row(id: str, seq: int) -> LogRow:
    return LogRow(
        id, seq % 7, Version(1, seq), False, None if seq % 2 else f"text {seq}", {"name": f"n{seq}"}
    )


def contents(ids: list[str]) -> Contents:
    draft = Draft.of([row(id, seq) for seq, id in enumerate(ids, 1)], SCHEMA)
    arrays = {name: np.concatenate(blocks) for name, blocks in draft.blocks.items()}
    return Contents(arrays, SCHEMA, draft.rows)


def of(ids: list[str]) -> np.ndarray:
    return hashes_of(id.encode() for id in ids)


def test_ids_are_found_by_their_hash() -> None:
    ids = [f"é-{i}" for i in range(300)]
    asked = ["é-299", "nobody", "é-0", "é", "é-150"]
    assert contents(ids).find(asked, of(asked)) == [(0, 299), (2, 0), (4, 150)]


def test_ids_that_share_a_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_hash(ids: object) -> np.ndarray:
        return np.full(len(list(ids)), 7, np.uint64)  # type: ignore[call-overload]

    monkeypatch.setattr("index_builder.segments.contents.hashes_of", one_hash)
    found = contents(["a", "b", "c"])
    assert found.find(["c", "a", "d"], np.full(3, 7, np.uint64)) == [(0, 2), (1, 0)]


def test_a_segment_written_before_ids_were_kept_by_hash_is_read() -> None:
    draft = Draft.of([row("a", 1), row("b", 2)], SCHEMA)
    arrays = {name: np.concatenate(blocks) for name, blocks in draft.blocks.items()}
    del arrays["id_hashes"], arrays["id_rows"]
    assert Contents(arrays, SCHEMA, 2).find(["b"], of(["b"])) == [(0, 1)]


def test_joining_takes_rows_in_the_order_given_and_finds_them_anew() -> None:
    one, two = contents(["a", "b", "c", "d"]), contents(["x", "y"])
    draft = Draft.joined(
        [(one, np.array([0, 1, 3])), (two, np.array([], np.int64)), (two, np.array([1]))], SCHEMA
    )
    made = Contents(
        {name: np.concatenate(blocks) for name, blocks in draft.blocks.items()}, SCHEMA, draft.rows
    )
    assert made.ids() == ["a", "b", "d", "y"]
    assert [made.text_at(at) for at in range(4)] == [None, "text 2", "text 4", "text 2"]
    assert [made.version_at(at).seq for at in range(4)] == [1, 2, 4, 2]
    assert made.find(["y", "c", "d"], of(["y", "c", "d"])) == [(0, 3), (2, 2)]
    assert made.columns.attributes_at(3) == {"name": "n2"}


@pytest.mark.parametrize("name", ["vectors", "arrays", "index"])
def test_damage_that_comes_after_opening_is_found(tmp_path: Path, name: str) -> None:
    vectors = np.random.default_rng(1).standard_normal((60, 8)).astype(np.float32)
    rows = [row(f"d{i}", i + 1) for i in range(60)]
    segment = Segment.write(tmp_path / "one", rows, vectors, Metric.L2, SCHEMA, covers=(0, 60))
    read: list[int] = []
    segment.verify(read.append)
    assert sum(read) == segment.size_bytes
    with (tmp_path / "one" / name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(SegmentCorrupt, match=f"checksum of {name}"):
        segment.verify()
