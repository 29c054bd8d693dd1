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
    both = RowSet(np.array([True, True, False])).intersection(RowSet(np.array([False, True, True])))
    assert both.rows.tolist() == [1]


def test_no_rows_are_a_set_too() -> None:
    rows = RowSet(np.zeros(0, np.bool_))
    assert (rows.count, rows.share, rows.rows.tolist(), rows.bitmap().tolist()) == (0, 0.0, [], [])


def test_vectors_of_few_rows_are_kept_where_that_is_wanted() -> None:
    block = np.random.default_rng(1).standard_normal((6000, 384)).astype(np.float32)
    few, every = np.arange(6000) % 10 == 0, np.ones(6000, np.bool_)
    kept, unwanted, many = RowSet(few, 384), RowSet(few), RowSet(every, 384)
    for rows in (kept, unwanted, many):
        assert rows.vectors(block).tobytes() == block[rows.mask].tobytes()
    assert kept.vectors(block) is kept.vectors(block)
    assert unwanted.vectors(block) is not unwanted.vectors(block)
    assert many.vectors(block) is not many.vectors(block)
    assert kept.nbytes - unwanted.nbytes == kept.vectors(block).nbytes
    assert many.nbytes < RowSet(every).nbytes + 1
