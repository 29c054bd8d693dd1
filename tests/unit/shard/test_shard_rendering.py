"""Rows as answers carry them."""

from collections.abc import Sequence

import numpy as np
import pytest

from index_builder.segments.row_set import RowSet
from protos.ringfort import v1 as pb
from services import wire
from services.shard.filter_cache import FilterCache
from services.shard.memtable import Memtable
from services.shard.rendering import RenderedHits, Rendering
from services.shard.views import MemtableView, Snapshot
from shard_router.model import Attributes, AttributeType, Hit, Include, LogRow, Metric, Version

SCHEMA = {
    "name": AttributeType.KEYWORD, "stars": AttributeType.INT, "score": AttributeType.FLOAT,
    "live": AttributeType.BOOL, "made": AttributeType.TIMESTAMP, "tags": AttributeType.KEYWORDS,
}  # fmt: skip
FULL: Attributes = {
    "name": "é", "stars": -(2**62), "score": 0.5, "live": True, "made": 1_234_567, "tags": ("a", "b"),
}  # fmt: skip
ROWS = [
    LogRow("plain", 0, Version(0, 0), False, None, {}),
    LogRow("é" * 100, 1, Version(3, 2**40), False, "a text " * 50, FULL),
    LogRow("old", 2, Version(1, 7), False, "", {"stars": 0, "gone": "no longer declared"}),
]


@pytest.fixture
def view() -> MemtableView:
    memtable = Memtable(3, Metric.INNER_PRODUCT, SCHEMA, 8)
    memtable.append(ROWS, np.arange(9, dtype=np.float32).reshape(3, 3), 0)
    return MemtableView(5, memtable, 3, None)


def told(rendered: RenderedHits) -> Sequence[pb.Hit]:
    return pb.SearchResponse.FromString(rendered.body()).hits


@pytest.mark.parametrize("attributes", [True, False])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("vector", [True, False])
def test_a_rendered_hit_is_what_the_message_of_its_value_is(
    view: MemtableView, attributes: bool, text: bool, vector: bool
) -> None:
    include = Include(attributes, text, vector)
    rendering = Rendering(SCHEMA, 1 << 20)
    scores = np.array([1.5, -0.25, 0.0], np.float32)
    for _ in range(2):  # made, then kept
        hits = told(RenderedHits(rendering.rows([view], (0, 0, 0), (0, 1, 2), include), scores.tobytes()))
        for row, hit, score in zip(range(3), hits, scores.tolist(), strict=True):
            value = Hit(
                view.id_at(row), score, view.version_at(row),
                view.attributes_at(row) if attributes else {},
                view.text_at(row) if text else None,
                view.vector_at(row) if vector else None,
            )  # fmt: skip
            assert hit == wire.hit_on_wire(value, SCHEMA)


def test_rows_are_kept_by_part_row_and_what_is_included(view: MemtableView) -> None:
    rendering = Rendering(SCHEMA, 1 << 20)
    bare, full = Include(False, False), Include()
    [first] = rendering.rows([view], (0,), (1,), bare)
    assert rendering.rows([view], (0,), (1,), bare)[0] is first
    assert rendering.rows([view], (0,), (1,), full)[0].head != first.head
    assert rendering.rows([view], (0,), (0,), bare)[0].id == "plain"


def test_what_is_kept_is_bounded_and_what_is_asked_for_stays() -> None:
    memtable = Memtable(2, Metric.INNER_PRODUCT, {}, 1000)
    rows = [LogRow(f"d{i}", 0, Version(1, i), False, None, {}) for i in range(1000)]
    memtable.append(rows, np.zeros((1000, 2), np.float32), 0)
    view = MemtableView(0, memtable, 1000, None)
    rendering, bare = Rendering({}, 100_000), Include(False, False)
    [hot] = rendering.rows([view], (0,), (0,), bare)
    kept = []
    for row in range(1, 1000):
        kept += rendering.rows([view], (0,), (row,), bare)
        assert rendering.rows([view], (0,), (0,), bare)[0] is hot
    again = rendering.rows([view], (0,) * 999, range(1, 1000), bare)
    assert sum(a is b for a, b in zip(kept, again, strict=True)) < 500
    assert [row.id for row in again] == [f"d{i}" for i in range(1, 1000)]


def test_equal_scores_are_ordered_by_id_whatever_part_they_are_of() -> None:
    views = []
    for number, ids in enumerate((["d", "b", "x"], ["a", "e"], ["c"])):
        memtable = Memtable(2, Metric.INNER_PRODUCT, {}, 8)
        rows = [LogRow(id, 0, Version(1, 1), False, None, {}) for id in ids]
        memtable.append(rows, np.array([[float(id == "x"), 1.0] for id in ids], np.float32), 0)
        views.append(MemtableView(number, memtable, len(ids), None))
    views[1].live = RowSet(np.array([True, False]))
    ranking = Snapshot(1, views).search(
        np.array([[1, 1], [0, 0]], np.float32), 4, filter=None, exact=False, effort=wire.DEFAULT_EFFORT,
        cache=FilterCache(0),
    )  # fmt: skip
    found = [
        [
            ranking.views[ranking.parts[query, at]].id_at(int(ranking.rows[query, at]))
            for at in range(ranking.counts[query])
        ]
        for query in range(2)
    ]
    assert found == [["x", "a", "b", "c", "d"], ["a", "b", "c", "d", "x"]]
