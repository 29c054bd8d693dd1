"""Columns give back what went in, from memory and from a file."""

from pathlib import Path

import numpy as np
import pytest

from shard_router.columns import Columns
from shard_router.filters import Compare, Op, evaluate
from shard_router.model import Attributes, AttributeType

SCHEMA = {
    "name": AttributeType.KEYWORD,
    "rank": AttributeType.INT,
    "score": AttributeType.FLOAT,
    "yanked": AttributeType.BOOL,
    "released": AttributeType.TIMESTAMP,
    "tags": AttributeType.KEYWORDS,
}
DOCUMENTS: list[Attributes] = [
    {
        "name": "é",
        "rank": 2**53 + 1,
        "score": -0.5,
        "yanked": True,
        "released": -1,
        "tags": ("b", "a", "b"),
    },
    {},
    {"name": "", "rank": -(2**63), "score": float("inf"), "yanked": False, "tags": ()},
    {"name": "a", "rank": 0, "score": 0.0, "released": 1_700_000_000_000_001, "tags": ("日本",)},
]


def test_rows_come_back_as_they_were() -> None:
    columns = Columns.build(DOCUMENTS, SCHEMA)
    assert columns.rows == 4
    rows = [columns.attributes_at(row) for row in range(columns.rows)]
    assert rows == DOCUMENTS
    assert [type(value) for value in rows[0].values()] == [str, int, float, bool, int, tuple]


def test_arrays_are_plain_and_survive_a_memory_map(tmp_path: Path) -> None:
    columns = Columns.build(DOCUMENTS, SCHEMA)
    arrays = columns.to_arrays()
    assert sum(array.nbytes for array in arrays.values()) == columns.nbytes
    mapped: dict[str, np.ndarray] = {}
    for number, (key, array) in enumerate(arrays.items()):
        assert array.ndim == 1
        assert array.dtype.kind in "iufb"
        np.save(tmp_path / f"{number}.npy", array)
        mapped[key] = np.load(tmp_path / f"{number}.npy", mmap_mode="r")
    again = Columns.from_arrays(mapped, SCHEMA, 4)
    assert [again.attributes_at(row) for row in range(4)] == DOCUMENTS
    assert evaluate(Compare("name", Op.LT, "b"), again).tolist() == [False, False, True, True]


def test_an_attribute_declared_later_is_null() -> None:
    arrays = Columns.build(DOCUMENTS, SCHEMA).to_arrays()
    later = Columns.from_arrays(
        arrays, SCHEMA | {"stars": AttributeType.INT, "owner": AttributeType.KEYWORD}, 4
    )
    assert [later.attributes_at(row) for row in range(4)] == DOCUMENTS
    assert np.isnan(later.numbers("stars")).tolist() == [True] * 4
    assert not evaluate(Compare("owner", Op.NE, "x"), later).any()


def test_what_the_schema_no_longer_declares_is_left_out() -> None:
    arrays = Columns.build(DOCUMENTS, SCHEMA).to_arrays()
    assert Columns.from_arrays(arrays, {"rank": AttributeType.INT}, 4).attributes_at(3) == {"rank": 0}
    assert Columns.build(DOCUMENTS, {"rank": AttributeType.INT}).attributes_at(3) == {"rank": 0}


def test_a_column_without_a_value_is_not_stored() -> None:
    assert Columns.build([{}, {}], SCHEMA).to_arrays() == {}


def test_lists_that_are_all_empty_are_no_nulls() -> None:
    columns = Columns.build([{"tags": ()}, {}], {"tags": AttributeType.KEYWORDS})
    assert [columns.attributes_at(row) for row in (0, 1)] == [{"tags": ()}, {}]
    assert not evaluate(Compare("tags", Op.EQ, "x"), columns).any()


def test_no_rows_are_no_trouble() -> None:
    columns = Columns.from_arrays(Columns.build([], SCHEMA).to_arrays(), SCHEMA, 0)
    assert columns.rows == 0
    assert columns.numbers("rank").shape == (0,)


def test_numbers_have_nan_for_null() -> None:
    columns = Columns.build(DOCUMENTS, SCHEMA)
    nan = float("nan")
    expected = {
        "rank": [2.0**53, nan, -(2.0**63), 0.0],
        "score": [-0.5, nan, float("inf"), 0.0],
        "yanked": [1.0, nan, 0.0, nan],
        "released": [-1.0, nan, nan, 1_700_000_000_000_001.0],
    }
    for name, wanted in expected.items():
        numbers = columns.numbers(name)
        assert numbers.dtype == np.float64
        np.testing.assert_array_equal(numbers, wanted)


def test_text_has_no_numbers_and_unknown_names_no_column() -> None:
    columns = Columns.build(DOCUMENTS, SCHEMA)
    for name in ("name", "tags"):
        with pytest.raises(TypeError, match=name):
            columns.numbers(name)
    with pytest.raises(KeyError, match="stars"):
        columns.numbers("stars")


def test_nan_is_null() -> None:
    columns = Columns.build([{"score": float("nan")}], SCHEMA)
    assert columns.attributes_at(0) == {}


def test_arrays_of_another_block_are_refused() -> None:
    arrays = Columns.build(DOCUMENTS, SCHEMA).to_arrays()
    with pytest.raises(ValueError, match="4 rows, not 5"):
        Columns.from_arrays(arrays, SCHEMA, 5)
    del arrays["rank.present"]
    with pytest.raises(KeyError, match="present"):
        Columns.from_arrays(arrays, SCHEMA, 4)


def test_names_may_hold_dots() -> None:
    schema = {"a": AttributeType.INT, "a.values": AttributeType.INT}
    columns = Columns.build([{"a": 1, "a.values": 2}], schema)
    assert Columns.from_arrays(columns.to_arrays(), schema, 1).attributes_at(0) == {"a": 1, "a.values": 2}
