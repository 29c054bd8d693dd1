"""Entries against the reference codec, and old and new readers of each other's bytes."""

import math

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache.envelope import LEAST_LEAD, AnswerEntry, EmbeddingEntry, due, fresh, includes

ANSWER = AnswerEntry(positions={"log-a": 41}, body=b"\x08\x01", stored_at_ms=1_700_000_000_000)
VECTOR = np.array([0.5, -0.25, 0.0], dtype=np.float32)
EMBEDDING = EmbeddingEntry.of(VECTOR, tokens=5, truncated=True)

positions = st.dictionaries(st.text(), st.integers(0, 2**63 - 1))


@given(positions, st.binary(), st.integers(0, 2**53), st.integers(0, 2**31))
def test_an_answer_is_read_as_it_was_written(positions, body, stored_at_ms, cost_ms):
    entry = AnswerEntry(positions, body, stored_at_ms, cost_ms)
    assert AnswerEntry.decode(entry.encode()) == entry
    assert msgpack.unpackb(entry.encode()) == [1, positions, body, stored_at_ms, cost_ms]
    assert AnswerEntry.decode(msgpack.packb([1, positions, body, stored_at_ms, cost_ms])) == entry


def test_an_answer_of_an_earlier_writer_says_nothing_of_what_it_cost():
    earlier = msgpack.packb([1, {"log-a": 41}, b"body", 7])
    assert AnswerEntry.decode(earlier) == AnswerEntry({"log-a": 41}, b"body", 7, 0)


def test_an_embedding_is_read_as_it_was_written():
    entry = EmbeddingEntry.decode(EMBEDDING.encode())
    assert entry == EMBEDDING
    np.testing.assert_array_equal(entry.array(), VECTOR)
    assert entry.array().dtype == np.float32
    assert not entry.array().flags.owndata
    assert msgpack.unpackb(EMBEDDING.encode()) == [1, VECTOR.tobytes(), 5, True]


def test_an_embedding_may_be_a_row_of_a_matrix_and_of_numpy_scalars():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    entry = EmbeddingEntry.of(matrix[1], np.int32(4), np.bool_(False))
    assert EmbeddingEntry.decode(entry.encode()) == EmbeddingEntry(matrix[1].tobytes(), 4, False)


def test_a_reader_of_today_passes_over_what_a_later_writer_adds():
    later = msgpack.packb([*msgpack.unpackb(ANSWER.encode()), "added", {"and": "more"}])
    assert AnswerEntry.decode(later) == ANSWER
    later = msgpack.packb([*msgpack.unpackb(EMBEDDING.encode()), "added"])
    assert EmbeddingEntry.decode(later) == EMBEDDING


def test_a_later_reader_takes_defaults_for_what_a_writer_of_today_does_not_know():
    class LaterAnswer(msgspec.Struct, frozen=True, array_like=True, tag=1):
        positions: dict[str, int]
        body: bytes
        stored_at_ms: int
        cost_ms: int
        added: float = -1.0

    later = msgspec.msgpack.decode(ANSWER.encode(), type=LaterAnswer)
    assert (later.body, later.added) == (ANSWER.body, -1.0)


@pytest.mark.parametrize("entry", [ANSWER, EMBEDDING], ids=["answer", "embedding"])
def test_another_version_is_a_miss(entry):
    fields = msgpack.unpackb(entry.encode())
    for version in (0, 2, "1", None):
        assert type(entry).decode(msgpack.packb([version, *fields[1:]])) is None


@pytest.mark.parametrize("entry", [ANSWER, EMBEDDING], ids=["answer", "embedding"])
def test_damage_is_a_miss(entry):
    data = entry.encode()
    assert all(type(entry).decode(data[:n]) is None for n in range(len(data)))
    assert type(entry).decode(data + b"\x00") is None
    assert type(entry).decode(b"\xc1 not messagepack") is None
    assert type(entry).decode(msgpack.packb({"body": b""})) is None


