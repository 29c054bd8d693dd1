import pytest

from index_builder.segments.curve import Curve
from index_builder.segments.index_spec import GRAPH_ROWS, LEAST_GRAPH_ROWS, Effort, IndexKind, kind_for

CURVE = Curve(((16.0, 0.9), (32.0, 0.95), (64.0, 0.98), (128.0, 0.996)))


@pytest.mark.parametrize(
    ("wanted", "rows", "device", "kind"),
    [
        ("auto", GRAPH_ROWS - 1, "cpu", IndexKind.FLAT),
        ("auto", GRAPH_ROWS, "cpu", IndexKind.HNSW),
        ("auto", GRAPH_ROWS, "cuda:0", IndexKind.IVF),
        ("flat", 10 * GRAPH_ROWS, "cpu", IndexKind.FLAT),
        ("hnsw", LEAST_GRAPH_ROWS, "cpu", IndexKind.HNSW),
        ("hnsw", LEAST_GRAPH_ROWS - 1, "cpu", IndexKind.FLAT),
        ("ivf", LEAST_GRAPH_ROWS, "cuda:1", IndexKind.IVF),
    ],
)
def test_the_kind_follows_the_wish_the_size_and_the_device(
    wanted: str, rows: int, device: str, kind: IndexKind
) -> None:
    assert kind_for(wanted, rows, device) is kind


def test_a_test_may_have_its_graphs_small() -> None:
    assert kind_for("auto", 100, "cpu", graph_rows=100) is IndexKind.HNSW
    assert kind_for("ivf", 100, "cpu", graph_rows=100) is IndexKind.IVF
    with pytest.raises(ValueError, match="annoy"):
        kind_for("annoy", 100, "cpu")


@pytest.mark.parametrize(
    ("effort", "knob"),
    [
        (Effort(), 64.0),
        (Effort(share=0.0), 16.0),
        (Effort(share=0.3), 32.0),
        (Effort(share=1.0), 128.0),
        (Effort(recall=0.0), 16.0),
        (Effort(recall=0.95), 32.0),
        (Effort(recall=0.996), 128.0),
        (Effort(recall=0.997), None),
    ],
)
def test_the_least_work_that_was_measured_to_be_enough_is_done(effort: Effort, knob: float | None) -> None:
    assert CURVE.knob(effort, 0.97) == knob


def test_the_default_is_the_most_work_where_nothing_reaches_it() -> None:
    assert CURVE.knob(Effort(), 0.999) == 128.0
