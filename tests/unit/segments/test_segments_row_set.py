import numpy as np

from index_builder.segments.row_set import RowSet


def test_a_set_of_rows_is_told_in_every_form() -> None:
    rows = RowSet(np.array([True, False, True, False, False, False, False, False, True]))
    assert (rows.count, rows.share) == (3, 3 / 9)
    assert rows.rows.tolist() == [0, 2, 8]
    assert rows.bitmap().tolist() == [0b101, 0b1]
    assert rows.bitmap() is rows.bitmap()
    assert rows.rows is rows.rows


def test_rows_in_each_others_place_are_told_so() -> None:
    mask = np.array([True, False, False, False])
    rows = RowSet(mask)
    assert rows.bitmap((np.array([0]), np.array([3]))).tolist() == [0b1000]
    assert rows.mask.tolist() == mask.tolist()


def test_what_is_in_both_is_in_their_intersection() -> None:
    both = RowSet(np.array([True, True, False])) & RowSet(np.array([False, True, True]))
    assert both.rows.tolist() == [1]


def test_no_rows_are_a_set_too() -> None:
    rows = RowSet(np.zeros(0, np.bool_))
    assert (rows.count, rows.share, rows.rows.tolist(), rows.bitmap().tolist()) == (0, 0.0, [], [])
