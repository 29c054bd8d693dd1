"""What S3-FIFO keeps. Sizes are 10 bytes, budgets so that the small queue holds one entry in ten."""

import random
import subprocess
import sys

import pytest

from services.cache.policy import S3Fifo


def filled(count: int, budget: int = 100) -> S3Fifo[int]:
    cache: S3Fifo[int] = S3Fifo(budget)
    for i in range(count):
        cache.put(b"%d" % i, i, 10)
    return cache


def test_holds_what_was_put_until_the_budget_is_full():
    cache = filled(10)
    assert [cache.get(b"%d" % i) for i in range(11)] == [*range(10), None]
    assert (len(cache), cache.held_bytes, cache.evictions) == (10, 100, 0)
    cache.validate_state()


def test_the_oldest_unused_key_leaves_first():
    cache = filled(11)
    assert b"0" not in cache
    assert all(b"%d" % i in cache for i in range(1, 11))
    assert cache.evictions == 1


def test_two_uses_carry_a_key_through_a_scan():
    cache = filled(10)
    for _ in range(2):
        cache.get(b"3")
    for i in range(100, 200):
        cache.put(b"%d" % i, i, 10)
    assert cache.get(b"3") == 3
    cache.validate_state()


def test_one_use_does_not_carry_a_key_through_a_scan():
    cache = filled(10)
    cache.get(b"3")
    for i in range(100, 120):
        cache.put(b"%d" % i, i, 10)
    assert b"3" not in cache


def test_a_key_that_comes_back_while_remembered_stays_through_the_next_scan():
    cache = filled(11)
    cache.put(b"0", 0, 10)
    for i in range(100, 109):
        cache.put(b"%d" % i, i, 10)
    assert b"0" in cache
    cache.validate_state()


def test_main_gives_up_what_is_no_longer_used():
    cache = filled(10)
    for i in range(10):
        cache.get(b"%d" % i), cache.get(b"%d" % i)
    for i in range(20):  # each new key leaves for the next one, is remembered, and comes back into main
        cache.put(b"new %d" % i, i, 10)
        cache.put(b"other %d" % i, i, 10)
        cache.put(b"new %d" % i, i, 10)
    assert not any(b"%d" % i in cache for i in range(10))
    cache.validate_state()


def test_a_later_value_takes_the_place_of_the_earlier():
    cache = filled(3)
    cache.put(b"1", 111, 30)
    assert (cache.get(b"1"), cache.held_bytes, len(cache)) == (111, 50, 3)
    cache.put(b"1", 112, 5)
    assert (cache.get(b"1"), cache.held_bytes) == (112, 25)
    cache.validate_state()


def test_a_value_that_grows_beyond_the_budget_is_forgotten_not_served_old():
    cache = filled(3)
    cache.put(b"1", 111, 101)
    assert cache.get(b"1") is None
    cache.validate_state()


def test_deleted_keys_leave_nothing_behind():
    cache = filled(50)
    for i in range(50):
        assert cache.delete(b"%d" % i) == (i >= 40)
    assert (len(cache), cache.held_bytes) == (0, 0)
    assert "ghosts 0" in repr(cache)
    cache.validate_state()


def test_no_budget_holds_nothing():
    cache = filled(5, budget=0)
    assert len(cache) == 0
    cache.validate_state()


def test_beats_lru_where_one_hit_wonders_pass_through():
    """Nine in ten requests ask a Zipf-like hot set, the rest scan; LRU lets the scan in."""
    rng = random.Random(7)
    requests = [
        b"hot %d" % int(rng.paretovariate(0.9)) if rng.random() < 0.6 else b"scan %d" % i
        for i in range(30_000)
    ]
    cache: S3Fifo[int] = S3Fifo(1_000)
    recent: dict[bytes, None] = {}
    hits = lru_hits = 0
    for key in requests:
        if cache.get(key) is None:
            cache.put(key, 1, 10)
        else:
            hits += 1
        if key in recent:
            lru_hits += 1
            del recent[key]
        elif len(recent) == 100:
            del recent[next(iter(recent))]
        recent[key] = None
    assert hits > 1.04 * lru_hits


#: In a process of its own: how much its resident memory grew, over the budget, at most; and at the end.
PUTS = """
import random, sys
import psutil
from services.cache.tier import CacheTier

puts, budget, least, most = map(int, sys.argv[1:])
rng, process = random.Random(3), psutil.Process()
blob = rng.randbytes(most + 1)
tier = CacheTier(l1_bytes=budget, redis_url=None)
before = process.memory_info().rss
highest = 0
for i in range(puts):
    key = b"rf1:a:7:%016d" % (300_000 * rng.random())
    if tier.peek(key) is None:
        tier.put_many([(key, blob[: int(least + (most - least) * rng.random())])])
    if i % 10_000 == 0:
        highest = max(highest, process.memory_info().rss - before)
print(highest / budget, (process.memory_info().rss - before) / budget)
"""


@pytest.mark.parametrize(
    ("puts", "least", "most"),
    [(1_000_000, 100, 4_000), (200_000, 20, 100), (100_000, 1_000, 60_000)],
    ids=["a million", "small", "large"],
)
def test_resident_memory_is_within_the_budget(puts, least, most):
    sizes = map(str, (puts, 40 * 1024 * 1024, least, most))
    command = [sys.executable, "-c", PUTS, *sizes]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    highest, last = map(float, told.split())
    assert highest <= 1.05
    assert last >= 0.5  # what is allowed is used


def test_a_pinned_key_stays_through_any_scan_and_leaves_when_it_is_pinned_no_more():
    cache = filled(1_000, budget=10_000)
    cache.pin([b"999", b"not held"])
    cache.validate_state()
    for i in range(20_000):
        cache.put(b"scan%d" % i, i, 10)
        cache.get(b"scan%d" % i), cache.get(b"scan%d" % i)
    assert cache.get(b"999") == 999
    cache.validate_state()
    for i in range(200_000):
        cache.put(b"scan%d" % i, i, 10)
        cache.get(b"scan%d" % i), cache.get(b"scan%d" % i)
    assert b"999" not in cache


def test_a_large_value_is_not_pinned():
    cache: S3Fifo[int] = S3Fifo(1_000)
    cache.put(b"large", 1, 100)
    cache.pin([b"large"])
    for i in range(1_000):
        cache.put(b"%d" % i, i, 10)
    assert b"large" not in cache
