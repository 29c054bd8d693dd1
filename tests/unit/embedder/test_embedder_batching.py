"""Every waiting text is run once, with texts like it, and no caller waits behind a crowd."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.embedder.batching import TOKENIZE_BYTES, Infer, Row, Tokenize, WaitingTexts

BATCH_TOKENS = 256
FOREVER_S = 1e9


def tokenize_all(
    waiting: WaitingTexts, lengths: Mapping[int, Sequence[int]], now_s: float = 0.0
) -> Infer | None:
    """Do all tokenizing that comes first; the batch that follows it."""
    while isinstance(work := waiting.take(now_s).work, Tokenize):
        waiting.tokenized(work.rows, [lengths[row.call][row.row] for row in work.rows])
    return work


def batches(waiting: WaitingTexts, lengths: Mapping[int, Sequence[int]]) -> list[list[Row]]:
    """All batches until nothing waits."""
    found = []
    while (work := tokenize_all(waiting, lengths)) is not None:
        found.append(list(work.rows))
    return found


def test_nothing_waits_at_first() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    assert waiting.take(0.0) == (None, [], False)
    assert waiting.rows == 0


def test_a_single_text_is_tokenized_and_run_at_once() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [20], deadline_s=FOREVER_S)
    assert waiting.take(0.0).work == Tokenize([Row(1, 0)])
    assert waiting.take(0.0).work is None, "it is being tokenized"
    waiting.tokenized([Row(1, 0)], [7])
    assert waiting.take(0.0).work == Infer([Row(1, 0)])
    assert waiting.rows == 0


@given(st.lists(st.integers(2, 300), min_size=1, max_size=200))
def test_one_call_is_cut_by_length_within_the_budget(lengths: list[int]) -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [10] * len(lengths), deadline_s=FOREVER_S)
    found = batches(waiting, {1: lengths})
    assert sorted(row.row for batch in found for row in batch) == list(range(len(lengths)))
    for batch in found:
        tokens = [lengths[row.row] for row in batch]
        assert len(batch) == 1 or len(batch) * max(tokens) <= BATCH_TOKENS
    longest = [max(lengths[row.row] for row in batch) for batch in found]
    assert longest == sorted(longest, reverse=True)


def test_texts_of_many_callers_share_a_batch() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    for call in range(20):
        waiting.add(call, [30], deadline_s=FOREVER_S)
    [batch] = batches(waiting, {call: [10] for call in range(20)})
    assert {row.call for row in batch} == set(range(20))


def test_short_texts_do_not_wait_for_long_ones_in_their_batch() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [800], deadline_s=FOREVER_S)
    waiting.add(2, [30], deadline_s=FOREVER_S)
    assert batches(waiting, {1: [120], 2: [8]}) == [[Row(2, 0)], [Row(1, 0)]]


def test_a_newcomer_goes_before_the_rest_of_a_bulk_call() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    lengths = {1: [100] * 500, 2: [100]}
    waiting.add(1, [400] * 500, deadline_s=FOREVER_S)
    first = tokenize_all(waiting, lengths)
    assert first is not None
    assert {row.call for row in first.rows} == {1}
    waiting.add(2, [400], deadline_s=FOREVER_S)
    second = tokenize_all(waiting, lengths)
    assert second is not None
    assert Row(2, 0) in second.rows


def test_a_newcomer_does_not_wait_for_a_bulk_call_to_be_tokenized() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [TOKENIZE_BYTES] * 500, deadline_s=FOREVER_S)
    assert waiting.take(0.0).work == Tokenize([Row(1, 0)])
    waiting.add(2, [TOKENIZE_BYTES], deadline_s=FOREVER_S)
    assert waiting.take(0.0).work == Tokenize([Row(2, 0)])
    waiting.tokenized([Row(2, 0)], [200])
    works = [waiting.take(0.0).work for _ in range(3)]
    assert Infer([Row(2, 0)]) in works


def test_a_bulk_call_is_not_starved_by_newcomers() -> None:
    """Newcomers as long as its own texts take half of all the work; it gets the other half."""
    waiting = WaitingTexts(100)
    lengths: dict[int, list[int]] = {0: [100] * 50}
    waiting.add(0, [400] * 50, deadline_s=FOREVER_S)
    served = []
    for step in range(100):
        if step % 2:
            lengths[step] = [100]
            waiting.add(step, [400], deadline_s=FOREVER_S)
        work = tokenize_all(waiting, lengths)
        assert work is not None
        served.append(work.rows[0].call == 0)
    assert sum(served) >= 45


def test_two_bulk_calls_advance_together() -> None:
    waiting = WaitingTexts(100)
    lengths = {1: [100] * 40, 2: [50] * 80}
    for call, texts in lengths.items():
        waiting.add(call, [400] * len(texts), deadline_s=FOREVER_S)
    tokens = {1: 0, 2: 0}
    for batch in batches(waiting, lengths):
        for row in batch:
            tokens[row.call] += lengths[row.call][row.row]
        assert abs(tokens[1] - tokens[2]) <= 200


def test_texts_are_tokenized_in_pieces_of_a_few_milliseconds() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [6_000] * 4, deadline_s=FOREVER_S)
    waiting.add(2, [6_000], deadline_s=FOREVER_S)
    waiting.add(3, [40_000, 10], deadline_s=FOREVER_S)
    pieces = [waiting.take(0.0).work for _ in range(3)]
    rows = [[Row(1, 0), Row(1, 1), Row(1, 2)], [Row(2, 0), Row(3, 0)], [Row(1, 3), Row(3, 1)]]
    assert pieces == [Tokenize(piece) for piece in rows]


def test_late_calls_are_dropped_before_anything_is_done_for_them() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [30, 30], deadline_s=5.0)
    waiting.add(2, [30], deadline_s=FOREVER_S)
    assert waiting.take(5.0) == (Tokenize([Row(2, 0)]), [1], False)
    assert waiting.rows == 1


def test_late_texts_do_not_ride_along() -> None:
    waiting = WaitingTexts(BATCH_TOKENS)
    waiting.add(1, [30], deadline_s=FOREVER_S)
    waiting.add(2, [31], deadline_s=5.0)
    assert waiting.take(0.0).work == Tokenize([Row(1, 0), Row(2, 0)])
    waiting.tokenized([Row(1, 0), Row(2, 0)], [8, 8])
    assert waiting.take(6.0) == (Infer([Row(1, 0)]), [2], False)
    assert waiting.rows == 0


class Model(RuleBasedStateMachine):
    """Any order of coming, tokenizing, running and leaving: each text is run once, or its call left."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = WaitingTexts(BATCH_TOKENS)
        self.now_s = 0.0
        self.calls = 0
        self.lengths: dict[int, list[int]] = {}
        self.deadlines: dict[int, float] = {}
        self.expected: set[Row] = set()
        self.tokenizing: list[Tokenize] = []

    @rule(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=40), patience_s=st.integers(1, 30))
    def come(self, lengths: list[int], patience_s: int) -> None:
        self.calls += 1
        self.lengths[self.calls] = lengths
        self.deadlines[self.calls] = self.now_s + patience_s
        self.expected |= {Row(self.calls, row) for row in range(len(lengths))}
        text_bytes = [length * 40 for length in lengths]
        self.waiting.add(self.calls, text_bytes, deadline_s=self.deadlines[self.calls])

    @rule()
    def take(self) -> None:
        work, late, more = self.waiting.take(self.now_s)
        assert more == (deepcopy(self.waiting).take(self.now_s).work is not None)
        for call in late:
            assert self.deadlines[call] <= self.now_s
            self.forget(call)
        if isinstance(work, Tokenize):
            self.tokenizing.append(work)
        elif isinstance(work, Infer):
            assert len(set(work.rows)) == len(work.rows)
            assert set(work.rows) <= self.expected
            assert all(self.deadlines[row.call] > self.now_s for row in work.rows)
            longest = max(self.lengths[row.call][row.row] for row in work.rows)
            assert len(work.rows) == 1 or len(work.rows) * longest <= BATCH_TOKENS
            self.expected -= set(work.rows)
        elif not self.tokenizing:
            assert not self.expected, "there was something to do"

    @rule(data=st.data())
    def finish_tokenizing(self, data: st.DataObject) -> None:
        if self.tokenizing:
            work = self.tokenizing.pop(data.draw(st.integers(0, len(self.tokenizing) - 1)))
            self.waiting.tokenized(work.rows, [self.lengths[row.call][row.row] for row in work.rows])

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.calls:
            call = data.draw(st.integers(1, self.calls))
            self.waiting.drop(call)
            self.forget(call)

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @invariant()
    def agrees(self) -> None:
        self.waiting.validate_state()
        assert self.waiting.rows == len(self.expected)

    def forget(self, call: int) -> None:
        self.expected = {row for row in self.expected if row.call != call}


TestModel = Model.TestCase
