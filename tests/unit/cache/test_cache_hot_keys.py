"""What is counted as hot, and by whom."""

import random
from collections import Counter

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache.frequent_items import FrequentItems
from services.cache.hot_keys import (
    HOT_COUNT,
    HOT_KEYS,
    TOLD,
    WINDOW_S,
    Gateways,
    HotKey,
    HotWindows,
    Report,
    hot,
    most_asked,
)
from services.cache.keys import answer_key, embedding_key, named
from services.cache.tier import RANKS, CacheTier

streams = st.lists(st.sampled_from([b"%d" % i for i in range(12)]), max_size=200)


@given(st.lists(streams, max_size=6), st.integers(1, 8))
def test_counts_are_never_too_high_and_never_too_low_by_more_than_the_error(batches, capacity):
    sketch, exact = FrequentItems(capacity), Counter()
    for batch in batches:
        sketch.update(batch, len(batch))
        exact.update(batch)
    told = dict(sketch.top(100))
    assert len(told) <= capacity
    assert sketch.error <= sketch.total / (capacity + 1)
    assert sketch.total == exact.total()
    assert all(exact[key] - sketch.error <= told.get(key, 0) <= exact[key] for key in exact)


@given(streams, streams, st.integers(1, 8))
def test_two_streams_merged_are_one(one, other, capacity):
    merged = FrequentItems(capacity)
    for stream in (one, other):
        sketch = FrequentItems(capacity)
        sketch.update(stream, len(stream))
        merged.merge(dict(sketch.top(capacity)), sketch.total, sketch.error)
    exact, told = Counter(one + other), dict(merged.top(100))
    assert merged.error <= merged.total / (capacity + 1)
    assert all(exact[key] - merged.error <= told.get(key, 0) <= exact[key] for key in exact)


def test_the_hundred_most_frequent_of_a_long_tail_are_found():
    rng = random.Random(5)
    stream = [b"%d" % int(rng.paretovariate(0.7)) for _ in range(200_000)]
    sketch = FrequentItems(1_024)
    for at in range(0, len(stream), 1_000):
        sketch.update(stream[at : at + 1_000], 1_000)
    often = {key for key, count in Counter(stream).most_common(100)}
    assert len(often & {key for key, _ in sketch.top(110)}) >= 98


def test_windows_forget_what_was_hot_before():
    windows = HotWindows(0.0)
    windows.saw_all([b"old"] * 500)
    assert windows.report(1.0).keys == [(b"old", 500)]
    windows.report(WINDOW_S)
    windows.saw(b"new")
    assert dict(windows.report(WINDOW_S + 1).keys) == {b"old": 500, b"new": 1}
    windows.report(2 * WINDOW_S)
    assert windows.report(2 * WINDOW_S + 1) == Report(5, 1, [(b"new", 1)])
    assert windows.report(9 * WINDOW_S).total == 0


def test_a_report_is_what_its_page_says_and_no_other_is_read():
    report = Report(7, 100, [(b"a", 60), (b"b", 3)])
    assert msgpack.unpackb(report.encode()) == [1, 7, 100, [[b"a", 60], [b"b", 3]]]
    assert Report.decode(msgpack.packb([1, 7, 100, [[b"a", 60], [b"b", 3]], "newer"])) == report
    for other in ([2, 7, 100, []], [1, 7], "text", [1, 7, 100, [[b"a", "x"]]]):
        assert Report.decode(msgpack.packb(other)) is None
    assert Report.decode(report.encode()[:-1]) is None


def test_gateways_are_added_up():
    reports = [Report(1, 900, [(b"a", 500), (b"b", 10)]), Report(9, 100, [(b"b", 60), (b"c", 30)])]
    assert most_asked(reports, 2) == [HotKey(b"a", 500, 0.5), HotKey(b"b", 70, 0.07)]
    assert most_asked([], 5) == []


def test_hot_is_what_is_both_a_share_and_many():
    asked = [
        HotKey(b"a", HOT_COUNT, 0.5),
        HotKey(b"few", HOT_COUNT - 1, 0.5),
        HotKey(b"cold", 10_000, 0.0001),
    ]
    assert hot(asked) == {b"a"}
    assert len(hot([HotKey(b"%d" % i, 10_000, 0.01) for i in range(500)])) == HOT_KEYS


async def test_the_hottest_are_told_by_rank_and_no_key_is():
    tier = CacheTier(l1_bytes=1_000_000, redis_url=None)
    assert tier.stats_of_hottest() == {}
    await tier.get_many([b"warm"] * 30 + [b"hot"] * 60 + [b"%d" % i for i in range(10)])
    told = tier.stats_of_hottest()
    assert list(told) == [str(rank) for rank in range(1, RANKS + 1)]
    assert told["1"] == {"reads": 60, "share": 0.6}
    assert told["2"] == {"reads": 30, "share": 0.3}
    assert told["10"] == {"reads": 1, "share": 0.01}


def test_a_gateway_that_tells_nothing_new_is_gone_and_later_forgotten():
    gateways = Gateways()
    still, live = Report(1, 0, []), [Report(i, 0, []) for i in range(100)]
    heard = [set(gateways.hear({b"still": still, b"live": live[i]})) for i in range(Gateways.FORGOTTEN_AFTER)]
    assert heard[: Gateways.GONE_AFTER] == [{b"still", b"live"}] * Gateways.GONE_AFTER
    assert heard[Gateways.GONE_AFTER :] == [{b"live"}] * (Gateways.FORGOTTEN_AFTER - Gateways.GONE_AFTER)
    assert gateways.forgotten() == []
    gateways.hear({b"still": still, b"live": live[90]})
    assert gateways.forgotten() == [b"still"]
    assert set(gateways.hear({b"still": Report(2, 0, []), b"live": live[91]})) == {b"still", b"live"}
    assert gateways.forgotten() == []


def test_no_more_than_so_many_keys_are_told():
    windows = HotWindows(0.0)
    windows.saw_all([b"%d" % (i % 5_000) for i in range(20_000)])
    assert len(windows.report(1.0).keys) <= TOLD


@pytest.mark.parametrize("text", ["a", ""])
def test_a_key_tells_its_kind_its_collection_and_a_digest_alone(text):
    embedding = embedding_key("v", "QUERY", 0, True, text)
    answer = answer_key(77, "acme", 1, 1, "", text.encode(), b"")
    assert named(embedding) == ("embedding", None, embedding[6:].hex())
    assert named(answer) == ("answer", 77, answer[9:].hex())
    for other in (b"", b"rf1:h", b"rf1:a:x:y", b"rf1:a:7"):
        assert named(other) is None