@pytest.mark.parametrize("vector", [b"", b"\x00\x00\x80"], ids=["empty", "cut"])
def test_bytes_that_are_no_vector_are_a_miss(vector):
    assert EmbeddingEntry.decode(EmbeddingEntry(vector, 1, False).encode()) is None


class TestFresh:
    NOW = ANSWER.stored_at_ms + 1_000

    @pytest.mark.parametrize("position", [0, 40, 41])
    def test_an_answer_that_includes_all_that_is_known_is_fresh_at_any_age(self, position):
        assert fresh(ANSWER, {"log-a": position}, self.NOW + 10**9, 0)

    def test_one_write_more_makes_it_stale(self):
        assert not fresh(ANSWER, {"log-a": 42}, self.NOW, 0)

    def test_every_log_must_be_included(self):
        entry = AnswerEntry({"log-a": 41, "log-b": 7}, b"", 0)
        assert fresh(entry, {"log-a": 41, "log-b": 7}, self.NOW, 0)
        assert not fresh(entry, {"log-a": 41, "log-b": 8}, self.NOW, 0)

    @pytest.mark.parametrize("known", [{"log-z": 1}, {}, {"log-a": 1, "log-z": 1}])
    def test_other_logs_are_never_fresh_however_young(self, known):
        assert not fresh(ANSWER, known, ANSWER.stored_at_ms, 10**9)

    @pytest.mark.parametrize(("bound_ms", "served"), [(999, False), (1_000, True), (5_000, True)])
    def test_the_age_counts_from_when_the_entry_was_made(self, bound_ms, served):
        assert fresh(ANSWER, {"log-a": 42}, self.NOW, bound_ms) is served

    @pytest.mark.parametrize(("bound_ms", "served"), [(99, False), (100, True)])
    def test_or_from_when_the_first_later_position_became_known(self, bound_ms, served):
        assert fresh(ANSWER, {"log-a": 42}, self.NOW, bound_ms, superseded_at_ms=self.NOW - 100) is served

    def test_exact_means_exact_also_within_the_same_millisecond(self):
        assert not fresh(ANSWER, {"log-a": 42}, ANSWER.stored_at_ms, 0)

    def test_an_entry_from_the_future_has_no_age_to_trust(self):
        assert not fresh(ANSWER, {"log-a": 42}, ANSWER.stored_at_ms - 1, 10_000)


def test_an_answer_includes_what_is_known_of_the_very_same_logs():
    entry = AnswerEntry({"a": 5, "b": 7}, b"", 0)
    assert includes(entry, {"a": 5, "b": 7})
    assert includes(entry, {"a": 4, "b": 0})
    assert not includes(entry, {"a": 6, "b": 7})
    assert not includes(entry, {"a": 5})
    assert not includes(entry, {"a": 5, "b": 7, "c": 0})


class TestDue:
    def test_long_before_nobody_refreshes_and_at_the_end_everybody(self):
        entry = AnswerEntry({"a": 1}, b"", 1_000)
        assert not due(entry, 1_100, 60_000, 0.999)
        assert due(entry, 61_000, 60_000, 0.0)

    @pytest.mark.parametrize("cost_ms", [10, 20_000])
    def test_a_third_of_the_readers_would_begin_once_the_lead_is_left(self, cost_ms):
        entry = AnswerEntry({"a": 1}, b"", 0, cost_ms)
        lead_ms = max(cost_ms, 60_000 * LEAST_LEAD)
        begin = [due(entry, int(60_000 - lead_ms), 60_000, chance / 1_000) for chance in range(1_000)]
        assert sum(begin) == pytest.approx(1_000 / math.e, abs=2)

    @given(st.integers(0, 60_000), st.integers(0, 60_000), st.floats(0, 1, exclude_max=True))
    def test_once_due_it_stays_due(self, age_ms, later_ms, chance):
        entry = AnswerEntry({"a": 1}, b"", 0, 100)
        assert due(entry, age_ms, 60_000, chance) <= due(entry, age_ms + later_ms, 60_000, chance)
