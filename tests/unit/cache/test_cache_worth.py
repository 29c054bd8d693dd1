"""Looks stop where they find nothing, and come back soon after they would find again."""

from services.cache.worth import PROBE_EVERY, Worth


def looks(worth: Worth, asks: int, *, found: bool) -> int:
    """How many of so many asks were looked for, each with the same end."""
    looked = 0
    for _ in range(asks):
        if worth.pays():
            looked += 1
            worth.count(looked=1, found=int(found))
    return looked


def test_looks_that_find_are_all_made() -> None:
    worth = Worth(0.1)
    assert looks(worth, 1_000, found=True) == 1_000
    assert worth.found_share == 1


def test_looks_that_find_nothing_become_rare_and_never_end() -> None:
    worth = Worth(0.1)
    first = looks(worth, 100, found=False)
    assert 32 <= first < 100, "a few misses say nothing yet"
    assert looks(worth, 100 * PROBE_EVERY, found=False) == 100


def test_looks_come_back_when_they_find_again() -> None:
    worth = Worth(0.1)
    looks(worth, 10_000, found=False)
    looks(worth, 8 * PROBE_EVERY, found=True)
    assert looks(worth, 100, found=True) == 100


def test_many_at_once_count_as_many() -> None:
    one, many = Worth(0.1), Worth(0.1)
    for _ in range(40):
        one.count(looked=1, found=0)
    many.count(looked=40, found=0)
    assert abs(one.found_share - many.found_share) < 1e-12
    many.count(looked=0, found=0)
    assert abs(one.found_share - many.found_share) < 1e-12
