"""The merge's rules, one by one."""

from shard_router.merge import merge
from shard_router.model import Hit, Version


def hit(id: str, score: float, seq: int = 1, term: int = 1) -> Hit:
    return Hit(id, score, Version(term, seq))


def test_the_best_of_all_answers_come_in_order() -> None:
    answers = [[hit("a", 0.9), hit("b", 0.1)], [], [hit("c", 0.5)]]
    assert [found.id for found in merge(answers, 2)] == ["a", "c"]


def test_fewer_than_k_are_all_there_is() -> None:
    assert [found.id for found in merge([[hit("a", 1.0)]], 10)] == ["a"]
    assert merge([], 10) == []


def test_a_document_counts_once_at_its_newest_version() -> None:
    old, new = hit("a", 0.9, seq=1), hit("a", 0.2, seq=2)
    other = hit("b", 0.5)
    for answers in ([[old], [new, other]], [[other, new], [old]], [[old, other, new]]):
        assert merge(answers, 2) == [other, new]


def test_a_later_term_is_newer_than_any_position() -> None:
    old, new = hit("a", 0.9, seq=900, term=1), hit("a", 0.1, seq=1, term=2)
    assert merge([[old], [new]], 1) == [new]


def test_equal_scores_are_in_order_of_id_also_across_the_cut() -> None:
    answers = [[hit("d", 0.5), hit("b", 0.5)], [hit("z", 0.7), hit("c", 0.5), hit("a", 0.5)]]
    assert [found.id for found in merge(answers, 3)] == ["z", "a", "b"]


def test_hits_keep_what_they_carry() -> None:
    full = Hit("a", 0.5, Version(1, 1), {"rank": 3}, "text")
    assert merge([[full]], 1)[0] is full
