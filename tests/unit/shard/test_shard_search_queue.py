import numpy as np
import pytest

from services.shard.filter_cache import FilterCache
from services.shard.search_queue import BATCH_ROWS, Piece, SearchQueue
from shard_router.errors import Overloaded


def test_callers_with_one_key_share_a_batch_and_others_do_not() -> None:
    queue: SearchQueue[str] = SearchQueue(100)
    for key, item in [("x", "a"), ("y", "b"), ("x", "c")]:
        queue.put(key, item, 1)
    assert queue.take(1) == [Piece("a", 0, 1), Piece("c", 0, 1)]
    assert queue.take(1) == [Piece("b", 0, 1)]
    assert queue.take(1) == []
    assert queue.rows == 0


def test_every_thread_gets_its_share_of_what_waits() -> None:
    queue: SearchQueue[int] = SearchQueue(100)
    for item in range(6):
        queue.put("x", item, 1)
    assert [piece.item for piece in queue.take(2)] == [0, 1, 2]
    assert [piece.item for piece in queue.take(2)] == [3, 4]
    assert [piece.item for piece in queue.take(2)] == [5]


def test_a_large_caller_leaves_room_for_small_ones_and_comes_whole_in_the_end() -> None:
    queue: SearchQueue[str] = SearchQueue(5000)
    queue.put("x", "large", 200)
    queue.put("x", "small", 1)
    first = queue.take(1)
    assert Piece("small", 0, 1) in first
    pieces = [*first]
    while batch := queue.take(1):
        assert sum(piece.stop - piece.start for piece in batch) <= BATCH_ROWS
        pieces += batch
    rows = [row for piece in pieces if piece.item == "large" for row in range(piece.start, piece.stop)]
    assert rows == list(range(200))


def test_groups_take_turns() -> None:
    queue: SearchQueue[str] = SearchQueue(5000)
    queue.put("x", "large", 200)
    queue.put("y", "other", 1)
    assert queue.take(1) == [Piece("large", 0, BATCH_ROWS)]
    assert queue.take(1) == [Piece("other", 0, 1)]


def test_it_is_bounded_but_takes_any_single_caller() -> None:
    queue: SearchQueue[str] = SearchQueue(10)
    queue.put("x", "larger than the queue", 50)
    with pytest.raises(Overloaded, match=r"shard search queue is full \(10\)"):
        queue.put("x", "one more", 1)
    assert list(queue.drain()) == ["larger than the queue"]
    queue.put("x", "fits again", 1)
    assert queue.rows == 1


def test_a_filter_is_evaluated_once_and_the_least_recent_answer_goes_first() -> None:
    cache = FilterCache(250)
    made: list[bytes] = []

    def ask(digest: bytes) -> np.ndarray:
        def evaluate() -> np.ndarray:
            made.append(digest)
            return np.ones(100, bool)

        return cache.get((1, -1, digest), evaluate)

    for digest in (b"a", b"b", b"a", b"c", b"a", b"b"):
        assert ask(digest).all()
    assert made == [b"a", b"b", b"c", b"b"]
    assert cache.size_bytes == 200
    assert (cache.hits, cache.misses) == (2, 4)


def test_an_answer_larger_than_the_cache_is_given_but_not_kept() -> None:
    cache = FilterCache(10)
    assert cache.get((1, -1, b"a"), lambda: np.ones(100, bool)).all()
    assert cache.size_bytes == 0
